"""What every `Blobs` and `Logs` must do. An implementation is added to `STORAGES`, nothing else."""

import asyncio
import itertools
import re
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from covey import failpoint, model, world
from covey.client import oci
from covey.registry import blobs, disk, journal

CONTENT = bytes(range(256)) * 5000
DIGEST = oci.digest_of(CONTENT)
NEVER = model.Digest("sha256:" + "0" * 64)


class Storage(NamedTuple):
    """One place to keep bytes, seen by two servers."""

    blobs: blobs.Blobs
    logs: blobs.Logs
    other_blobs: blobs.Blobs
    other_logs: blobs.Logs
    base: Path


@pytest.fixture(params=["disk"])
def storage(tmp_path: Path) -> Iterator[Storage]:
    one, two = (disk.Disk(tmp_path, world.System()) for _ in range(2))
    log_one, log_two = (journal.Journal(tmp_path, world.System()) for _ in range(2))
    yield Storage(one, log_one, two, log_two, tmp_path)
    failpoint.arm("")
    for close in (one.close, two.close, log_one.close, log_two.close):
        close()


async def chunks(*pieces: bytes, cut: bool = False) -> AsyncIterator[bytes]:
    for piece in pieces:
        yield piece
    if cut:
        raise blobs.Cut("the client has gone")


def left(storage: Storage) -> list[str]:
    """Files below uploads/ and aside/."""
    return [str(path) for folder in ("uploads", "aside") for path in (storage.base / folder).rglob("*")]


async def test_a_small_blob_is_stored_whole_and_again(storage: Storage) -> None:
    for place in (storage.blobs, storage.other_blobs):
        blob = await place.put(CONTENT)
        assert (blob.digest, blob.size_bytes, blob.path.read_bytes()) == (DIGEST, len(CONTENT), CONTENT)
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
    assert blob.path.read_bytes() == CONTENT
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
    assert storage.base.exists()


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


def test_the_layout_in_the_docstring_names_what_is_made(storage: Storage) -> None:
    drawn = set(re.findall(r"^ {4}[│ ]*[├└]── (\w+)", blobs.__doc__ or "", re.MULTILINE))
    assert {path.name for path in storage.base.iterdir()} <= drawn


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
        data = [path for path in storage.base.glob(f"uploads/{session}/data.*") if path.stat().st_size]
        assert len(data) == (offset > 0)
        await storage.blobs.write(session, offset, chunks(content[offset:]))
        blob = await storage.blobs.finish(session, oci.digest_of(content))
        assert blob.size_bytes == len(content)
        await storage.blobs.abort(session)
