"""What a pushing client remembers between runs, so that a push that was killed goes on and a repeated one is quick.

    <folder>/
    ├── uploads/<32 hex>      an upload session that is not finished: its path; locked by whoever works on it
    ├── files/<32 hex>        what a file holds (`Known`), as long as it looks the same; named by its path's hash
    └── packed/<64 hex>.zst   a packed layer on its way, named by the digest of what is in it; ``.part``: being packed

Rules: everything here may be lost at any time, and only costs work. A file looks the same when its size, times, inode
and device do; one that was changed within the last two seconds is not remembered, since a second change could leave all
of that as it is. What nobody has used for a week goes. Blocking.
"""

import contextlib
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

from covey import durable, errors, model, world

_KEEP_S = 7 * 86400.0
_SETTLED_NS = 2 * 10**9


class Known(model.Noun, frozen=True, kw_only=True):
    """What a file held when it looked like `look`. `packed`: the digest of its packed form; "" when not known."""

    path: str
    look: str
    digest: str
    packed: str = ""
    packed_bytes: int = 0


class Session:
    """An upload session as it is remembered; without a file it is forgotten when the process ends."""

    def __init__(self, path: Path | None = None, handle: int = -1) -> None:
        self._path = path
        self._handle = handle
        self.location = "" if handle < 0 else os.pread(handle, 4096, 0).decode("utf-8", "replace").strip()
        if not self.location.startswith("/v2/"):
            self.location = ""

    def remember(self, location: str) -> None:
        self.location = location
        if self._handle >= 0:
            os.ftruncate(self._handle, 0)
            os.pwrite(self._handle, location.encode(), 0)

    def forget(self) -> None:
        self.location = ""
        if self._path is not None:
            durable.discard(self._path)

    def close(self) -> None:
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1


class Notes:
    """The folder. Raises Refused when it cannot be made."""

    def __init__(self, folder: Path, world: world.World) -> None:
        self._world = world
        self._uploads, self._files, self._packed = folder / "uploads", folder / "files", folder / "packed"
        try:
            for place in (self._uploads, self._files, self._packed):
                place.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as error:
            raise errors.Refused(f"cannot keep notes of pushes in {folder}: {error.strerror}") from error
        self._sweep()

    def _sweep(self) -> None:
        limit_s = self._world.wall_ns() / 1e9 - _KEEP_S
        for place in (self._uploads, self._files, self._packed):
            for path in place.iterdir():
                with contextlib.suppress(FileNotFoundError):
                    if path.stat().st_mtime < limit_s:
                        path.unlink()

    def upload(self, key: str) -> Path:
        return self._uploads / _name(key)

    def packed(self, digest: str) -> Path:
        """Where a packed layer is kept while it is sent."""
        return self._packed / (digest.partition(":")[2] + ".zst")

    @contextlib.contextmanager
    def packing(self, digest: str) -> Iterator[Path]:
        """A file to pack into: what a killed push left is written over; of two at once each has its own. Gone at the
        end, unless it was given another name."""
        aside = self.packed(digest).with_suffix(".part")
        try:
            handle = durable.lock(aside)
        except BlockingIOError:
            aside, handle = aside.with_suffix(f".{os.getpid()}"), -1
        try:
            yield aside
        finally:
            durable.discard(aside)
            if handle >= 0:
                os.close(handle)

    def known(self, path: Path) -> Known | None:
        """What the file holds, if it was remembered and still looks the same."""
        whole = path.resolve()
        found = durable.read(self._files / _name(str(whole)), Known)
        if found is None or (found.path, found.look) != (str(whole), look(whole)):
            return None
        return found

    def learn(self, path: Path, seen: str, digest: str, packed: str = "", packed_bytes: int = 0) -> None:
        """Remember what the file held while it looked like `seen`, if it has settled."""
        whole = path.resolve()
        changed_ns = max(int(part) for part in seen.split()[1:3])
        if seen == look(whole) and self._world.wall_ns() - changed_ns > _SETTLED_NS:
            known = Known(path=str(whole), look=seen, digest=digest, packed=packed, packed_bytes=packed_bytes)
            with contextlib.suppress(OSError):
                durable.write(self._files / _name(str(whole)), known, fsync=False)


def session(notes: Notes | None, key: str) -> Session:
    """The session of this upload, remembered or new; when another process works on it, one that is ours alone."""
    if notes is None:
        return Session()
    path = notes.upload(key)
    try:
        return Session(path, durable.lock(path))
    except BlockingIOError:
        return Session()


def look(path: Path) -> str:
    """What changes when a file does."""
    stat = path.stat()
    return f"{stat.st_size} {stat.st_mtime_ns} {stat.st_ctime_ns} {stat.st_ino} {stat.st_dev}"


def _name(key: str) -> str:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()[:32]
