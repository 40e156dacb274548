"""What the collector takes, what it leaves, and what happens when it meets a push (safety S32)."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path

import pytest

from covey import failpoint, model, world
from covey.client import oci
from covey.decide import garbage
from covey.registry import blobs, catalog, journal, sweep
from tests.support import registry, storage

SHELF, TRASH, QUARANTINE = blobs.Place.SHELF, blobs.Place.TRASH, blobs.Place.QUARANTINE
LAYER = b"a layer"
DIGEST = oci.digest_of(LAYER)


@pytest.fixture
def place(tmp_path: Path) -> Iterator[storage.Storage]:
    with storage.opened(tmp_path) as opened:
        yield opened
    failpoint.watch(None)


@pytest.fixture
def other(tmp_path: Path, place: storage.Storage) -> Iterator[storage.Storage]:
    with storage.opened(tmp_path) as opened:
        yield opened


async def collect(place: storage.Storage, **periods: float) -> sweep.Report:
    return await place.collector(garbage.Periods(**periods)).run()


def fates(report: sweep.Report) -> dict[model.Digest, garbage.Fate]:
    return {ruling.digest: ruling.fate for ruling in report.rulings}


async def test_what_a_manifest_needs_stays_for_ever(place: storage.Storage) -> None:
    digest = await place.push("a", "v1", LAYER)
    storage.age(place.base, hours=10_000)
    report = await collect(place)
    assert (report.rulings, report.kept) == ((), {"needed": 3})
    assert await place.lying() == {digest, DIGEST, oci.digest_of(storage.CONFIG)}
    assert await place.pull("a", "v1") == [LAYER]


async def test_what_nothing_needs_goes_to_the_trash_and_a_day_later_for_good(place: storage.Storage) -> None:
    digest = await place.store("a", LAYER)
    storage.age(place.base, hours=23)
    assert fates(await collect(place)) == {digest: garbage.Fate.STAY}
    storage.age(place.base, hours=2)
    await collect(place)
    assert (await place.lying(SHELF), await place.lying(TRASH)) == (set(), {digest})
    storage.age(place.base, hours=23)
    await collect(place)
    assert await place.lying(TRASH) == {digest}
    storage.age(place.base, hours=2)
    report = await collect(place)
    assert (report.freed_bytes, await place.lying(TRASH)) == (len(LAYER), set())
    assert await place.care.grants("a") == {}


async def test_a_deleted_manifest_takes_its_blobs_with_it_but_not_those_of_others(place: storage.Storage) -> None:
    await place.push("a", "v1", LAYER, b"shared")
    kept = await place.push("b", "v1", b"shared")
    await place.catalog.delete("a", await digest_of(place, "a", "v1"))
    for _ in range(2):
        storage.age(place.base, hours=25)
        await collect(place)
    assert await place.lying() == {kept, oci.digest_of(b"shared"), oci.digest_of(storage.CONFIG)}
    assert await place.pull("b", "v1") == [b"shared"]
    assert await place.care.grants("a") == {}


async def digest_of(place: storage.Storage, repository: str, tag: str) -> model.Digest:
    return (await place.catalog.known(repository, tag)).digest


@pytest.mark.parametrize("touch", ["asked for", "mounted elsewhere", "stored again", "uploaded again"])
async def test_every_use_of_a_blob_gives_it_another_day(place: storage.Storage, touch: str) -> None:
    await place.store("a", LAYER)
    storage.age(place.base, hours=25)
    if touch == "asked for":
        assert await place.catalog.granted_blob("a", DIGEST) is not None
    elif touch == "mounted elsewhere":
        await place.logs.grant("b", DIGEST)
    elif touch == "stored again":
        await place.blobs.put(LAYER)
    else:
        session = await place.blobs.begin()
        await place.blobs.write(session, 0, pieces(LAYER))
        await place.blobs.finish(session, DIGEST)
        await place.blobs.abort(session)
    await collect(place)
    assert await place.lying() == {DIGEST}


async def pieces(*content: bytes) -> AsyncIterator[bytes]:
    for piece in content:
        yield piece


async def test_who_asks_for_a_blob_in_the_trash_has_it_again(place: storage.Storage) -> None:
    await place.store("a", LAYER)
    storage.age(place.base, hours=12)
    await collect(place, grace_s=3600)
    assert await place.lying(TRASH) == {DIGEST}
    await place.logs.grant("a", DIGEST)
    assert await place.catalog.granted_blob("a", DIGEST) is not None
    assert await place.lying() == {DIGEST}


async def test_a_dry_run_says_all_of_it_and_does_nothing(place: storage.Storage) -> None:
    await place.push("a", "v1", b"needed")
    await place.store("a", LAYER)
    session = await place.blobs.begin()
    storage.age(place.base, hours=25)
    before = sorted(place.base.rglob("*"))
    report = await place.collector().run(dry_run=True)
    assert fates(report)[DIGEST] is garbage.Fate.TRASH
    assert report.rulings[0].reason == "nothing needs it, and nobody asked for it for 25 h"
    assert ([leftover.name for leftover in report.leftovers], report.grants) == ([session], 1)
    assert sorted(path for path in place.base.rglob("*") if path.name != "clock") == before


async def test_abandoned_uploads_and_files_expire(place: storage.Storage) -> None:
    old, new = await place.blobs.begin(), await place.blobs.begin()
    for session in (old, new):
        await place.blobs.write(session, 0, pieces(LAYER))
    (place.base / "aside" / "torn").write_bytes(b"x" * 100)
    (place.base / "aside" / "entry.torn").write_bytes(b"{")
    storage.age(place.base, hours=25)
    await place.blobs.write(new, len(LAYER), pieces(LAYER))
    report = await collect(place)
    assert {leftover.name for leftover in report.leftovers} == {old, "torn", "entry.torn"}
    with pytest.raises(blobs.NoSession):
        await place.blobs.offset(old)
    assert await place.blobs.offset(new) == 2 * len(LAYER)
    assert list((place.base / "aside").iterdir()) == []


async def test_a_version_that_was_replaced_stays_a_day_and_then_goes(place: storage.Storage) -> None:
    name = "templates/7a3f5f5e-6d0c-4b87-9c15-3f1f2a3b4c5d"
    config = json.dumps({"arch": "amd64"}).encode()
    digests = []
    for layer in (b"old", b"new"):
        for content in (config, layer):
            await place.store(name, content)
        manifest = registry.template_manifest(config, layer, name="mac", tag="v1")
        known, _ = await place.catalog.push(name, "v1", manifest, oci.OCI_MANIFEST, force=True)
        digests.append(known.digest)
    storage.age(place.base, hours=30)
    assert (await collect(place)).forgotten == ()  # replaced just now, whatever the files' age
    assert digests[0] in await place.lying()
    report = await collect(place, grace_s=-1, trash_s=-1)
    assert report.forgotten == (f"{name}@{digests[0]}",)
    assert await place.lying() == {digests[1], oci.digest_of(config), oci.digest_of(b"new")}
    assert await place.lying(TRASH) == set()


# ---- the collector meets a push ------------------------------------------------------------------------------------

Hook = Callable[[], Awaitable[None]]


class Died(Exception):
    """In the place of a crash."""


async def nothing() -> None:
    pass


class Interrupted(journal.Journal):
    """A journal in which something happens around the second look of a push, once."""

    before: Hook = staticmethod(nothing)
    after: Hook = staticmethod(nothing)

    async def append(
        self, log: str, number: int, entry: bytes, check: Callable[[], Awaitable[None]] | None = None
    ) -> bool:
        async def checked() -> None:
            assert check is not None
            before, self.before = self.before, nothing
            await before()
            await check()
            after, self.after = self.after, nothing
            await after()

        return await super().append(log, number, entry, checked)


@pytest.fixture
def interrupted(place: storage.Storage) -> Iterator[Interrupted]:
    logs = Interrupted(place.base, world.System(), fsync=False)
    place.catalog.logs = logs
    yield logs
    logs.close()


@pytest.mark.parametrize("moment", ["before", "after"])
@pytest.mark.parametrize("trash_s", [3600.0, -1.0], ids=["trash", "no trash"])
async def test_a_collection_inside_a_push_takes_nothing_from_it(
    place: storage.Storage, other: storage.Storage, interrupted: Interrupted, moment: str, trash_s: float
) -> None:
    """The blobs are old: nothing but the pending entry protects them."""
    for content in (storage.CONFIG, LAYER):
        await place.store("a", content)

    async def a_day_passes() -> None:
        storage.age(place.base, hours=30)
        await collect(other, trash_s=trash_s, upload_s=1e9)

    setattr(interrupted, moment, a_day_passes)
    await place.enter("a", "v1", LAYER)
    assert await other.pull("a", "v1") == [LAYER]
    storage.age(place.base, hours=60)
    await collect(other)
    assert await other.pull("a", "v1") == [LAYER]


async def test_a_blob_that_was_deleted_before_the_second_look_is_missed(
    place: storage.Storage, other: storage.Storage
) -> None:
    """The push is refused, and not half taken."""
    for content in (storage.CONFIG, LAYER):
        await place.store("a", content)
    for digest in await place.lying():
        await place.care.move(digest, SHELF, TRASH)
    async for held in place.care.held(TRASH):
        await place.care.destroy(held, TRASH)
    with pytest.raises(catalog.BlobMissing):
        await place.enter("a", "v1", LAYER)
    with pytest.raises(catalog.Missing):
        await other.catalog.manifest("a", "v1")
    assert await place.care.pending() == []


async def test_a_push_that_slept_through_everything_gets_no_number(
    place: storage.Storage, other: storage.Storage, interrupted: Interrupted
) -> None:
    """A server frozen for two days between its look and its entry: its pending entry has been swept, it looks again."""
    for content in (storage.CONFIG, LAYER):
        await place.store("a", content)

    async def two_days_pass() -> None:
        for _ in range(2):
            storage.age(place.base, hours=30)
            await collect(other)

    interrupted.after = two_days_pass
    with pytest.raises(catalog.BlobMissing):
        await place.enter("a", "v1", LAYER)
    assert (await other.logs.read({"a": 0}))["a"] == []


async def test_many_collectors_at_once(place: storage.Storage, other: storage.Storage) -> None:
    kept = [await place.push("a", f"v{number}", f"{number}".encode()) for number in range(20)]
    lost = [await place.store("b", f"lost {number}".encode()) for number in range(20)]
    storage.age(place.base, hours=25)
    await asyncio.gather(*(collect(server, trash_s=-1) for server in (place, other) * 3))
    left = await place.lying()
    assert left.isdisjoint(lost)
    assert left >= set(kept)
    for number in range(20):
        assert await other.pull("a", f"v{number}") == [f"{number}".encode()]


@pytest.mark.parametrize("point", ["registry.care.moved", "registry.care.destroyed", "registry.care.restored"])
async def test_a_collector_that_dies_leaves_nothing_in_between(place: storage.Storage, point: str) -> None:
    await place.push("a", "v1", b"needed")
    for number in range(4):
        await place.store("a", f"{number}".encode())
    if point == "registry.care.restored":
        await place.care.move(oci.digest_of(b"needed"), SHELF, TRASH)

    def die(name: str) -> None:
        if name == point:
            raise Died

    for _ in range(2):
        storage.age(place.base, hours=25)
        failpoint.watch(die)
        with pytest.raises(Died):
            await collect(place, trash_s=-1)
        failpoint.watch(None)
        assert await place.pull("a", "v1") == [b"needed"]
        if point == "registry.care.restored":
            break
    storage.age(place.base, hours=50)
    await collect(place, trash_s=-1)
    assert len(await place.lying()) == 3
    assert await place.lying(TRASH) == set()


async def test_a_quarantined_blob_goes_when_it_was_stored_again_or_nothing_needs_it(place: storage.Storage) -> None:
    await place.push("a", "v1", b"needed", b"healed")
    await place.store("a", b"unneeded")
    needed, healed, unneeded = (oci.digest_of(content) for content in (b"needed", b"healed", b"unneeded"))
    for digest in (needed, healed, unneeded):
        await place.care.move(digest, SHELF, QUARANTINE)
    storage.age(place.base, hours=25)
    await place.blobs.put(b"healed")
    await collect(place)
    assert await place.lying(QUARANTINE) == {needed}
