"""What a replica asks of its own disk beside `blobs.Blobs` and `blobs.Logs`: hints, logs that are made anew, and blobs
on their way.

    BASE_PATH/
    ├── repositories/_changes[.old]                  one line per entry made, the log's name: hints for who waits
    ├── repositories/<name>/_aside.<number>.<token>  a log as it was before its entries from that number on were set
    │                                                aside; kept until somebody removes the folder
    └── fetching/<algorithm>-<hex>                   the first bytes of a blob that comes from a peer, locked (flock) by
                                                     the one process that writes; others may read along

Rules
* A log is made anew in one step: the new folder is built beside it and the two change names (RENAME_EXCHANGE). A crash
  before that leaves a folder that is set aside and holds nothing of its own; one after it has done its work.
* Which making of a log one has read is told by its folder's inode, the `era`; the old folder is kept, so no number
  comes twice.
* A blob on its way outlives its process: the next one goes on at its end. Whether its bytes are right is found out when
  it is whole; only then is it linked to its name, by the process that holds the lock, after fsync.
"""

import asyncio
import contextlib
import fcntl
import hashlib
import os
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple, TypeVar

from covey import durable, failpoint, model, world
from covey.client import oci
from covey.registry import blobs, disk, journal

T = TypeVar("T")

_CHANGES_LIMIT = 1 << 20
_READ = 1 << 20
_ASIDE = re.compile(r"_aside\.(\d{10})\.[0-9a-z]+")


class Mark(NamedTuple):
    """How far somebody has read the hints."""

    inode: int
    offset: int


class ReplicaDisk:
    """Below the folder of one registry. `fsync` False is for benchmarks and simulations only."""

    def __init__(self, base: Path, files: disk.Disk, world: world.World, *, fsync: bool = True) -> None:
        self._repositories = base / "repositories"
        self._changes = self._repositories / "_changes"
        self._fetching = base / "fetching"
        self._aside = base / "aside"
        self._files = files
        self._world = world
        self._fsync = fsync
        self._threads = ThreadPoolExecutor(6, thread_name_prefix="registry-replica")
        for folder in (self._repositories, self._fetching, self._aside):
            durable.make_dirs(folder, fsync=fsync)

    def close(self) -> None:
        self._threads.shutdown(wait=True)

    async def run(self, work: Callable[[], T]) -> T:
        """In a worker thread."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)

    # ---- hints -----------------------------------------------------------------------------------------------------

    def hint(self, log: str) -> None:
        """Something was entered there. Blocking; a fault is nobody's business, for everybody looks by himself too."""
        with contextlib.suppress(OSError):
            handle = os.open(self._changes, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
            try:
                durable.write_all(handle, f"{log}\n".encode())
                if os.fstat(handle).st_size > _CHANGES_LIMIT:
                    self._changes.rename(self._changes.with_suffix(".old"))  # kept: the next one has another inode
            finally:
                os.close(handle)

    async def hints(self, mark: Mark | None) -> tuple[Mark, Sequence[str] | None]:
        """The logs that were told since `mark`, and a new one; None: look at all of them."""
        return await self.run(lambda: self._hints(mark))

    def _hints(self, mark: Mark | None) -> tuple[Mark, Sequence[str] | None]:
        try:
            handle = os.open(self._changes, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return Mark(0, 0), [] if mark == Mark(0, 0) else None
        try:
            stat = os.fstat(handle)
            if mark is None or mark.inode != stat.st_ino or mark.offset > stat.st_size:
                return Mark(stat.st_ino, stat.st_size), None
            if mark.offset == stat.st_size:
                return mark, []
            told = os.pread(handle, stat.st_size - mark.offset, mark.offset)
        finally:
            os.close(handle)
        whole = told[: told.rfind(b"\n") + 1]
        return Mark(stat.st_ino, mark.offset + len(whole)), list(dict.fromkeys(whole.decode().split()))

    # ---- logs that are made anew -----------------------------------------------------------------------------------

    async def eras(self, logs: Sequence[str]) -> dict[str, int]:
        """Which making of each log there is now; 0: none yet."""
        return await self.run(lambda: {log: self._era(log) for log in logs})

    def _era(self, log: str) -> int:
        try:
            return os.stat(f"{self._repositories}/{log}/_log").st_ino
        except (FileNotFoundError, NotADirectoryError):
            return 0

    async def set_aside(self, log: str, number: int, instead: Sequence[bytes]) -> None:
        """Take a log's entries from that number on away, and put others in their place; whoever reads sees the log
        before or after it. What was taken away is kept (`aside`)."""
        await self.run(lambda: self._set_aside(log, number, instead))

    def _set_aside(self, log: str, number: int, instead: Sequence[bytes]) -> None:
        folder = self._repositories / log
        current, anew = folder / "_log", folder / f"_aside.{number:010d}.{self._world.token()}"
        anew.mkdir()
        for name in (f"{place:010d}" for place in range(number)):
            os.link(current / name, anew / name)
        for place, entry in enumerate(instead, number):
            durable.write_new(anew / f"{place:010d}", entry, fsync=self._fsync)
        durable.sync_dir(anew, fsync=self._fsync)
        failpoint.reach("registry.aside.built")
        durable.exchange(anew, current, fsync=self._fsync)
        failpoint.reach("registry.aside.exchanged")
        self.hint(log)

    async def aside(self) -> dict[str, list[bytes]]:
        """The entries that were set aside and are not in their log, by log."""
        return await self.run(self._all_aside)

    def _all_aside(self) -> dict[str, list[bytes]]:
        found: dict[str, list[bytes]] = {}
        for text, names, _ in os.walk(self._repositories):
            folder = Path(text)
            for name in sorted(name for name in names if _ASIDE.fullmatch(name)):
                for entry in _only_there(folder / name, folder / "_log", int(name.split(".")[1])):
                    found.setdefault(str(folder.relative_to(self._repositories)), []).append(entry)
            names[:] = [name for name in names if not name.startswith("_") or text == str(self._repositories)]
        return found

    # ---- blobs on their way ----------------------------------------------------------------------------------------

    async def take(self, digest: model.Digest) -> "Partial | None":
        """The first bytes of a blob, to go on with; None: another one does. To be closed."""
        return await self.run(lambda: self._take(digest))

    def _take(self, digest: model.Digest) -> "Partial | None":
        with journal.no_room():
            return Partial.take(self._place(digest), digest)

    async def publish(self, partial: "Partial") -> None:
        """Make a blob of bytes that are whole and right."""
        await self.run(lambda: self._publish(partial))

    def _publish(self, partial: "Partial") -> None:
        with journal.no_room():
            partial.seal(fsync=self._fsync)
            failpoint.reach("registry.fetch.whole")
            self._files.adopt(partial.path, partial.digest, partial.size_bytes)
        failpoint.reach("registry.fetch.adopted")
        durable.discard(partial.path)

    def look(self, digest: model.Digest) -> int | None:
        """Open what is there of a blob, for reading; None: nothing yet. Blocking."""
        try:
            return os.open(self._place(digest), os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return None

    async def on_their_way(self) -> dict[model.Digest, int]:
        """The blobs of which some bytes are here, and how many."""
        return await self.run(self._on_their_way)

    def _on_their_way(self) -> dict[model.Digest, int]:
        found = {}
        for path in self._fetching.iterdir():
            with contextlib.suppress(FileNotFoundError):
                found[model.Digest(path.name.replace("-", ":", 1))] = path.stat().st_size
        return found

    async def give_up(self, digest: model.Digest) -> None:
        """Remove what came of a blob that nobody wants any more, unless somebody writes there."""
        partial = await self.take(digest)
        if partial is not None:
            await self.run(partial.discard)

    def _place(self, digest: str) -> Path:
        return self._fetching / digest.replace(":", "-")


class Partial:
    """The first bytes of one blob, locked. `take` → add … → seal or discard → close. Blocking; `close` waits for an
    `add` whose caller was cancelled."""

    def __init__(self, path: Path, digest: model.Digest, handle: int) -> None:
        self.path = path
        self.digest = digest
        self.size_bytes = os.fstat(handle).st_size
        self.resumed_bytes = self.size_bytes
        self._handle = handle
        self._lock = threading.Lock()
        self._hash = hashlib.new(oci.algorithm_of(digest))
        self._hashed = 0

    @classmethod
    def take(cls, path: Path, digest: model.Digest) -> "Partial | None":
        while True:
            handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                os.close(handle)
                return None
            if os.fstat(handle).st_nlink and path.exists() and path.stat().st_ino == os.fstat(handle).st_ino:
                return cls(path, digest, handle)
            os.close(handle)  # somebody has finished or removed it between open and lock

    def add(self, pieces: Sequence[bytes]) -> None:
        with self._lock:
            if self._handle < 0:
                raise blobs.Cut("the transfer was ended")
            self._hash_up()
            os.lseek(self._handle, self.size_bytes, os.SEEK_SET)
            with journal.no_room():
                failpoint.reach("registry.fetch.write")
                durable.write_all(self._handle, *pieces)
            for piece in pieces:
                self._hash.update(piece)
            self.size_bytes += sum(map(len, pieces))
            self._hashed = self.size_bytes

    def _hash_up(self) -> None:
        """What an earlier process left here."""
        while self._hashed < self.size_bytes:
            piece = os.pread(self._handle, min(_READ, self.size_bytes - self._hashed), self._hashed)
            if not piece:
                raise OSError(f"{self.path} became shorter")
            self._hash.update(piece)
            self._hashed += len(piece)

    def found(self) -> str:
        """The digest of what is here."""
        with self._lock:
            self._hash_up()
            return f"{oci.algorithm_of(self.digest)}:{self._hash.hexdigest()}"

    def seal(self, *, fsync: bool) -> None:
        with self._lock:
            if fsync:
                os.fsync(self._handle)

    def discard(self) -> None:
        durable.discard(self.path)
        self.close()

    def close(self) -> None:
        with self._lock:
            if self._handle >= 0:
                os.close(self._handle)
                self._handle = -1


def _only_there(folder: Path, current: Path, number: int) -> Sequence[bytes]:
    """Entries of one folder that the other does not have under the same number."""
    found = []
    for path in sorted(folder.iterdir()):
        if int(path.name) >= number:
            entry = path.read_bytes()
            try:
                known = (current / path.name).read_bytes()
            except FileNotFoundError:
                known = b""
            if entry != known:
                found.append(entry)
    return found


def aside_of(found: Mapping[str, Sequence[bytes]]) -> int:
    """How many entries were set aside."""
    return sum(map(len, found.values()))
