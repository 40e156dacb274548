"""`covey etcd restore`: a backup is proved, becomes a new cluster, and a running cloud finds out (safety S18, S19)."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.operate import cloud as clouds
from tests.operate import drill, hosts

Record = Callable[[str, object], None]


@pytest.mark.timeout(580)
def test_a_drill_everything_runs_on_and_is_accounted_for(tmp_path: Path, record_property: Record) -> None:
    """Restored from a backup that is a thousand instances old, under load."""
    with clouds.running(tmp_path, nodes=24, controllers=2) as cloud:
        found = drill.run(cloud, tmp_path, drill.Terms(kept=100, since=1000, ended=40))
    assert found.ran >= 1060 and found.unknown >= 1000
    record_property("restore drill, seconds from the first etcd member's end", found.told())


@pytest.mark.timeout(480)
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
