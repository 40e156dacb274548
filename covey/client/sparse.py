"""Files with holes: read without touching what was never written, and written without writing zeros.

A hole reads as zeros, so whoever copies a disk image need not move or store them. File systems without holes (or
without SEEK_DATA) are files without holes: the same bytes, only slower. Blocking.
"""

import errno
import os
from collections.abc import Iterator

BLOCK = 64 << 10
_ZEROS = bytes(BLOCK)


def write(handle: int, offset: int, content: bytes) -> None:
    """Write `content` at `offset` of a file that has nothing there yet, but for its blocks of zeros. The file's length
    is the caller's to set."""
    view = memoryview(content)
    start = 0  # of what is not yet written
    for low in range(0, len(content), BLOCK):
        if content[low] == 0 and _is_zero(content[low : low + BLOCK]):
            _write_all(handle, offset + start, view[start:low])
            start = min(low + BLOCK, len(content))
    _write_all(handle, offset + start, view[start:])


def _is_zero(block: bytes) -> bool:
    return block == (_ZEROS if len(block) == BLOCK else _ZEROS[: len(block)])


def _write_all(handle: int, offset: int, view: memoryview) -> None:
    while view:
        taken = os.pwrite(handle, view, offset)
        offset += taken
        view = view[taken:]


def data(handle: int, start: int, end: int) -> Iterator[tuple[int, int]]:
    """The ranges between `start` and `end` that are not holes."""
    while start < end:
        try:
            low = os.lseek(handle, start, os.SEEK_DATA)
            high = os.lseek(handle, low, os.SEEK_HOLE)
        except OSError as error:
            if error.errno == errno.ENXIO:  # only a hole is left
                return
            low, high = start, end
        if low >= end:
            return
        yield low, min(high, end)
        start = high


def pieces(handle: int, start: int, end: int, limit: int) -> Iterator[bytes | memoryview]:
    """The bytes from `start` to `end`, in pieces of at most `limit`; holes are not read. A file that has become shorter
    ends early."""
    zeros = memoryview(bytes(min(limit, max(end - start, 1))))
    for low, high in data(handle, start, end):
        yield from _zeros(zeros, low - start)
        start = low
        while start < high:
            piece = os.pread(handle, min(limit, high - start), start)
            if not piece:
                return
            yield piece
            start += len(piece)
    yield from _zeros(zeros, min(end, os.fstat(handle).st_size) - start)


def _zeros(zeros: memoryview, count: int) -> Iterator[memoryview]:
    while count > 0:
        yield zeros[:count]
        count -= len(zeros)
