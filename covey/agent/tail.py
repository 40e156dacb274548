"""The last bytes of a stream in a file: grows to twice its limit, then its older half goes (safety S26)."""

import os
from pathlib import Path

KEPT_BYTES = 16 << 20
SENT_BYTES = 64 << 10


class Tail:
    """A file holding the last `kept_bytes` of what was appended. Opened empty."""

    def __init__(self, path: Path, kept_bytes: int = KEPT_BYTES) -> None:
        self._path = path
        self._kept_bytes = kept_bytes
        self._file = path.open("wb+", buffering=0)  # others read it meanwhile

    def append(self, data: bytes) -> None:
        self._file.write(data)
        if self._file.tell() > 2 * self._kept_bytes:
            self._cut()

    def forget(self) -> None:
        """Drop everything: a gap follows."""
        self._file.seek(0)
        self._file.truncate()

    def close(self) -> None:
        if self._file.tell() > self._kept_bytes:
            self._cut()
        self._file.close()

    def _cut(self) -> None:
        self._file.seek(-self._kept_bytes, os.SEEK_END)
        kept = self._file.read()
        self.forget()
        self._file.write(kept)


def last(path: Path, count: int = SENT_BYTES) -> bytes:
    """The last `count` bytes of `path`; nothing when it is not there."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - count))
            return file.read()
    except FileNotFoundError:
        return b""
