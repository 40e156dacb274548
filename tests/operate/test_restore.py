"""`covey etcd restore`: a backup is proved, becomes a new cluster, and a running cloud finds out (safety S18, S19)."""

import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cluster import clients
from tests.operate import cloud as clouds
from tests.operate import hosts

eventually = hosts.eventually
Record = Callable[[str, object], None]
KEPT, SINCE, ENDED = 60, 240, 40


def restore(store: hosts.Cluster, backup: Path) -> None:
    """On every host, all stopped, with the token that the first one printed."""
    token: tuple[str, ...] = ()
    for host in store.hosts:
        host.wipe()
        words = ("--name", host.name, "--members", store.members, "--data-dir", host.data, *token)
        ran = store.covey("restore", backup, *words)
        assert ran.code == 0, ran
        if not token:
            token = ("--token", ran.out.split("--token ")[1].split()[0])
    store.start()
    store.wait_until_well()


@pytest.mark.timeout(500)
def test_a_drill_everything_runs_on_and_is_accounted_for(tmp_path: Path, record_property: Record) -> None:
    """Restored from a backup that is hundreds of instances old, under load."""
    with clouds.running(tmp_path, nodes=10, controllers=2) as cloud:
        kept = [id for _ in range(KEPT // 20) for id in cloud.start(20)]
        cloud.wait_until_started(kept)
        ran = cloud.store.covey("backup", tmp_path / "backup.db")
        assert ran.code == 0, ran
        since = [id for _ in range(SINCE // 20) for id in cloud.start(20)]
        cloud.wait_until_started(since)
        ended = kept[:ENDED]
        cloud.terminate(*ended)
        eventually(lambda: not set(ended) & set(cloud.vms()), 90)
        standing = {*kept[ENDED:], *since}
        assert set(cloud.vms()) == standing

        with clients.asking(cloud.urls, cloud.template, start_each=20) as load:
            lost_at = time.monotonic()
            for host in cloud.store.hosts:
                host.end()
            restore(cloud.store, tmp_path / "backup.db")
            served_s = _seconds(lost_at, lambda: bool(cloud.states()))
            normal_s = _seconds(lost_at, lambda: _accounted(cloud, standing))
            eventually(lambda: cloud.keys("settled"), 90)
            settled_s = time.monotonic() - lost_at
        figures = f"{len(standing)} VMs ran, {len(since)} of them unknown to the backup; requests answered after "
        figures += f"{served_s:.1f} s, every VM accounted for after {normal_s:.1f} s, settled after {settled_s:.1f} s"
        record_property("restore drill, from the first etcd member's end", figures)
        cloud.wait_until_started(load.started)
        assert cloud.events("restored", "store")
        states = cloud.states()
        assert {id for id in ended if states.get(id) not in (None, "Terminated")} == set()
        assert standing <= set(cloud.vms()), "a VM was destroyed"
        starts = cloud.journal("start")
        assert {id: starts[id] for id in (*standing, *ended, *load.started) if starts[id] != 1} == {}


def _accounted(cloud: clouds.Cloud, standing: set[str]) -> bool:
    states = cloud.states()
    return all(states.get(id) == "Started" for id in standing)


def _seconds(since: float, question: Callable[[], bool]) -> float:
    eventually(question, 120)
    return time.monotonic() - since


@pytest.mark.timeout(240)
def test_a_restored_store_has_another_id_and_a_new_nonce_also_without_a_controller(tmp_path: Path) -> None:
    with hosts.some(1) as store:
        (host,) = store.hosts
        store.start()
        store.wait_until_well()
        store.put("/covey/format", '{"format":1}')
        store.put("/x", "1")
        backup = tmp_path / "b.db"
        assert store.covey("backup", backup).code == 0
        store.put("/x", "2")
        for broken, why in (
            (backup.read_bytes()[:-100], "is no backup of etcd, or only a piece of one"),
            (backup.read_bytes().replace(b"/x", b"/y"), "its bytes are not those that its digest was made of"),
            (b"", "is no backup of etcd"),
        ):
            (tmp_path / "broken.db").write_bytes(broken)
            words = ("--name", "n1", "--members", store.members, "--data-dir", tmp_path / "new")
            ran = store.covey("restore", tmp_path / "broken.db", *words)
            assert ran.code == 1 and why in ran.err and len(ran.err.splitlines()) == 1, ran
            assert not (tmp_path / "new").exists()
        host.end()
        words = ("--name", "n1", "--members", store.members, "--data-dir", host.data)
        ran = store.covey("restore", backup, *words)
        assert ran.code == 1 and f"{host.data} is not empty: stop etcd there and move it away first" in ran.err
        ran = store.covey("restore", backup, *words, "--token", "covey")
        assert ran.code == 1 and "--token covey is the name of every new cluster" in ran.err
        host.wipe()
        ran = store.covey("restore", backup, *words)
        assert ran.code == 0 and "of the new cluster covey-restored-" in ran.out, ran
        store.start()
        host.running.wait_until_said("The restored store has a new history nonce")
        assert store.get("/x", host) == "1"
        assert store.get("/covey/history", host) == "" != store.ctl("get", "--prefix", "/covey/history/")
