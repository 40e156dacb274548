"""A blob on its way to this node, which others read along (safety S36).

What is here is passed on at once, whatever range it belongs to, but the last `HELD_BACK` bytes only when the digest is
right: nobody has a whole blob of bytes that nobody verified. Whoever reads verifies all of it again, so a range may go
out before that. Bytes that turn out wrong break the readers' connections.
"""

import asyncio
import os
from collections.abc import AsyncGenerator

from covey.client import partial

HELD_BACK = 64 << 10
PIECE_BYTES = 256 << 10
_LOOK_S = 0.02


class Passing:
    """One try of one blob, named by a token. Its file stays open until `close`: a packed blob has no name any more once
    it is unpacked, and those that read it are to come to its end."""

    def __init__(self, part: partial.Partial, token: str = "") -> None:
        self.token = token
        self.size_bytes = part.size_bytes
        self._part = part
        self._handle = os.open(part.path, os.O_RDONLY | os.O_CLOEXEC)
        self._readers = 0
        self._verified = self._broken = self._closed = False

    @property
    def here_bytes(self) -> int:
        return self.size_bytes if self._verified else self._part.here_bytes

    def verified(self) -> None:
        """All of it is here and right."""
        self._verified = True

    def broken(self) -> None:
        """It ended without being right: readers have nothing more to hope for."""
        self._broken = True
        self.close()

    def close(self) -> None:
        """Nobody else is to begin reading."""
        self._closed = True
        if not self._readers and self._handle >= 0:
            os.close(self._handle)
            self._handle = -1

    async def pieces(self, start: int, end: int) -> AsyncGenerator[bytes, None]:
        """This range while it comes. Raises ConnectionResetError when it does not, or the bytes are wrong."""
        self._readers += 1
        place = start
        try:
            while place < end:
                if self._broken:
                    raise ConnectionResetError("the blob does not come any more")
                limit = min(self._ready(place), end, place + PIECE_BYTES)
                if place >= limit:
                    await asyncio.sleep(_LOOK_S)
                    continue
                piece = await asyncio.to_thread(os.pread, self._handle, limit - place, place)
                if not piece:
                    raise ConnectionResetError("the file became shorter")
                place += len(piece)
                yield piece
        finally:
            self._readers -= 1
            if self._closed:
                self.close()

    def _ready(self, place: int) -> int:
        return self.size_bytes if self._verified else min(self._part.ready(place), self.size_bytes - HELD_BACK)
