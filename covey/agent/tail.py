"""The last bytes of a stream in a file: grows to twice its limit, then its older half goes (safety S26).

    FILE          the last part of the stream
    FILE.from     how many bytes went before it; not there: none

Whoever reads in the same process sees both as they belong together: neither writing nor reading waits in between.
"""

import contextlib
import os
from pathlib import Path

from covey import model

KEPT_BYTES = 16 << 20
SENT_BYTES = 64 << 10


class Tail:
    """A file holding the last `kept_bytes` of what was appended. Opened empty."""

    def __init__(self, path: Path, kept_bytes: int = KEPT_BYTES) -> None:
        self._path = path
        self._kept_bytes = kept_bytes
        self._begin_at(0)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)  # output may hold secrets
        self._file = os.fdopen(descriptor, "wb+", buffering=0)  # others read it meanwhile

    def append(self, data: bytes) -> None:
        self._file.write(data)
        if self._file.tell() > 2 * self._kept_bytes:
            self._cut()

    def forget(self, start: int) -> None:
        """Drop everything: what follows begins at `start` of the stream."""
        self._file.seek(0)
        self._file.truncate()
        self._begin_at(start)

    def close(self) -> None:
        if self._file.tell() > self._kept_bytes:
            self._cut()
        self._file.close()

    def _cut(self) -> None:
        dropped = self._file.seek(-self._kept_bytes, os.SEEK_END)
        kept = self._file.read()
        self.forget(self._start + dropped)
        self._file.write(kept)

    def _begin_at(self, start: int) -> None:
        self._start = start
        note = _start_file(self._path)
        note.write_text(str(start)) if start else note.unlink(missing_ok=True)


def part(path: Path, offset: int, limit: int) -> model.Output:
    """What is kept from `offset` of the stream on (negative: from its end), at most `limit` bytes; nothing of a file
    that is not there."""
    start = 0
    with contextlib.suppress(FileNotFoundError, ValueError):
        start = int(_start_file(path).read_text())
    try:
        with path.open("rb") as file:
            size = start + file.seek(0, os.SEEK_END)
            offset = min(max(start, offset if offset >= 0 else size + offset), size)
            file.seek(offset - start)
            return model.Output(data=file.read(limit), offset=offset, size=size)
    except FileNotFoundError:
        return model.Output(data=b"", offset=0, size=0)


def _start_file(path: Path) -> Path:
    return path.with_name(path.name + ".from")


def last(path: Path, count: int = SENT_BYTES) -> bytes:
    """The last `count` bytes of `path`; nothing when it is not there."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - count))
            return file.read()
    except FileNotFoundError:
        return b""
