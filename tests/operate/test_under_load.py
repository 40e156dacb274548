"""etcd is cared for while 40 requests a second come in, ten of which start something: none fails, nothing is lost.

Clients repeat nothing. Each member is restarted; one is lost with its disk and replaced at another address; each is
defragmented; the store is backed up. The controllers are told of one member each, which is restarted or replaced too:
they go on with those that they have learnt of.
"""

import threading
from pathlib import Path

import pytest

from tests.cluster import clients
from tests.operate import cloud as clouds
from tests.operate import hosts
from tests.support import ran


def replace_lost(store: hosts.Cluster, name: str) -> None:
    """A host is lost with its disk; another one at another address takes its place."""
    lost = next(host for host in store.hosts if host.name == name)
    lost.kill()
    lost.wipe()
    newcomer = store.host(name)
    done: list[ran.Ran] = []
    replacing = threading.Thread(
        target=lambda: done.append(store.covey("replace", name, "--peer-url", newcomer.peer_url))
    )
    replacing.start()
    store.hosts[store.hosts.index(lost)] = newcomer
    hosts.eventually(lambda: any(row["role"] == "not started" for row in store.rows().values()), 60)
    store.start(newcomer)
    replacing.join(90)
    assert done and done[0].code == 0, done


@pytest.mark.timeout(400)
def test_no_request_fails_and_nothing_is_lost_while_etcd_is_cared_for(tmp_path: Path) -> None:
    with clouds.running(tmp_path, nodes=10, controllers=2) as cloud:
        store = cloud.store
        with clients.asking(cloud.urls, cloud.template, start_each=4) as load:
            for host in list(store.hosts):
                host.end()
                store.start(host)
                store.wait_until_well()
            assert load.failures == [], "a member was restarted"
            replace_lost(store, "n1")
            assert load.failures == [], "a member was replaced"
            ran = store.covey("defrag")
            assert ran.code == 0 and ran.out.count("bytes before") == 3 and "leads now" in ran.out, ran
            assert load.failures == [], "the members were defragmented"
            ran = store.covey("backup", tmp_path / "backup.db")
            assert ran.code == 0, ran
        assert load.failures == []
        assert sum(load.served.values()) > 200, load.served
        started = load.started
        assert len(set(started)) == len(started) > 50
        cloud.wait_until_started(started)
        assert set(cloud.vms()) == set(cloud.states()) == set(started)
        starts = cloud.journal("start")
        assert {id: starts[id] for id in started if starts[id] != 1} == {}
