"""One blob comes down: several ranges at once, each going on where it stood, at another server if need be.

The bytes gather in a partial file (`partial`), and are hashed in order while they arrive. Only what is whole and has
the right digest is given its name; a packed layer is unpacked meanwhile, and what is inside is verified as well
(promise I8). What an earlier call left is continued; should the whole be wrong then, it is fetched anew once, since the
fault may have been on this disk. Memory: one piece per range.

Others than the registry may help (`Near`): each range is first asked of them, and what they do not send comes from the
registry. They read along in the partial file, too. Should the whole be wrong then, it is fetched anew without them.
"""

import asyncio
import contextlib
import re
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from pathlib import Path
from typing import Protocol

from covey import errors
from covey.client import line, long_work, oci, packing, partial

Progress = Callable[[int], None]  # called with the bytes of the blob that are here, and those unpacked

STREAMS = 4
RANGE_BYTES = 32 << 20  # of one request: bounds what waits behind a slow one at the end
_BATCH = 1 << 20
_NEAR_BATCH = 256 << 10  # where others read along: what waits for a batch to fill comes later to all of them
_TOTAL = re.compile(r"bytes (\d+)-(\d+)/(\d+)")


class Anew(Exception):
    """What came of a blob is known to be wrong: it has to be begun anew."""


class Near(Protocol):
    """Others that have a blob, or fetch it too. One for each blob that comes."""

    @property
    def alone(self) -> bool:
        """The registry has no such blob."""
        ...

    def begins(self, part: partial.Partial) -> None:
        """The blob gathers in this file from now on. Called again when it is begun anew."""
        ...

    def pieces(self, start: int, end: int) -> AsyncGenerator[bytes, None]:
        """What of this range others send, in order from `start` on. It ends early when nobody goes on. Raises Anew
        when they say that what they sent before was wrong."""
        ...

    def right(self) -> None:
        """All of the file is here, and has its digest."""
        ...

    def wrong(self) -> bool:
        """The digest is another one: whether others had a part in it. They are not asked again."""
        ...


class Pull:
    """Fetches blobs of one registry. `streams` requests at once per blob."""

    def __init__(
        self,
        line: line.Line,
        *,
        streams: int = STREAMS,
        range_bytes: int = RANGE_BYTES,
        sync_bytes: int = partial.SYNC_BYTES,
    ) -> None:
        self._line = line
        self._streams = streams
        self._range_bytes = range_bytes
        self._sync_bytes = sync_bytes
        self._batch_bytes = min(_BATCH, sync_bytes)

    async def fetch(
        self,
        repository: str,
        digest: str,
        size_bytes: int,
        target: Path,
        *,
        plain: tuple[str, int] | None = None,
        progress: Progress | None = None,
        near: Near | None = None,
    ) -> bool:
        """Download a blob to `target`, which appears only when it is whole, verified and durable. False when that was
        so already. `plain`: the blob is packed, and `target` is to be this digest with so many bytes. One call per
        target at a time. `near`: who else may have it. Raises RemoteError, OSError (disk full), `packing.Damaged`, and
        NotFound when only others may have it and do not."""
        path = target.with_name(target.name + ".part")
        if await long_work.run(lambda moved: _is_right(target, *(plain or (digest, size_bytes)), moved)):
            await asyncio.to_thread(partial.discard, path)  # a kill may have left it
            return False
        into = None if plain is None else target.with_name(target.name + ".unpacked")
        coming = _Coming(digest, size_bytes, path, into, plain or ("", 0), progress, self._batch_bytes, near)
        while not await self._whole(repository, coming):
            pass
        await asyncio.to_thread(partial.reveal, into or path, target)
        await asyncio.to_thread(partial.discard, path)
        return True

    async def _whole(self, repository: str, coming: "_Coming") -> bool:
        """Whether everything is whole and right now; else it is gone. Raises RemoteError when it was fetched from the
        beginning and is wrong, and Damaged."""
        await asyncio.to_thread(coming.open, self._sync_bytes)
        try:
            if coming.near is not None:
                coming.near.begins(coming.part)
            await self._all_ranges(f"/v2/{repository}/blobs/{coming.digest}", coming)
            found = await long_work.run(lambda moved: coming.part.found(), coming.progress)
            if found == coming.digest:
                if coming.near is not None:
                    coming.near.right()
                await long_work.run(lambda moved: coming.finish(), coming.progress)
        except Anew:
            await asyncio.to_thread(coming.discard)
            return False
        except packing.Damaged:
            await asyncio.to_thread(coming.discard)
            raise
        finally:
            await asyncio.shield(asyncio.to_thread(coming.close))
        if found == coming.digest:
            return True
        await asyncio.to_thread(coming.discard)
        shared = coming.near is not None and coming.near.wrong()
        if shared or coming.part.resumed_bytes:
            return False
        raise errors.RemoteError(f"the registry sent {found} for {coming.digest}")

    async def _all_ranges(self, path: str, coming: "_Coming") -> None:
        """Fetch what is missing. The first fault that is not repaired ends all of it."""
        streams = min(self._streams, -(-coming.size_bytes // self._range_bytes))
        hashing = asyncio.create_task(_hash_along(coming))
        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(streams):
                    group.create_task(self._ranges(path, coming))
        except ExceptionGroup as faults:
            raise faults.exceptions[0] from None
        finally:
            hashing.cancel()
            await asyncio.gather(hashing, return_exceptions=True)

    async def _ranges(self, path: str, coming: "_Coming") -> None:
        while (span := coming.part.take(self._range_bytes)) is not None:
            standing, silence = _Standing(*span), line.Silence()
            if coming.near is not None:
                await _from_others(coming.near, coming, standing)
                if standing.start == standing.end:
                    continue
                if coming.near.alone:
                    raise errors.NotFound(f"nobody else sends {coming.digest}")

            async def once(standing: _Standing = standing, silence: line.Silence = silence) -> None:
                with silence.measured(lambda: standing.start) as quiet_s:
                    await self._one_range(path, coming, standing, quiet_s)

            await self._line.persist(once, lambda: coming.part.here_bytes)

    async def _one_range(self, path: str, coming: "_Coming", standing: "_Standing", quiet_s: float) -> None:
        """Go on with one range to its end, or raise."""
        whole = standing.start == 0 and standing.end == coming.size_bytes
        headers = {} if whole else {"Range": f"bytes={standing.start}-{standing.end - 1}"}
        async with self._line.open("GET", path, headers=headers, quiet_s=quiet_s) as answer:
            _check_size(answer.status, answer.headers.get("Content-Range", ""), answer.content_length, coming, standing)
            await _gather(line.pieces(answer), coming, standing)
        if standing.start != standing.end:
            raise errors.RemoteError(f"{coming.digest} ended at {standing.start} of {standing.end} bytes")


class _Standing:
    """What of one range is still to come."""

    __slots__ = ("end", "start")

    def __init__(self, start: int, end: int) -> None:
        self.start = start
        self.end = end


class _Coming:
    """A blob on its way: the partial file, and what it is unpacked to, if it is packed. Blocking."""

    def __init__(
        self,
        digest: str,
        size_bytes: int,
        path: Path,
        into: Path | None,
        plain: tuple[str, int],
        progress: Progress | None,
        batch_bytes: int,
        near: Near | None,
    ) -> None:
        self.digest, self.size_bytes = digest, size_bytes
        self._path, self._into, self._plain = path, into, plain
        self._told = progress
        self.near = near
        self.batch_bytes = batch_bytes if near is None else min(batch_bytes, _NEAR_BATCH)
        self._unpacker: packing.Unpacker | None = None
        self.part: partial.Partial

    def open(self, sync_bytes: int) -> None:
        if self._into is not None:
            self._unpacker = packing.Unpacker(self._into, *self._plain)
        feed = (lambda chunk: None) if self._unpacker is None else self._unpacker.feed
        try:
            self.part = partial.Partial(self._path, self.digest, self.size_bytes, sync_bytes=sync_bytes, pass_on=feed)
        except BaseException:
            self.close()
            raise

    def progress(self, _: int = 0) -> None:
        if self._told is not None:
            self._told(self.part.here_bytes + (self._unpacker.done_bytes if self._unpacker else 0))

    def finish(self) -> None:
        """The blob is the right one: what is in it is to be right and durable too. Raises Damaged."""
        if self._unpacker is not None:
            self._unpacker.finish()

    def close(self) -> None:
        if hasattr(self, "part"):
            self.part.close()
        if self._unpacker is not None:
            self._unpacker.close()

    def discard(self) -> None:
        self.close()
        partial.discard(self._path)
        if self._into is not None:
            partial.discard(self._into)


async def _from_others(near: Near, coming: _Coming, standing: _Standing) -> None:
    """What of one range others send."""
    async with contextlib.aclosing(near.pieces(standing.start, standing.end)) as chunks:
        await _gather(chunks, coming, standing)


async def _gather(chunks: AsyncIterator[bytes], coming: _Coming, standing: _Standing) -> None:
    """Write what comes of one range, in batches. Raises RemoteError when it is more than the range."""
    batch = bytearray()
    try:
        async for chunk in chunks:
            if standing.start + len(batch) + len(chunk) > standing.end:
                raise errors.RemoteError(_longer(coming))
            batch += chunk
            if len(batch) >= coming.batch_bytes:
                await _write(coming, standing, bytes(batch))
                batch.clear()
    finally:
        if batch:
            await asyncio.shield(_write(coming, standing, bytes(batch)))


async def _write(coming: _Coming, standing: _Standing, batch: bytes) -> None:
    await asyncio.to_thread(coming.part.write, standing.start, batch)
    standing.start += len(batch)
    coming.progress()


async def _hash_along(coming: _Coming) -> None:
    """Hash and unpack while the rest comes, so that little is left to do at the end."""
    while True:
        await asyncio.to_thread(coming.part.hash_on)
        coming.progress()
        await asyncio.sleep(0.05)


def _check_size(status: int, said: str, length: int | None, coming: _Coming, standing: _Standing) -> None:
    """The server sends the range that was asked for, of a blob of the right size. Raises RemoteError."""
    if status == 206:
        found = _TOTAL.fullmatch(said)
        if found is None or (int(found[1]), int(found[2])) != (standing.start, standing.end - 1):
            raise errors.RemoteError(f"{coming.digest}: the server sent the range {said!r}, which was not asked for")
        total: int | None = int(found[3])
    else:
        if standing.start or standing.end != coming.size_bytes:
            raise errors.RemoteError(f"{coming.digest}: the server does not send ranges", status)
        total = length
    if total is not None and total > coming.size_bytes:
        raise errors.RemoteError(_longer(coming))
    if total is not None and total < coming.size_bytes:
        raise errors.RemoteError(f"{coming.digest} has {total} bytes, its manifest says {coming.size_bytes}")


def _longer(coming: _Coming) -> str:
    return f"{coming.digest} is longer than the {coming.size_bytes} bytes of its manifest"


def _is_right(path: Path, digest: str, size_bytes: int, moved: long_work.Moved) -> bool:
    """Whether a file is there, and is what it should be."""
    if not path.is_file() or path.stat().st_size != size_bytes:
        return False
    return packing.hash_file(path, oci.algorithm_of(digest), moved)[0] == digest
