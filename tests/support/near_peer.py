"""A peer in this process, without a network: `peers.Peer` over another server's own parts, with knobs for trouble.

far = near_peer.Near("http://far", feed, content)
far.away = True                  # it does not answer
far.cut_after = 100_000          # the next blob breaks off there, once
far.lies = True                  # it sends wrong bytes
far.lacks.add(digest)            # it has that blob not
far.gate = asyncio.Event()       # blobs wait there for each piece beyond the first
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator

from covey import errors, model
from covey.registry import blobs, feed, peers

PIECE = 100_000


class Near:
    """`peers.Peer`"""

    def __init__(self, url: str, told: feed.Feed, content: blobs.Blobs) -> None:
        self.url = url
        self.away = False
        self.cut_after: int | None = None
        self.lies = False
        self.lacks: set[str] = set()
        self.gate: asyncio.Event | None = None
        self.sent_bytes = 0
        self.asked: list[str] = []
        self._feed = told
        self._content = content

    def _ask(self, what: str) -> None:
        self.asked.append(what)
        if self.away:
            raise errors.RemoteError(f"{self.url} does not answer")

    async def word(self) -> peers.Word:
        self._ask("word")
        return self._feed.word()

    async def feed(self, cursor: str, wait_s: float) -> peers.Feed:
        self._ask("feed")
        return await self._feed.feed(cursor, wait_s, asyncio.Event(), None)

    async def entries(self, log: str, start: int, *, certain: bool = False) -> peers.Part:
        self._ask(f"entries {log} {start}")
        return await self._feed.entries(log, start)

    async def inventory(self) -> peers.Inventory:
        self._ask("inventory")
        return await self._feed.inventory()

    async def size_bytes(self, digest: model.Digest) -> int:
        self._ask(f"size {digest}")
        return (await self._stat(digest)).size_bytes

    async def _stat(self, digest: model.Digest) -> blobs.Blob:
        found = None if digest in self.lacks else await self._content.stat(digest)
        if found is None:
            raise errors.NotFound(f"{self.url} has no blob {digest}")
        return found

    @contextlib.asynccontextmanager
    async def open(self, digest: model.Digest, start: int = 0, end: int | None = None) -> AsyncIterator[peers.Source]:
        self._ask(f"open {digest} {start}")
        blob = await self._stat(digest)
        yield _Near(self, self._content, blob, start, end)


class _Near:
    """`peers.Source`"""

    def __init__(self, peer: Near, content: blobs.Blobs, blob: blobs.Blob, start: int, end: int | None) -> None:
        self.size_bytes = blob.size_bytes
        self._peer = peer
        self._content = content
        self._blob = blob
        self._start, self._end = start, end

    async def pieces(self) -> AsyncIterator[bytes]:
        peer = self._peer
        limit, peer.cut_after = peer.cut_after, None
        sent = 0
        async for whole in self._content.read(self._blob, self._start, self._end):
            for place in range(0, len(whole), PIECE):
                piece = whole[place : place + PIECE]
                if limit is not None and sent + len(piece) > limit:
                    raise errors.RemoteError("the line broke")
                if peer.gate is not None and sent:
                    await peer.gate.wait()
                sent += len(piece)
                peer.sent_bytes += len(piece)
                yield bytes(len(piece)) if peer.lies else piece
