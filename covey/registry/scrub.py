"""The scrub: reads every blob again, slowly, and takes out of service what went bad (safety S32).

    read → right: next    wrong → read past the page cache → right: the memory lied, nothing is done
                                                           → wrong again: to quarantine → fetched from elsewhere

Servers of one storage share one note that says how far it has come: whoever finds it old goes on from there, so that
the work is done about once, goes on when a server dies, and needs no lock. A damaged blob is answered as missing, so
the next push of it heals it, and `Elsewhere` may bring it before that.
"""

import asyncio
import hashlib
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Protocol

import msgspec

from covey import durable, model, observe, world
from covey.registry import blobs, sweep

log = observe.log("scrub")

NOTE = "scrub"
_TAKE_OVER_S = 600.0  # a server that has not told how far it is for so long has stopped
_TELL_S = 30.0
Place = blobs.Place


class Progress(model.Noun, frozen=True, kw_only=True):
    """How far the scrub of this storage is. `after` is the last digest read; `ended_s` when everything was."""

    begun_s: float = 0.0
    after: str = ""
    ended_s: float = 0.0
    last_s: float = 0.0  # when the one before this ended
    blobs: int = 0
    bytes: int = 0
    damaged: tuple[model.Digest, ...] = ()


class Elsewhere(Protocol):
    """Where a blob that is lost here may still be."""

    async def fetch(self, repository: str, digest: model.Digest) -> bool:
        """Bring it, verified, into this storage; False when nobody has it."""
        ...


class Nowhere:
    """No other registry."""

    async def fetch(self, _repository: str, _digest: model.Digest) -> bool:
        return False


class Scrub:
    """Reads what lies on the shelf of one storage."""

    def __init__(
        self,
        collector: sweep.Collector,
        care: blobs.Care,
        world: world.World,
        *,
        bytes_per_s: float = 0.0,
        elsewhere: Elsewhere | None = None,
    ) -> None:
        """`bytes_per_s` 0: as fast as it goes."""
        self._collector = collector
        self._care = care
        self._world = world
        self._bytes_per_s = bytes_per_s
        self._elsewhere = elsewhere or Nowhere()

    async def progress(self) -> tuple[Progress, float]:
        """How far it is, and how long ago that was told; when nobody ever has, for ever ago."""
        note = (await self._care.notes(NOTE)).get(NOTE)
        if note is None:
            return Progress(), float("inf")
        try:
            told = msgspec.json.decode(note.content, type=Progress)
        except (msgspec.MsgspecError, UnicodeDecodeError):
            told = Progress()
        return told, await self._care.clock_s() - note.at_s

    async def due(self, every_s: float) -> bool:
        """Whether there is something to do that no other server is doing."""
        told, silent_s = await self.progress()
        return silent_s >= (every_s if told.ended_s else _TAKE_OVER_S)

    async def run(self, *, anew: bool = False, on_blob: Callable[[Progress], None] | None = None) -> Progress:
        """Read everything, from where an unfinished scrub stopped, unless `anew`."""
        told, _ = await self.progress()
        if anew or told.ended_s or not told.begun_s:
            told = Progress(begun_s=await self._care.clock_s(), last_s=told.ended_s or told.last_s)
        await self._tell(told)
        digests = sorted([held.digest async for held in self._care.held(Place.SHELF)])
        said_ns = self._world.boot_ns()
        for digest in digests:
            if digest <= told.after:
                continue
            size, damaged = await self._one(digest)
            told = msgspec.structs.replace(
                told,
                after=digest,
                blobs=told.blobs + 1,
                bytes=told.bytes + size,
                damaged=(*told.damaged, digest) if damaged else told.damaged,
            )
            if on_blob is not None:
                on_blob(told)
            if self._world.boot_ns() - said_ns > _TELL_S * 1e9:
                said_ns = self._world.boot_ns()
                await self._tell(told)
        told = msgspec.structs.replace(told, ended_s=await self._care.clock_s())
        await self._tell(told)
        log.info("all blobs were read", blobs=told.blobs, bytes=told.bytes, damaged=len(told.damaged))
        return told

    async def _tell(self, told: Progress) -> None:
        try:
            await self._care.note(NOTE, msgspec.json.encode(told))
        except OSError as error:
            if error.errno not in durable.NO_ROOM:
                raise

    async def _one(self, digest: model.Digest) -> tuple[int, bool]:
        """Read one blob; its size, and whether it was put in quarantine. One that is gone meanwhile is no trouble."""
        size, found = await self._read(digest, past_cache=False)
        if found in (digest, ""):
            return size, False
        _, again = await self._read(digest, past_cache=True)
        if again in (digest, ""):
            log.warning("memory held wrong bytes of a blob, the disk holds the right ones", digest=digest)
            return size, False
        await self._care.move(digest, Place.SHELF, Place.QUARANTINE)
        log.error("a blob is damaged and was put in quarantine; push it again", digest=digest, found=again)
        return size, True

    async def _read(self, digest: model.Digest, *, past_cache: bool) -> tuple[int, str]:
        """A blob's size and digest as they are read; no digest when it is not there. What the disk cannot read is
        wrong."""
        try:
            return await measure(self._care.read(digest, past_cache=past_cache), digest, self._pace)
        except FileNotFoundError:
            return 0, ""
        except OSError as error:
            return 0, f"unreadable: {error.strerror}"

    async def _pace(self, size: int) -> None:
        if self._bytes_per_s:
            await asyncio.sleep(size / self._bytes_per_s)

    # ---- healing ---------------------------------------------------------------------------------------------------

    async def heal(self) -> Sequence[model.Digest]:
        """Fetch what lies in quarantine and is needed; what came."""
        lost = [held.digest async for held in self._care.held(Place.QUARANTINE)]
        if not lost or isinstance(self._elsewhere, Nowhere):
            return ()
        needed = (await self._collector.needed()).by_repository
        healed = []
        for digest in lost:
            for repository in (name for name, digests in needed.items() if digest in digests):
                if await self._elsewhere.fetch(repository, digest):
                    log.info("a damaged blob was fetched again", digest=digest, repository=repository)
                    healed.append(digest)
                    break
        return healed


async def measure(
    pieces: AsyncIterator[bytes], digest: model.Digest, pace: Callable[[int], Awaitable[None]] | None = None
) -> tuple[int, str]:
    """The size of `pieces` and their digest, by the algorithm of `digest`."""
    algorithm = digest.partition(":")[0]
    found = hashlib.new(algorithm)
    size = 0
    async for piece in pieces:
        await asyncio.to_thread(found.update, piece)
        size += len(piece)
        if pace is not None:
            await pace(len(piece))
    return size, f"{algorithm}:{found.hexdigest()}"
