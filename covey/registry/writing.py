"""One part of an upload while it comes in: an exclusive file, its hash, its size. Blocking: for worker threads.

Two ways in, one after the other or by turns:

    add            pieces ──► hashed and written a stride at a time, through the page cache
    write + hash   a room ──► written past the page cache (O_DIRECT), hashed by another thread meanwhile

Past the page cache a layer costs no second copy, and none of the memory in which templates are that are in use: of 4
uploads of 1 GiB at once each took 1.1 s of processor time, 1.8 s through it. What is not whole blocks, the last room,
and everything where the file system has no such way, goes through the cache. Nothing is durable before `seal`.
"""

import errno
import fcntl
import hashlib
import mmap
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from covey import durable, failpoint
from covey.registry import blobs

_STRIDE = 1 << 16  # written and hashed at once: what a processor's nearest cache still holds for the second, and what a
# page cache finds room for at once (of 4 GiB in 256 KiB each the second half cost a guest three times as much)
_BLOCK = (
    mmap.PAGESIZE
)  # what O_DIRECT wants places, sizes and addresses to be whole of (open(2)); no disk has larger ones
_DIRECT: int = getattr(os, "O_DIRECT", 0)  # Linux has it


class Part:
    """`room` raises DiskFull when so many bytes would be too many.

    A request that is cancelled leaves its worker threads in the middle of their work; the lock makes `close` wait for
    what writes, or that would go on writing to a number that may be another file's by then.
    """

    def __init__(self, path: Path, room: Callable[[int], None]) -> None:
        self.path = path
        self.sha256 = hashlib.sha256()
        self.size_bytes = 0
        self.kept = False  # whether its record is in, or may be
        self._room = room
        self._handle = -1
        self._direct = False
        self._lock = threading.Lock()

    def open(self) -> None:
        with self._lock:
            self._handle = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o444)

    def add(self, batch: Sequence[durable.Bytes]) -> None:
        """Write and hash some pieces."""
        size = sum(map(len, batch))
        self._room(size)
        failpoint.reach("registry.part.write")
        with self._lock:
            self._check_open()
            self._go_direct(on=False)
            for stride in _strides(batch):
                durable.write_all(self._handle, *stride)
                for piece in stride:
                    self.sha256.update(piece)
            self.size_bytes += size

    def write(self, content: memoryview) -> None:
        """Write `content`, whose memory begins with a page. Who calls this has `hash` called too."""
        self._room(len(content))
        failpoint.reach("registry.part.write")
        with self._lock:
            self._check_open()
            self._go_direct(on=len(content) % _BLOCK == self.size_bytes % _BLOCK == 0)
            self._write(content)
            self.size_bytes += len(content)

    def hash(self, content: memoryview) -> None:
        """Of one part, one at a time, in order."""
        self.sha256.update(content)

    def seal(self, *, fsync: bool) -> None:
        """Durable and closed: from here on nobody can write to this inode, and it is the session's."""
        with self._lock:
            self._check_open()
            if fsync:
                os.fsync(self._handle)
            os.close(self._handle)
            self._handle = -1
            self.kept = True

    def close(self) -> None:
        """Whatever happened: no handle stays open, and bytes that cannot be recorded any more do not stay."""
        with self._lock:
            if self._handle >= 0:
                os.close(self._handle)
                self._handle = -1
            if not self.kept:
                durable.discard(self.path)

    def _check_open(self) -> None:
        if self._handle < 0:
            raise blobs.Cut("the upload was ended")

    def _write(self, content: memoryview) -> None:
        if self._direct:
            try:
                durable.write_all(self._handle, content)
            except OSError as error:
                if error.errno != errno.EINVAL or os.lseek(self._handle, 0, os.SEEK_CUR) != self.size_bytes:
                    raise
                self._go_direct(on=False)  # it took the flag, but does not mean it
            else:
                return
        for stride in _strides([content]):
            durable.write_all(self._handle, *stride)

    def _go_direct(self, *, on: bool) -> None:
        """Past the page cache, or not; where the file system cannot, always through it."""
        if on == self._direct or not _DIRECT:
            return
        flags = fcntl.fcntl(self._handle, fcntl.F_GETFL)
        try:
            fcntl.fcntl(self._handle, fcntl.F_SETFL, flags | _DIRECT if on else flags & ~_DIRECT)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
        else:
            self._direct = on


def _strides(batch: Sequence[durable.Bytes]) -> Iterator[Sequence[durable.Bytes]]:
    """The same bytes in groups of about `_STRIDE`."""
    group: list[durable.Bytes] = []
    size = 0
    for piece in (memoryview(piece) for piece in batch):
        for start in range(0, len(piece), _STRIDE):
            group.append(piece[start : start + _STRIDE])
            size += len(group[-1])
            if size >= _STRIDE:
                yield group
                group, size = [], 0
    if group:
        yield group
