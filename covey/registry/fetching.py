"""Blobs come from a peer, one writer each, and may be read while they come (safety S36).

A fetch goes on where an earlier one, of whatever process, stood; asks the holder first and then every other peer; and
makes a blob only of bytes that have its digest. Of the processes of one server the one that holds the lock of a partial
file writes; the others wait for the blob to appear, and take over when the writer dies.

`tail` reads along: what is here is passed on at once, but the last `HELD_BACK` bytes only when the digest is right. A
client of bytes that turn out wrong sees its connection break; it never has a whole blob of them.

Where the disk is full a fetch ends before it has used the storage's reserve, and what has come stays for the next one.
Who reads along then gets the rest as a peer sends it, verified in the same way; nothing is kept of it.
"""

import asyncio
import hashlib
import os
from collections.abc import AsyncIterator, Callable, Mapping, Sequence

from covey import errors, model, observe
from covey.client import oci
from covey.registry import blobs, peers, replica_disk

log = observe.log("replica")

HELD_BACK = 64 << 10
_BATCH = 2 << 20
_LOOK_S = 0.02
_ROOM_EVERY = 64 << 20


class Fetching:
    """Any number of fetches at once. `first`: the URL of the peer that is asked first. `close` at the end."""

    def __init__(
        self,
        content: blobs.Blobs,
        held: replica_disk.ReplicaDisk,
        others: Mapping[str, peers.Peer],
        first: Callable[[], str],
    ) -> None:
        self._content = content
        self._held = held
        self._others = others
        self._first = first
        self._running: dict[model.Digest, asyncio.Task[None]] = {}
        self._left: dict[model.Digest, int] = {}  # what is still to come of each that is received now
        self.fetched_bytes = 0  # by this process
        self.rejected = 0  # blobs whose bytes were not what their digest says

    async def close(self) -> None:
        running = list(self._running.values())
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)

    def order(self) -> Sequence[peers.Peer]:
        """Peers as they are asked."""
        first = self._first()
        return sorted(self._others.values(), key=lambda peer: peer.url != first)

    async def fetch(self, digest: model.Digest) -> None:
        """Have the blob here, whole and right. Raises NotFound when no peer has it, RemoteError when one may have it
        and cannot be asked, DiskFull. Goes on when its caller is gone."""
        await asyncio.shield(self._begin(digest))

    def _begin(self, digest: model.Digest) -> "asyncio.Task[None]":
        task = self._running.get(digest)
        if task is None:
            task = self._running[digest] = asyncio.create_task(self._run(digest))
            task.add_done_callback(lambda done: self._ended(digest, done))
        return task

    def _ended(self, digest: model.Digest, task: "asyncio.Task[None]") -> None:
        self._running.pop(digest, None)
        if not task.cancelled():
            task.exception()  # whoever waits has it

    async def size_bytes(self, digest: model.Digest) -> int:
        """Of a blob that some peer has. Raises as `fetch` does."""
        faults: list[errors.CoveyError] = []
        for peer in self.order():
            try:
                return await peer.size_bytes(digest)
            except errors.NotFound as error:
                faults.append(error)
            except errors.RemoteError as error:
                text = str(error)
                faults.append(error if peer.url in text else errors.RemoteError(f"{peer.url}: {text}"))
        raise worst(faults, digest)

    # ---- one fetch -------------------------------------------------------------------------------------------------

    async def _run(self, digest: model.Digest) -> None:
        while await self._content.stat(digest) is None:
            partial = await self._held.take(digest)
            if partial is None:
                await asyncio.sleep(_LOOK_S)
                continue
            try:
                await self._fill(partial)
            finally:
                await asyncio.shield(self._held.run(partial.close))
        if digest in await self._held.on_their_way():
            await self._held.give_up(digest)

    async def _fill(self, partial: replica_disk.Partial) -> None:
        """Fetch the rest, verify the whole, publish it. Raises as `fetch` does."""
        await self._all_peers(partial)
        found = await self._held.run(partial.found)
        if found == partial.digest:
            await self._held.publish(partial)
            return
        self.rejected += 1
        log.warning("the bytes fetched for a blob were wrong and are thrown away", digest=partial.digest, found=found)
        await self._held.run(partial.discard)
        if not partial.resumed_bytes:
            raise errors.RemoteError(f"peers sent {found} for {partial.digest}")

    async def _all_peers(self, partial: replica_disk.Partial) -> None:
        faults: list[errors.CoveyError] = []
        for peer in self.order():
            try:
                await self._one_peer(peer, partial)
                return
            except (errors.RemoteError, errors.NotFound) as error:
                faults.append(error)
        raise worst(faults, partial.digest)

    async def _one_peer(self, peer: peers.Peer, partial: replica_disk.Partial) -> None:
        """The rest of a blob from one peer, as long as it moves."""
        while True:
            before = partial.size_bytes
            try:
                await self._once(peer, partial)
                return
            except errors.RemoteError:
                if partial.size_bytes == before:
                    raise

    async def _once(self, peer: peers.Peer, partial: replica_disk.Partial) -> None:
        if partial.size_bytes and await peer.size_bytes(partial.digest) <= partial.size_bytes:
            return
        async with peer.open(partial.digest, partial.size_bytes) as source:
            self._left[partial.digest] = source.size_bytes - partial.size_bytes
            try:
                await self._check_room(partial.digest)
                await self._receive(source, partial)
            finally:
                del self._left[partial.digest]
            if partial.size_bytes < source.size_bytes:
                raise errors.RemoteError(f"{peer.url}: {partial.digest} ended at {partial.size_bytes}")

    async def _receive(self, source: peers.Source, partial: replica_disk.Partial) -> None:
        """Bytes from the network to a thread: what comes while one batch is written and hashed is the next one."""
        writing: asyncio.Future[None] | None = None
        batch: list[bytes] = []
        size = 0
        until_look = _ROOM_EVERY
        try:
            async for piece in source.pieces():
                until_look -= len(piece)
                if until_look < 0:  # others write to this disk too
                    until_look = _ROOM_EVERY
                    await self._check_room(partial.digest)
                batch.append(piece)
                size += len(piece)
                self.fetched_bytes += len(piece)
                if writing is not None and not writing.done() and size < _BATCH:
                    continue
                if writing is not None:
                    await writing
                writing, batch, size = asyncio.ensure_future(self._write(partial, batch)), [], 0
        finally:
            if writing is not None:
                await writing
            if batch:
                await self._write(partial, batch)

    async def _write(self, partial: replica_disk.Partial, batch: list[bytes]) -> None:
        await self._held.run(lambda: partial.add(batch))
        self._left[partial.digest] -= sum(map(len, batch))

    async def _check_room(self, digest: model.Digest) -> None:
        """Raises DiskFull when the rest of a blob does not fit beside those that come at the same time. What is small
        may use the reserve: a template can be started without its layers here, but not without its manifest."""
        left = self._left[digest]
        if left > HELD_BACK and (await self._content.space()).free_bytes < sum(self._left.values()):
            size = f"{left >> 20} MiB" if left >> 20 else f"{left >> 10} KiB"
            raise blobs.DiskFull(
                f"the registry's disk is full: {size} of a blob do not fit; it is fetched when they do"
            )

    # ---- reading along ---------------------------------------------------------------------------------------------

    async def tail(self, digest: model.Digest, size_bytes: int) -> AsyncIterator[bytes]:
        """The blob's bytes while it comes. Raises ConnectionResetError when they turn out wrong or cannot be had."""
        task = self._begin(digest)
        handle = await self._opened(digest, task)
        try:
            place, verified = 0, False
            while place < size_bytes:
                here = os.fstat(handle).st_size
                limit = size_bytes if verified else min(here, size_bytes - HELD_BACK)
                if place < limit:
                    piece = await self._held.run(lambda: os.pread(handle, min(_BATCH, limit - place), place))  # noqa: B023
                    if not piece:
                        raise ConnectionResetError("the blob became shorter while it was sent")
                    place += len(piece)
                    yield piece
                elif (blob := await self._content.stat(digest)) is not None:
                    verified = _is_of(handle, blob)
                elif task.done():
                    if not _had_no_room(task):
                        raise ConnectionResetError(f"{digest} could not be fetched to its end")
                    async for piece in self._through(digest, size_bytes, handle, place):
                        yield piece
                    return
                else:
                    await asyncio.wait([task], timeout=_LOOK_S)
        finally:
            os.close(handle)

    async def _through(self, digest: model.Digest, size_bytes: int, handle: int, place: int) -> AsyncIterator[bytes]:
        """The rest of a blob as a peer sends it. `handle`: where its first bytes are, which were sent from there."""
        hashed = hashlib.new(oci.algorithm_of(digest))
        for start in range(0, place, _BATCH):
            hashed.update(await self._held.run(lambda: os.pread(handle, min(_BATCH, place - start), start)))  # noqa: B023
        held = bytearray()
        async for piece in self.part(digest, place, size_bytes):
            hashed.update(piece)
            held += piece
            if len(held) > 2 * HELD_BACK:
                yield bytes(held[:-HELD_BACK])
                del held[:-HELD_BACK]
        if f"{oci.algorithm_of(digest)}:{hashed.hexdigest()}" != digest:
            self.rejected += 1
            raise ConnectionResetError(f"the bytes that peers sent are not those of {digest}")
        yield bytes(held)

    async def _opened(self, digest: model.Digest, task: "asyncio.Task[None]") -> int:
        """What is read: the partial file, or the blob if that was sooner there."""
        while True:
            handle = await self._held.run(lambda: self._held.look(digest))
            if handle is not None:
                return handle
            blob = await self._content.stat(digest)
            if blob is not None and blob.path is not None:
                return os.open(blob.path, os.O_RDONLY | os.O_CLOEXEC)
            if task.done():
                raise ConnectionResetError(f"{digest} could not be fetched")
            await asyncio.wait([task], timeout=_LOOK_S)

    async def part(self, digest: model.Digest, start: int, end: int) -> AsyncIterator[bytes]:
        """A range of a blob that is not here, from a peer that has all of it verified."""
        for peer in self.order():
            place = start
            try:
                async with peer.open(digest, start, end) as source:
                    async for piece in source.pieces():
                        place += len(piece)
                        yield piece
                return
            except (errors.RemoteError, errors.NotFound) as error:
                if place != start:
                    raise ConnectionResetError(str(error)) from error
        raise ConnectionResetError(f"no peer sends {digest}")


def worst(faults: Sequence[errors.CoveyError], digest: str) -> errors.CoveyError:
    """What to say when no peer gave a blob: that nobody has it, only if everybody said so."""
    unsure = [fault for fault in faults if not isinstance(fault, errors.NotFound)]
    if unsure:
        return errors.RemoteError("; ".join(str(fault) for fault in unsure))
    return errors.NotFound(f"no other registry of the set has blob {digest}")


def _had_no_room(task: "asyncio.Task[None]") -> bool:
    return not task.cancelled() and isinstance(task.exception(), blobs.DiskFull)


def _is_of(handle: int, blob: blobs.Blob) -> bool:
    """Whether what was read is this very blob. Raises ConnectionResetError when other bytes were published."""
    if blob.path is not None and os.stat(blob.path).st_ino == os.fstat(handle).st_ino:
        return True
    raise ConnectionResetError("the bytes that were sent are not those of the blob")
