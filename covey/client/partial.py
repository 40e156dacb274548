"""A blob on its way into a file: ranges that arrive in any order, and a record of them that outlives a kill.

    <name>.part           the bytes where they belong, of full length from the start; zeros stay holes
    <name>.part.ranges    one line for the blob, then a line "<start> <end>" for each range that is durable

Rules: bytes are synced before a line says that they are here, so also a host that loses power leaves no lie. A torn
line is ignored; a record of another blob is no record. A ``.part`` without a record holds the blob's first bytes, as
older versions left it. Whatever the record says, the digest is computed over what is in the file, from its beginning to
its end, as far as that is here: a damaged partial file is found out when it is whole.

Blocking: used in worker threads only, by several at once.
"""

import contextlib
import hashlib
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from covey import durable
from covey.client import oci, sparse

SYNC_BYTES = 32 << 20  # after so many new bytes they are synced and recorded: bounds what a kill costs
_READ = 1 << 20


class Ranges:
    """A set of half-open ranges of whole numbers, kept sorted and merged."""

    def __init__(self) -> None:
        self._spans: list[tuple[int, int]] = []

    def add(self, start: int, end: int) -> None:
        if start >= end:
            return
        kept = []
        for low, high in self._spans:
            if high < start or low > end:
                kept.append((low, high))
            else:
                start, end = min(start, low), max(end, high)
        self._spans = sorted([*kept, (start, end)])

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return iter(self._spans)

    @property
    def total(self) -> int:
        return sum(end - start for start, end in self._spans)

    def gap(self, limit: int, size: int) -> tuple[int, int] | None:
        """The first range below `size` that is not in the set, at most `limit` long."""
        low, high = 0, size
        for start, end in self._spans:
            if start > low:
                high = min(start, size)
                break
            low = end
        return (low, min(low + limit, high)) if low < high else None

    @property
    def prefix(self) -> int:
        """Where the range that begins at 0 ends."""
        return self._spans[0][1] if self._spans and self._spans[0][0] == 0 else 0


class Partial:
    """One partial file. `close` waits for a `write` whose caller was cancelled, so that the next one to open this file
    finds it at rest."""

    def __init__(
        self,
        path: Path,
        digest: str,
        size_bytes: int,
        *,
        sync_bytes: int = SYNC_BYTES,
        pass_on: Callable[[bytes], None] = lambda chunk: None,
    ) -> None:
        """`pass_on` is given all bytes, in their order, by the thread that hashes them."""
        self.path = path
        self.size_bytes = size_bytes
        self.digest = digest
        self._sync_bytes = sync_bytes
        self._pass_on = pass_on
        self._record = record_of(path)
        self._head = f"covey 1 {digest} {size_bytes}\n"
        self._lock, self._hash_lock = threading.Lock(), threading.Lock()
        self._here, self._taken, self._unsynced = Ranges(), Ranges(), Ranges()
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self._lines = -1
        self._closing = False
        try:
            self._load()
        except BaseException:
            self.close()
            raise
        self.resumed_bytes = self._here.total
        self._hash, self._hashed = hashlib.new(oci.algorithm_of(digest)), 0

    def _load(self) -> None:
        for start, end in self._recorded():
            self._here.add(start, end)
            self._taken.add(start, end)
        lines = "".join(f"{start} {end}\n" for start, end in self._here)
        durable.replace(self._record, (self._head + lines).encode())  # first: a long file without one looks whole
        os.ftruncate(self._file, self.size_bytes)
        self._lines = os.open(self._record, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)

    def _recorded(self) -> Iterator[tuple[int, int]]:
        """What an earlier download left here. What cannot be believed is thrown away."""
        length = os.fstat(self._file).st_size
        try:
            head, *lines = self._record.read_text("ascii", "replace").splitlines(keepends=True)
        except (FileNotFoundError, ValueError):
            if 0 < length <= self.size_bytes:
                yield 0, length
            elif length:
                os.ftruncate(self._file, 0)
            return
        if head != self._head or length != self.size_bytes:
            os.ftruncate(self._file, 0)
            return
        for line in lines:
            start, _, end = line.rstrip("\n").partition(" ")
            if line.endswith("\n") and start.isdigit() and end.isdigit() and int(end) <= self.size_bytes:
                yield int(start), int(end)

    # ---- what arrives ----------------------------------------------------------------------------------------------

    @property
    def here_bytes(self) -> int:
        return self._here.total

    def take(self, limit: int) -> tuple[int, int] | None:
        """The next range that nobody fetches; None when there is none. It is the caller's to fetch."""
        with self._lock:
            found = self._taken.gap(limit, self.size_bytes)
            if found is not None:
                self._taken.add(*found)
            return found

    def ready(self, start: int) -> int:
        """Where what is here from `start` on ends. Waits for nobody: a change makes a new list of spans."""
        return next((high for low, high in self._here if low <= start < high), start)

    def write(self, offset: int, content: bytes) -> None:
        """Put bytes where they belong. Raises OSError (disk full)."""
        with self._lock:
            if self._file < 0:
                return
            sparse.write(self._file, offset, content)
            self._here.add(offset, offset + len(content))
            self._unsynced.add(offset, offset + len(content))
            if self._unsynced.total >= self._sync_bytes:
                self._sync()

    def _sync(self) -> None:
        news, self._unsynced = self._unsynced, Ranges()
        if news.total:
            os.fsync(self._file)
            durable.write_all(self._lines, "".join(f"{start} {end}\n" for start, end in news).encode())

    # ---- what it is ------------------------------------------------------------------------------------------------

    def hash_on(self) -> None:
        """Hash what has become readable from the beginning on, and pass it on."""
        with self._hash_lock:
            while self._hashed < self._here.prefix and not self._closing:
                chunk = os.pread(self._file, min(_READ, self._here.prefix - self._hashed), self._hashed)
                self._hash.update(chunk)
                self._pass_on(chunk)
                self._hashed += len(chunk)

    def found(self) -> str:
        """The digest of the whole file."""
        self.hash_on()
        return f"{self._hash.name}:{self._hash.hexdigest()}"

    def close(self) -> None:
        """Sync what is here and let go of the file."""
        self._closing = True
        with self._lock, self._hash_lock:
            try:
                if self._file >= 0 and self._lines >= 0:
                    self._sync()
            finally:
                for handle in (self._file, self._lines):
                    if handle >= 0:
                        os.close(handle)
                self._file = self._lines = -1

    def discard(self) -> None:
        """Throw away what is here, and its record."""
        self.close()
        discard(self.path)


def reveal(path: Path, target: Path) -> None:
    """Give a whole, durable file its name."""
    path.rename(target)
    durable.discard(record_of(path))
    durable.sync_dir(target.parent)


def record_of(path: Path) -> Path:
    """Where the record of a partial file is."""
    return path.with_name(path.name + ".ranges")


def discard(path: Path) -> None:
    """Remove a partial file and its record, the file first: a record alone says nothing."""
    durable.discard(path)
    durable.discard(record_of(path))


def allocated_bytes(path: Path) -> int:
    """What of a file takes room on the disk; 0 when there is none."""
    with contextlib.suppress(FileNotFoundError):
        return path.stat().st_blocks * 512
    return 0
