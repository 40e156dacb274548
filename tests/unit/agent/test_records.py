"""Records, tombstones and the node's identity survive a crash; damaged files are set aside."""

import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from covey import durable, model, wire, world
from covey.agent import identity, records
from covey.decide import convergence
from tests.support import disk, nouns

DAY_NS = 24 * 3600 * 1_000_000_000
SEEN = wire.Seen(history="h", revision=7)
WHO = model.Decision(who="ann", why="done")


def record(epoch: int = 1, instance: str = "vm", **changes: object) -> records.Record:
    values: dict[str, object] = {"instance": instance, "epoch": epoch, "cloud": "c", "seen": SEEN, "spec": nouns.spec()}
    return records.Record(**(values | changes))  # type: ignore[arg-type]


def tombstone(epoch: int = 1, at_ns: int = 0) -> records.Tombstone:
    return records.Tombstone(
        instance=model.InstanceId("vm"), epoch=epoch, decision=WHO, seen=wire.Seen(history="h", revision=9), at_ns=at_ns
    )


def loaded(data: Path | None, now_ns: int = 0) -> records.Records:
    made = records.Records(data)
    made.load(now_ns)
    return made


def test_records_and_tombstones_are_read_back(tmp_path: Path) -> None:
    first = loaded(tmp_path)
    first.save(record(1, script="c2VjcmV0", stage=convergence.Stage.LAUNCHED))
    first.save(record(2))
    first.bury(tombstone(1))
    second = loaded(tmp_path)
    assert {one.key for one in second.all()} == {("vm", 1), ("vm", 2)}
    kept = second.get((model.InstanceId("vm"), 1))
    assert kept is not None and kept.stage is convergence.Stage.LAUNCHED and kept.script == "c2VjcmV0"
    assert second.tombstones() == [tombstone(1)]
    assert second.newest_seen("h") == 9
    assert second.newest_seen("another history") == 0


def test_a_record_is_private_and_its_removal_lasts(tmp_path: Path) -> None:
    first = loaded(tmp_path)
    first.save(record())
    (file,) = (tmp_path / "records").iterdir()
    assert file.stat().st_mode & 0o777 == 0o600
    first.forget(record().key)
    first.forget(record().key)
    assert loaded(tmp_path).all() == []


def test_an_agent_that_never_restarts_forgets_old_tombstones_too(tmp_path: Path) -> None:
    """But not of a VM that is still here: the clock may have jumped."""
    mine = loaded(tmp_path)
    mine.save(record(instance="here"))
    for instance in ("old", "here"):
        mine.bury(msgspec.structs.replace(tombstone(), instance=model.InstanceId(instance)))
    mine.bury(tombstone(at_ns=31 * DAY_NS))
    assert {one.instance for one in mine.tombstones()} == {"vm", "here"}
    assert {path.stem for path in (tmp_path / "tombstones").iterdir()} == {"vm", "here"}


def test_an_older_order_never_replaces_a_newer_one(tmp_path: Path) -> None:
    made = loaded(tmp_path)
    made.bury(tombstone(3))
    made.bury(tombstone(2))
    assert loaded(tmp_path).tombstones() == [tombstone(3)]


def test_tombstones_are_kept_30_days(tmp_path: Path) -> None:
    """Safety S19."""
    loaded(tmp_path).bury(tombstone(at_ns=DAY_NS))
    assert loaded(tmp_path, 31 * DAY_NS - 1).tombstones()
    assert not loaded(tmp_path, 31 * DAY_NS + 1).tombstones()
    assert not list((tmp_path / "tombstones").iterdir())


@pytest.mark.parametrize("damage", [b'{"instance": "v', b'{"instance": "\xff\xfe', b""])
def test_a_damaged_file_is_set_aside_and_the_others_are_read(tmp_path: Path, damage: bytes) -> None:
    made = loaded(tmp_path)
    made.save(record(1))
    made.save(record(2))
    (tmp_path / "records" / "vm.1.json").write_bytes(damage)
    (tmp_path / "records" / "vm.3.json.tmp").write_text("torn")
    assert [one.epoch for one in loaded(tmp_path).all()] == [2]
    assert {path.name for path in (tmp_path / "records").iterdir()} == {"vm.1.json.corrupt", "vm.2.json"}


def test_a_write_that_fails_leaves_the_old_content(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    durable.write(path, record(1))
    path.with_name("x.json.tmp").mkdir()  # nothing can be written aside
    with pytest.raises(OSError, match=r"x\.json"):
        durable.write(path, record(2))
    assert durable.read(path, records.Record) == record(1)


def test_without_a_directory_all_is_in_memory() -> None:
    made = loaded(None)
    made.save(record())
    made.bury(tombstone())
    assert made.all() and made.tombstones()


def test_secrets_are_on_disk_before_they_are_offered(tmp_path: Path) -> None:
    """Safety S7: after a lost answer, whichever secret the controller knows is known here too."""
    clock = world.System()
    first = identity.File(tmp_path, clock)
    assert first.pend("one") == ()
    second = identity.File(tmp_path, clock)
    assert second.now.host_key == first.now.host_key
    assert second.pend("two") == ("one",)
    second.joined(nouns.joined(node=model.NodeId("n"), session=4, seen=SEEN), "two", SEEN)
    third = identity.File(tmp_path, clock)
    assert (third.now.node, third.now.counter, third.now.secret, third.now.seen) == ("n", 4, "two", SEEN)
    assert third.pend("three") == ("two",)
    assert identity.File(tmp_path, clock).pend("four") == ("three", "two")


def test_the_identity_is_private(tmp_path: Path) -> None:
    identity.File(tmp_path, world.System()).pend("s")
    assert (tmp_path / "node.json").stat().st_mode & 0o777 == 0o600


ON_A_FULL_DISK = """
import pathlib, sys
from covey import world
from covey.agent import identity
data = pathlib.Path(sys.argv[1])
identity.File(data, world.System()).pend("first")
try:
    with (data / "a-guests-disk").open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
except OSError as error:
    print(error.strerror)
file = identity.File(data, world.System())
print(file.pend("second"), identity.File(data, world.System()).now.offered)
"""


def test_a_node_whose_disk_is_full_can_still_join(tmp_path: Path) -> None:
    """Else nobody could tell it to remove the VMs that fill its disk. A secret is durable before it is sent (S7)."""
    small = disk.Small(tmp_path, 1)
    words = (*small.within(), sys.executable, "-c", ON_A_FULL_DISK, str(tmp_path))
    done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)
    assert (done.stdout, done.stderr) == ("No space left on device\n('first',) ('second', 'first')\n", "")
