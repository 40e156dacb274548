"""etcd is cared for and a controller is exchanged while 40 requests a second come in, twenty of which start something:
none fails, nothing is lost.

Clients repeat nothing. Each member is restarted; a controller goes down to the version before and up again; a member is
lost with its disk and replaced at another address; each is defragmented; the store is backed up. The controllers are
told of one member each, which is restarted or replaced too: they go on with those that they have learnt of.
"""

import signal
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from tests.cluster import clients, conftest
from tests.operate import cloud as clouds
from tests.operate import hosts
from tests.support import ran, wheels


def replace_lost(store: hosts.Cluster) -> None:
    """A host is lost with its disk; another one at another address takes its place. It is one that a controller was
    told of, and none that leads: on a busy machine an election may take longer than controllers stay green (S25)."""
    rows = store.rows()
    name = next(name for name in ("n1", "n2") if rows[name]["role"] == "follower")
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
    hosts.eventually(lambda: any(row["role"] == "not started" for row in store.rows().values()))
    store.start(newcomer)
    replacing.join(200)
    assert done and done[0].code == 0, done


def exchange(cloud: clouds.Cloud, number: int, covey: Sequence[str], load: clients.Load) -> None:
    """End a controller in good order, and start another version in its place."""
    going = cloud.controllers[number]
    assert going.running.end(signal.SIGTERM) == 0, going.running.err[-5:]
    going.program, going.covey = None, covey
    going.start()
    hosts.eventually(lambda: going.url in load.balancer.ready)
    served = load.served[going.url]
    hosts.eventually(lambda: load.served[going.url] > served + 20)


@pytest.mark.timeout(580)
def test_no_request_fails_and_nothing_is_lost_while_etcd_is_cared_for(
    tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    before = (str(wheels.covey_of(wheels.kept()[-1], tmp_path / "env")),)
    with clouds.running(tmp_path, nodes=40, controllers=2, COVEY_SHUTDOWN_DELAY="3s") as cloud:
        store = cloud.store
        with clients.asking(cloud.urls, cloud.template) as load:
            begun = time.monotonic()
            for host in list(store.hosts):
                host.end()
                store.start(host)
                store.wait_until_well()
            assert load.failures == [], "a member was restarted"
            exchange(cloud, 1, before, load)
            assert load.failures == [], "a controller was downgraded"
            exchange(cloud, 1, conftest.COVEY, load)
            assert load.failures == [], "a controller was upgraded"
            replace_lost(store)
            assert load.failures == [], "a member was replaced"
            ran = store.covey("defrag")
            assert ran.code == 0 and ran.out.count("bytes before") == 3 and "leads now" in ran.out, ran
            assert load.failures == [], "the members were defragmented"
            ran = store.covey("backup", tmp_path / "backup.db")
            assert ran.code == 0, ran
            took_s = time.monotonic() - begun
        assert load.failures == []
        started, served = load.started, sum(load.served.values())
        assert len(set(started)) == len(started) > 50 and served > 200
        cloud.wait_until_started(started)
        assert set(cloud.vms()) == set(cloud.states()) == set(started)
        starts = cloud.journal("start")
        assert {id: starts[id] for id in started if starts[id] != 1} == {}
        figures = f"{served / took_s:.1f} requests/s, {len(started) / took_s:.1f} starts/s, for {took_s:.0f} s"
        record_property("etcd cared for under load", f"{figures}: none failed, none was lost")
