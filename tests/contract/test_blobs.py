"""What every `Blobs` and `Logs` must do. An implementation is one more fixture, and a parameter of `storage`."""

import asyncio
import itertools
import re
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from covey import failpoint, model, world
from covey.client import oci
from covey.registry import blobs, disk, disk_care, journal, s3, s3_bucket, s3_care, s3_log
from tests.support import s3 as moto

CONTENT = bytes(range(256)) * 5000
DIGEST = oci.digest_of(CONTENT)
NEVER = model.Digest("sha256:" + "0" * 64)


class Storage(NamedTuple):
    """One place to keep bytes, seen by two servers."""

    blobs: blobs.Blobs
    logs: blobs.Logs
    other_blobs: blobs.Blobs
    other_logs: blobs.Logs
    care: blobs.Care
    log_care: blobs.LogCare
    names: Callable[[], dict[str, int]]  # everything that is stored, from the outside: sizes by path or key


@pytest.fixture(scope="module")
def s3_server() -> Iterator[moto.Server]:
    with moto.running() as server:
        yield server


@pytest.fixture(params=["on_disk", "in_bucket"])
def storage(request: pytest.FixtureRequest, s3_server: moto.Server) -> Iterator[Storage]:
    chosen: Storage = request.getfixturevalue(request.param)
    yield chosen
    failpoint.arm("")


@pytest.fixture
def on_disk(tmp_path: Path) -> Iterator[Storage]:
    one, two = (disk.Disk(tmp_path, world.System()) for _ in range(2))
    log_one, log_two = (journal.Journal(tmp_path, world.System()) for _ in range(2))
    care = disk_care.DiskCare(tmp_path, world.System())

    def names() -> dict[str, int]:
        return {str(path.relative_to(tmp_path)): path.stat().st_size for path in tmp_path.rglob("*")}

    yield Storage(one, log_one, two, log_two, care, care, names)
    for close in (one.close, two.close, log_one.close, log_two.close, care.close):
        close()


@pytest.fixture
def in_bucket(s3_server: moto.Server) -> Storage:
    name = s3_server.fresh_bucket()
    one, two = (s3_bucket.Bucket(s3_server.config(name), s3_server.environ, world.System()) for _ in range(2))
    system = world.System()
    care = s3_care.S3Care(two, system)
    return Storage(
        s3.S3(one, system),
        s3_log.S3Log(one, system),
        s3.S3(two, system),
        s3_log.S3Log(two, system),
        care,
        care,
        lambda: s3_server.keys(name),
    )


async def chunks(*pieces: bytes, cut: bool = False) -> AsyncIterator[bytes]:
    for piece in pieces:
        yield piece
    if cut:
        raise blobs.Cut("the client has gone")


def left(storage: Storage) -> list[str]:
    """What stands below uploads/ and aside/."""
    return [name for name in storage.names() if name.startswith(("uploads/", "aside/"))]


async def content_of(storage: Storage, blob: blobs.Blob, start: int = 0, end: int | None = None) -> bytes:
    return b"".join([piece async for piece in storage.other_blobs.read(blob, start, end)])


async def test_a_small_blob_is_stored_whole_and_again(storage: Storage) -> None:
    for place in (storage.blobs, storage.other_blobs):
        blob = await place.put(CONTENT)
        assert (blob.digest, blob.size_bytes) == (DIGEST, len(CONTENT))
        assert await content_of(storage, blob) == CONTENT
    assert await storage.blobs.get(DIGEST) == CONTENT
    assert left(storage) == []


async def test_what_was_never_stored_is_not_there(storage: Storage) -> None:
    assert await storage.blobs.stat(NEVER) is None
    with pytest.raises(FileNotFoundError):
        await storage.blobs.get(NEVER)


@pytest.mark.parametrize("cuts", [[], [1], [1000, 70_000]], ids=["one part", "two parts", "three parts"])
async def test_an_upload_becomes_a_blob(storage: Storage, cuts: list[int]) -> None:
    session = await storage.blobs.begin()
    edges = [0, *cuts, len(CONTENT)]
    for start, end in itertools.pairwise(edges):
        assert await storage.blobs.write(session, start, chunks(CONTENT[start:end])) == end
        assert await storage.blobs.offset(session) == end
    blob = await storage.blobs.finish(session, DIGEST)
    assert await content_of(storage, blob) == CONTENT
    for start, end in ((0, 1), (7, 70_000), (len(CONTENT) - 3, len(CONTENT)), (5, 5)):
        assert await content_of(storage, blob, start, end) == CONTENT[start:end]
    await storage.blobs.abort(session)
    assert left(storage) == []


async def test_an_upload_goes_on_at_another_server(storage: Storage) -> None:
    session = await storage.blobs.begin()
    await storage.blobs.write(session, 0, chunks(CONTENT[:9]))
    await storage.other_blobs.write(session, 9, chunks(CONTENT[9:]))
    assert (await storage.blobs.finish(session, DIGEST)).size_bytes == len(CONTENT)
    assert await storage.other_blobs.stat(DIGEST) is not None


async def test_an_upload_of_nothing(storage: Storage) -> None:
    session = await storage.blobs.begin()
    assert await storage.blobs.write(session, 0, chunks()) == 0
    assert (await storage.blobs.finish(session, oci.digest_of(b""))).size_bytes == 0


async def test_a_cut_keeps_what_came_before_it(storage: Storage) -> None:
    session = await storage.blobs.begin()
    with pytest.raises(blobs.Cut):
        await storage.blobs.write(session, 0, chunks(CONTENT[:500], CONTENT[500:777], cut=True))
    assert await storage.other_blobs.offset(session) == 777
    await storage.other_blobs.write(session, 777, chunks(CONTENT[777:]))
    await storage.other_blobs.finish(session, DIGEST)


@pytest.mark.parametrize("start", [0, 4, 6])
async def test_a_part_must_begin_where_the_session_stands(storage: Storage, start: int) -> None:
    session = await storage.blobs.begin()
    await storage.blobs.write(session, 0, chunks(b"12345"))
    with pytest.raises(blobs.WrongOffset) as caught:
        await storage.blobs.write(session, start, chunks(b"x"))
    assert caught.value.offset == 5


async def test_of_two_parts_at_one_offset_one_counts(storage: Storage) -> None:
    session = await storage.blobs.begin()
    pieces = [bytes([letter]) * 100_000 for letter in b"abcd"]
    places = [storage.blobs, storage.other_blobs] * 2
    results = await asyncio.gather(
        *(place.write(session, 0, chunks(piece)) for place, piece in zip(places, pieces, strict=True)),
        return_exceptions=True,
    )
    (winner,) = [piece for piece, result in zip(pieces, results, strict=True) if result == len(piece)]
    assert sum(isinstance(result, blobs.WrongOffset) for result in results) == 3
    await storage.blobs.finish(session, oci.digest_of(winner))


async def test_a_wrong_digest_publishes_nothing_and_ends_the_session(storage: Storage) -> None:
    for parts in ([CONTENT], [CONTENT[:5], CONTENT[5:]]):
        session = await storage.blobs.begin()
        offset = 0
        for part in parts:
            offset = await storage.blobs.write(session, offset, chunks(part))
        with pytest.raises(blobs.WrongDigest):
            await storage.blobs.finish(session, NEVER)
        with pytest.raises(blobs.NoSession):
            await storage.blobs.offset(session)
    assert await storage.blobs.stat(NEVER) is await storage.blobs.stat(DIGEST) is None
    assert left(storage) == []


async def test_finish_may_be_repeated_until_abort(storage: Storage) -> None:
    session = await storage.blobs.begin()
    await storage.blobs.write(session, 0, chunks(CONTENT))
    for place in (storage.blobs, storage.other_blobs):
        assert (await place.finish(session, DIGEST)).digest == DIGEST
    for _ in range(2):
        await storage.blobs.abort(session)
    with pytest.raises(blobs.NoSession):
        await storage.blobs.finish(session, DIGEST)


@pytest.mark.parametrize("name", ["", "..", "../../x", "f" * 32, "x" * 32])
async def test_a_session_that_is_none(storage: Storage, name: str) -> None:
    session = blobs.SessionId(name)
    with pytest.raises(blobs.NoSession):
        await storage.blobs.offset(session)
    with pytest.raises(blobs.NoSession):
        await storage.blobs.write(session, 0, chunks(b"x"))
    await storage.blobs.abort(session)
    assert await storage.blobs.stat(NEVER) is None


@pytest.mark.parametrize("point", ["registry.part.write", "registry.part.written", "registry.upload.joined"])
async def test_no_room_removes_the_session(storage: Storage, point: str) -> None:
    session = await storage.blobs.begin()
    failpoint.arm(f"{point}=full")
    with pytest.raises(blobs.DiskFull):
        await storage.blobs.write(session, 0, chunks(CONTENT[:100]))
        await storage.blobs.write(session, 100, chunks(CONTENT[100:]))
        await storage.blobs.finish(session, DIGEST)
    assert left(storage) == []
    assert await storage.blobs.stat(DIGEST) is None


async def test_no_room_for_a_small_blob(storage: Storage) -> None:
    failpoint.arm("registry.put.written=full")
    with pytest.raises(blobs.DiskFull):
        await storage.blobs.put(CONTENT)
    assert left(storage) == []


async def test_space_is_what_may_be_written(storage: Storage) -> None:
    space = await storage.blobs.space()
    assert 0 < space.free_bytes <= space.total_bytes


# ---- logs ----------------------------------------------------------------------------------------------------------


async def test_entries_are_read_from_any_number_on(storage: Storage) -> None:
    for number, entry in enumerate((b"zero", b"one", b"two")):
        assert await storage.logs.append("a/b", number, entry)
    assert await storage.other_logs.read({"a/b": 0, "never": 0}) == {"a/b": [b"zero", b"one", b"two"], "never": []}
    assert await storage.other_logs.read({"a/b": 2}) == {"a/b": [b"two"]}
    assert await storage.other_logs.read({"a/b": 3}) == {"a/b": []}
    assert left(storage) == []


async def test_a_number_is_taken_once(storage: Storage) -> None:
    results = await asyncio.gather(
        *(place.append("a", 0, f"entry {n}".encode()) for n, place in enumerate([storage.logs, storage.other_logs] * 5))
    )
    assert sorted(results) == [False] * 9 + [True]
    (entry,) = (await storage.logs.read({"a": 0}))["a"]
    assert entry == f"entry {results.index(True)}".encode()


async def test_our_own_entry_is_recognised(storage: Storage) -> None:
    assert await storage.logs.append("a", 0, b"mine")
    assert await storage.logs.append("a", 0, b"mine")  # its answer was lost (safety S30)
    assert not await storage.logs.append("a", 0, b"another's")


async def test_a_log_inside_another_s_folder(storage: Storage) -> None:
    await storage.logs.append("a", 0, b"outer")
    await storage.logs.append("a/b", 0, b"inner")
    assert await storage.logs.read({"a": 0, "a/b": 0}) == {"a": [b"outer"], "a/b": [b"inner"]}


async def test_the_logs_of_a_folder(storage: Storage) -> None:
    assert list(await storage.logs.names("templates")) == []
    for name in ("templates/x", "templates/y", "other/z"):
        await storage.logs.append(name, 0, b"e")
    assert sorted(await storage.logs.names("templates")) == ["templates/x", "templates/y"]


async def test_grants(storage: Storage) -> None:
    assert await storage.logs.granted("a", [DIGEST, NEVER]) == frozenset()
    for _ in range(2):
        await storage.logs.grant("a", DIGEST)
    assert await storage.other_logs.granted("a", [DIGEST, NEVER]) == {DIGEST}
    assert await storage.other_logs.granted("b", [DIGEST]) == frozenset()
    assert await storage.other_logs.withdraw("a", DIGEST)
    assert not await storage.logs.withdraw("a", DIGEST)
    assert await storage.logs.granted("a", [DIGEST]) == frozenset()


async def test_the_time_of_the_last_pull(storage: Storage) -> None:
    await storage.logs.append("a", 0, b"e")
    assert await storage.logs.pulled_s(["a", "never"]) == {"a": 0, "never": 0}
    await storage.logs.mark_pulled("a")
    assert (await storage.other_logs.pulled_s(["a"]))["a"] > 1_700_000_000


async def test_the_layout_in_the_docstrings_names_what_is_made(storage: Storage) -> None:
    await storage.blobs.put(CONTENT)
    await storage.blobs.begin()
    await storage.logs.append("a", 0, b"e")
    await storage.care.note("n", b"x")
    await storage.care.move(DIGEST, SHELF, TRASH)
    for doc in (blobs.__doc__, s3.__doc__):
        drawn = set(re.findall(r"^ {4}[│ ]*[├└]── (\w+)", doc or "", re.MULTILINE))
        assert {name.partition("/")[0] for name in storage.names()} <= drawn


async def test_a_cancelled_write_leaves_the_session_whole(storage: Storage) -> None:
    """Cancelled at any moment: what is recorded has its bytes, and what is not has left nothing."""
    pieces = [CONTENT[start : start + 100_000] for start in range(0, len(CONTENT), 100_000)] * 4
    content = b"".join(pieces)
    for patience in range(12):
        session = await storage.blobs.begin()
        write = asyncio.create_task(storage.blobs.write(session, 0, chunks(*pieces)))
        for _ in range(patience):
            await asyncio.sleep(0.002)
        write.cancel()
        await asyncio.gather(write, return_exceptions=True)
        offset = await storage.blobs.offset(session)
        data = [name for name, size in storage.names().items() if name.startswith(f"uploads/{session}/data.") and size]
        assert len(data) == (offset > 0)
        await storage.blobs.write(session, offset, chunks(content[offset:]))
        blob = await storage.blobs.finish(session, oci.digest_of(content))
        assert blob.size_bytes == len(content)
        await storage.blobs.abort(session)


async def test_an_entry_is_pending_while_it_is_checked(storage: Storage) -> None:
    seen: list[bytes] = []

    async def check() -> None:
        seen.extend(await storage.log_care.pending())

    assert await storage.logs.append("a", 0, b"entry", check)
    assert (seen, await storage.log_care.pending()) == ([b"entry"], [])

    async def refuse() -> None:
        raise blobs.WrongDigest("no")

    with pytest.raises(blobs.WrongDigest):
        await storage.logs.append("a", 1, b"refused", refuse)
    assert (await storage.logs.read({"a": 0}), await storage.log_care.pending()) == ({"a": [b"entry"]}, [])


async def test_a_pending_entry_that_was_given_up_gets_no_number(storage: Storage) -> None:
    async def give_up() -> None:
        await storage.care.expire(await storage.care.clock_s() + 1)

    await storage.logs.append("a", 0, b"zero")
    assert not await storage.logs.append("a", 1, b"one", give_up)
    assert (await storage.other_logs.read({"a": 0}))["a"] == [b"zero"]


# ---- care ----------------------------------------------------------------------------------------------------------

SHELF, TRASH, QUARANTINE = blobs.Place.SHELF, blobs.Place.TRASH, blobs.Place.QUARANTINE


async def held(storage: Storage, place: blobs.Place) -> list[model.Digest]:
    return [blob.digest async for blob in storage.care.held(place)]


async def destroy(storage: Storage, place: blobs.Place) -> int:
    """All that lies there."""
    return sum([await storage.care.destroy(blob, place) async for blob in storage.care.held(place)])


async def test_what_lies_where(storage: Storage) -> None:
    for place in (SHELF, TRASH, QUARANTINE):
        assert await held(storage, place) == []
    before_s = await storage.care.clock_s()
    await storage.blobs.put(CONTENT)
    (blob,) = [blob async for blob in storage.care.held(SHELF)]
    assert (blob.digest, blob.size_bytes) == (DIGEST, len(CONTENT))
    assert before_s - 2 < blob.since_s <= await storage.care.clock_s() + 2


@pytest.mark.parametrize("ask", ["stat", "get"])
async def test_who_asks_for_a_blob_in_the_trash_gets_it_back(storage: Storage, ask: str) -> None:
    await storage.blobs.put(CONTENT)
    assert await storage.care.move(DIGEST, SHELF, TRASH)
    assert (await held(storage, SHELF), await held(storage, TRASH)) == ([], [DIGEST])
    if ask == "stat":
        blob = await storage.other_blobs.stat(DIGEST)
        assert blob is not None
        assert blob.size_bytes == len(CONTENT)
    assert await storage.other_blobs.get(DIGEST) == CONTENT
    assert await destroy(storage, TRASH) == 0
    assert await held(storage, SHELF) == [DIGEST]


async def test_what_was_deleted_from_the_trash_is_gone(storage: Storage) -> None:
    await storage.blobs.put(CONTENT)
    await storage.care.move(DIGEST, SHELF, TRASH)
    (found,) = [blob async for blob in storage.care.held(TRASH)]
    assert await storage.care.destroy(found, TRASH) == len(CONTENT)
    assert await storage.care.destroy(found, TRASH) == 0
    assert not await storage.care.move(DIGEST, TRASH, SHELF)
    assert await storage.blobs.stat(DIGEST) is None
    with pytest.raises(FileNotFoundError):
        await storage.blobs.get(DIGEST)


async def test_to_the_trash_and_back_any_number_of_times(storage: Storage) -> None:
    await storage.blobs.put(CONTENT)
    for _ in range(3):
        assert await storage.care.move(DIGEST, SHELF, TRASH)
        assert not await storage.care.move(DIGEST, SHELF, TRASH)
        await storage.other_blobs.put(CONTENT)  # stored anew while one lies in the trash
        assert await storage.care.move(DIGEST, SHELF, TRASH)
        assert await storage.care.move(DIGEST, TRASH, SHELF)
        assert (await held(storage, SHELF), await held(storage, TRASH)) == ([DIGEST], [])


async def test_what_came_to_the_trash_again_is_not_what_was_found_there(storage: Storage) -> None:
    """The first collector has decided to delete; a push takes the blob back; the second collector moves it again."""
    await storage.blobs.put(CONTENT)
    await storage.care.move(DIGEST, SHELF, TRASH)
    (found,) = [blob async for blob in storage.care.held(TRASH)]
    assert await storage.other_blobs.stat(DIGEST) is not None
    await storage.care.move(DIGEST, SHELF, TRASH)
    await storage.care.destroy(found, TRASH)
    assert await storage.other_blobs.stat(DIGEST) is not None


async def test_of_taking_back_and_deleting_one_is_first(storage: Storage) -> None:
    for _ in range(20):
        await storage.blobs.put(CONTENT)
        await storage.care.move(DIGEST, SHELF, TRASH)
        found, _ = await asyncio.gather(storage.other_blobs.stat(DIGEST), destroy(storage, TRASH))
        there = await storage.blobs.stat(DIGEST)
        assert (found is None) == (there is None)


async def test_what_is_in_quarantine_is_not_there_until_it_is_stored_again(storage: Storage) -> None:
    await storage.blobs.put(CONTENT)
    assert await storage.care.move(DIGEST, SHELF, QUARANTINE)
    assert await storage.blobs.stat(DIGEST) is None
    assert await held(storage, QUARANTINE) == [DIGEST]
    session = await storage.blobs.begin()
    await storage.blobs.write(session, 0, chunks(CONTENT))
    await storage.blobs.finish(session, DIGEST)
    assert (await held(storage, SHELF), await held(storage, QUARANTINE)) == ([DIGEST], [])


@pytest.mark.parametrize("past_cache", [False, True])
async def test_bytes_are_read_in_pieces(storage: Storage, past_cache: bool) -> None:
    content = CONTENT * 5
    digest = (await storage.blobs.put(content)).digest
    assert b"".join([piece async for piece in storage.care.read(digest, past_cache=past_cache)]) == content
    with pytest.raises(FileNotFoundError):
        _ = [piece async for piece in storage.care.read(NEVER)]


async def test_sessions_in_which_nothing_moves_expire(storage: Storage) -> None:
    session = await storage.blobs.begin()
    await storage.blobs.write(session, 0, chunks(b"12345"))
    now_s = await storage.care.clock_s()
    assert await storage.care.expire(now_s - 60) == []
    (leftover,) = await storage.care.expire(now_s + 60, dry_run=True)
    assert leftover.size_bytes >= 5
    assert await storage.blobs.offset(session) == 5
    assert len(await storage.care.expire(now_s + 60)) == 1
    with pytest.raises(blobs.NoSession):
        await storage.other_blobs.offset(session)
    assert left(storage) == []


async def test_a_session_that_expires_under_an_upload(storage: Storage) -> None:
    for moment in ("while it is written", "before it is finished"):
        session = await storage.blobs.begin()

        async def body(moment: str = moment) -> AsyncIterator[bytes]:
            yield CONTENT
            if moment == "while it is written":
                await storage.care.expire(await storage.care.clock_s() + 60)

        with pytest.raises(blobs.NoSession):
            await storage.blobs.write(session, 0, body())
            await storage.care.expire(await storage.care.clock_s() + 60)
            await storage.blobs.finish(session, DIGEST)
    assert left(storage) == []
    assert await storage.blobs.stat(DIGEST) is None


async def test_notes_are_seen_by_all(storage: Storage) -> None:
    assert await storage.care.notes("scrub-") == {}
    for content in (b"old", b"new"):
        await storage.care.note("scrub-00", content)
    await storage.care.note("gc", b"x")
    (note,) = (await storage.care.notes("scrub-")).values()
    assert note.content == b"new"
    assert abs(note.at_s - await storage.care.clock_s()) < 30


async def test_all_logs_and_grants(storage: Storage) -> None:
    for name in ("a", "a/b", "templates/x", "_names/" + "0" * 64):
        await storage.logs.append(name, 0, b"e")
    await storage.logs.grant("only/grants", DIGEST)
    assert sorted(await storage.log_care.logs()) == ["_names/" + "0" * 64, "a", "a/b", "only/grants", "templates/x"]
    assert list(await storage.log_care.grants("only/grants")) == [DIGEST]
    assert await storage.log_care.grants("a") == {}
    assert list(await storage.log_care.numbers("never")) == []
    await storage.logs.append("a", 1, b"f")
    assert sorted(await storage.log_care.numbers("a")) == [0, 1]
