"""Care of a storage on a file system: `blobs.Care` and `blobs.LogCare` below one folder.

Each step is one operation that the file system decides: a blob leaves the shelf by rename() to a name that is new each
time, comes back by link(), and is gone by unlink(). So of a collector that deletes from the trash and a request that
takes the blob back, one is first and the other sees it, on whatever servers they run. Times are of the file server: the
present time is what it writes on a file that was touched just now.
"""

import asyncio
import contextlib
import os
import re
import shutil
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from covey import durable, failpoint, model, world
from covey.registry import blobs, disk

T = TypeVar("T")

_BATCH = 2 << 20
_PAGE = 256  # blobs looked at in one go of a thread
_DIGEST = re.compile(r"[a-z0-9]+:[0-9a-f]{64,128}")
_NOTE = re.compile(r"[a-z0-9.-]+")
_SESSION = re.compile(r"[0-9a-f]{32}|gone\..*")
_LENGTHS = {64: "sha256", 128: "sha512"}


class DiskCare:
    """Upkeep below one folder. `fsync` False is for benchmarks and simulations only."""

    def __init__(self, base: Path, world: world.World, *, fsync: bool = True) -> None:
        self._base = base
        self._world = world
        self._fsync = fsync
        self._threads = ThreadPoolExecutor(2, thread_name_prefix="registry-care")
        for name in ("blobs", "trash", "quarantine", "notes", "aside", "uploads", "repositories"):
            durable.make_dirs(base / name, fsync=fsync)

    def close(self) -> None:
        self._threads.shutdown(wait=True)

    async def _run(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)

    async def clock_s(self) -> float:
        return await self._run(self._clock_s)

    def _clock_s(self) -> float:
        """Touch a file of our own: also works on a disk that is full."""
        probe = self._base / "notes" / "clock"
        try:
            os.utime(probe)
        except FileNotFoundError:
            probe.touch()
        return probe.stat().st_mtime

    # ---- blobs -----------------------------------------------------------------------------------------------------

    async def held(self, place: blobs.Place) -> AsyncIterator[blobs.Held]:
        found = self._held(place)
        while page := await self._run(lambda: [held for held, _ in zip(found, range(_PAGE), strict=False)]):
            for held in page:
                yield held

    def _held(self, place: blobs.Place) -> Iterator[blobs.Held]:
        for path, digest, mark in self._files(place):
            with contextlib.suppress(FileNotFoundError):
                stat = path.stat()
                yield blobs.Held(digest=digest, size_bytes=stat.st_size, since_s=stat.st_mtime, mark=mark)

    def _files(self, place: blobs.Place) -> Iterator[tuple[Path, model.Digest, str]]:
        root = self._base / place
        if place is blobs.Place.QUARANTINE:
            named = ((path, path.name.replace("-", ":", 1), "") for path in sorted(root.iterdir()))
        elif place is blobs.Place.TRASH:
            folders = ((folder, folder.name.replace("-", ":", 1)) for folder in sorted(root.iterdir()))
            named = ((path, text, path.name) for folder, text in folders for path in _inside(folder))
        else:
            shelves = (folder for algorithm in sorted(root.iterdir()) for folder in sorted(algorithm.iterdir()))
            named = ((path, f"{folder.parent.name}:{path.name}", "") for folder in shelves for path in _inside(folder))
        for path, text, mark in named:
            if _DIGEST.fullmatch(text):
                yield path, model.Digest(text), mark

    async def move(self, digest: model.Digest, source: blobs.Place, target: blobs.Place) -> bool:
        return await self._run(lambda: self._move(digest, source, target))

    def _move(self, digest: model.Digest, source: blobs.Place, target: blobs.Place) -> bool:
        old, new = (disk.locate(self._base, digest, place) for place in (source, target))
        if source is blobs.Place.TRASH:
            names = disk.trashed_as(self._base, digest)
            return sum(self._put_back(name, new) for name in names) > 0  # all of them
        if target is blobs.Place.TRASH:
            new = new / self._world.token()
        while True:
            try:
                durable.make_dirs(new.parent, fsync=self._fsync)
                os.utime(old)  # the time at which it came to its new place
                old.rename(new)
            except FileNotFoundError:  # of the two, it may have been the folder: an empty one is removed
                if old.exists():
                    continue
                return False
            failpoint.reach("registry.care.moved")
            durable.sync_dir(old.parent, fsync=self._fsync)
            durable.sync_dir(new.parent, fsync=self._fsync)
            return True

    def _put_back(self, trashed: Path, path: Path) -> bool:
        try:
            durable.make_dirs(path.parent, fsync=self._fsync)
            os.utime(trashed)
            durable.link_new(trashed, path, fsync=self._fsync)  # one that is there is as good
        except FileNotFoundError:
            return False
        failpoint.reach("registry.care.restored")
        durable.discard(trashed)
        return True

    async def destroy(self, held: blobs.Held, place: blobs.Place) -> int:
        assert place is not blobs.Place.SHELF  # noqa: S101  nothing is ever deleted from there
        return await self._run(lambda: self._destroy(disk.locate(self._base, held.digest, place) / held.mark))

    def _destroy(self, path: Path) -> int:
        try:
            stat = path.stat()
            path.unlink()
        except FileNotFoundError:
            return 0
        failpoint.reach("registry.care.destroyed")
        return stat.st_size if stat.st_nlink == 1 else 0

    def _tidy_trash(self) -> None:
        """Folders of blobs of which none is left there."""
        for folder in (self._base / blobs.Place.TRASH).iterdir():
            with contextlib.suppress(OSError):  # not empty
                folder.rmdir()

    async def read(
        self, digest: model.Digest, place: blobs.Place = blobs.Place.SHELF, *, past_cache: bool = False
    ) -> AsyncIterator[bytes]:
        path = disk.locate(self._base, digest, place)
        if place is blobs.Place.TRASH:
            path = next(iter(disk.trashed_as(self._base, digest)), path)
        stream = await self._run(lambda: path.open("rb", buffering=0))
        try:
            while batch := await self._run(lambda: _read(stream.fileno(), past_cache=past_cache)):
                yield batch
        finally:
            stream.close()

    # ---- what unfinished work left ---------------------------------------------------------------------------------

    async def expire(self, before_s: float, *, dry_run: bool = False) -> Sequence[blobs.Leftover]:
        return await self._run(lambda: self._expire(before_s, dry_run=dry_run))

    def _expire(self, before_s: float, *, dry_run: bool) -> list[blobs.Leftover]:
        found = []
        for folder in sorted((self._base / "uploads").iterdir()):
            leftover = _measure(folder) if _SESSION.fullmatch(folder.name) else None
            if leftover is not None and leftover.since_s < before_s:
                found.append(leftover)
                if not dry_run:
                    self._remove_session(folder)
        for path in sorted((self._base / "aside").iterdir()):
            leftover = _measure(path)
            if leftover is not None and leftover.since_s < before_s:
                found.append(leftover)
                if not dry_run:
                    durable.discard(path)
        if not dry_run:
            self._tidy_trash()
        return found

    def _remove_session(self, folder: Path) -> None:
        """In one step it is no session any more; then its files go."""
        gone = folder.with_name(f"gone.{self._world.token()}")
        with contextlib.suppress(FileNotFoundError):
            folder.rename(gone)
            failpoint.reach("registry.care.expired")
            shutil.rmtree(gone, ignore_errors=True)

    # ---- notes -----------------------------------------------------------------------------------------------------

    async def note(self, name: str, content: bytes) -> None:
        await self._run(lambda: self._note(name, content))

    def _note(self, name: str, content: bytes) -> None:
        assert _NOTE.fullmatch(name)  # noqa: S101  names are ours
        aside = self._base / "aside" / self._world.token()
        try:
            durable.write_new(aside, content, fsync=False)
            aside.rename(self._base / "notes" / name)
        finally:
            durable.discard(aside)

    async def notes(self, prefix: str) -> Mapping[str, blobs.Note]:
        return await self._run(lambda: self._notes(prefix))

    def _notes(self, prefix: str) -> dict[str, blobs.Note]:
        found = {}
        for path in (self._base / "notes").iterdir():
            if path.name.startswith(prefix) and path.name != "clock":
                with contextlib.suppress(FileNotFoundError):
                    found[path.name] = blobs.Note(content=path.read_bytes(), at_s=path.stat().st_mtime)
        return found

    # ---- logs ------------------------------------------------------------------------------------------------------

    async def logs(self) -> Sequence[str]:
        return await self._run(self._logs)

    def _logs(self) -> list[str]:
        root = self._base / "repositories"
        found = []
        for folder, names, _ in os.walk(root):
            if "_log" in names or "_blobs" in names:
                found.append(str(Path(folder).relative_to(root)))
            names[:] = [name for name in names if not name.startswith("_") or folder == str(root)]
        return found

    async def numbers(self, log: str) -> Sequence[int]:
        return await self._run(lambda: self._numbers(log))

    def _numbers(self, log: str) -> list[int]:
        try:
            with os.scandir(self._base / "repositories" / log / "_log") as items:
                return [int(item.name) for item in items if item.name.isdigit()]
        except FileNotFoundError:
            return []

    async def pending(self) -> Sequence[bytes]:
        return await self._run(self._pending)

    def _pending(self) -> list[bytes]:
        found = []
        for path in (self._base / "aside").glob("entry.*"):
            with contextlib.suppress(FileNotFoundError):
                found.append(path.read_bytes())
        return found

    async def grants(self, repository: str) -> Mapping[model.Digest, float]:
        return await self._run(lambda: self._grants(repository))

    def _grants(self, repository: str) -> dict[model.Digest, float]:
        found: dict[model.Digest, float] = {}
        with (
            contextlib.suppress(FileNotFoundError),
            os.scandir(self._base / "repositories" / repository / "_blobs") as items,
        ):
            for item in items:
                with contextlib.suppress(FileNotFoundError):
                    algorithm = _LENGTHS.get(len(item.name), "")
                    found[model.Digest(f"{algorithm}:{item.name}")] = item.stat().st_mtime
        return found


def _inside(folder: Path) -> list[Path]:
    """What lies in a folder; nothing when somebody has removed it."""
    try:
        return sorted(folder.iterdir())
    except FileNotFoundError:
        return []


def _read(handle: int, *, past_cache: bool) -> bytes:
    """The next piece; past the cache: what the kernel holds of it is dropped first, so that it comes from the disk."""
    if past_cache:
        position = os.lseek(handle, 0, os.SEEK_CUR)
        os.posix_fadvise(handle, position, _BATCH, os.POSIX_FADV_DONTNEED)
    return os.read(handle, _BATCH)


def _measure(path: Path) -> blobs.Leftover | None:
    """A file or a folder of files; None when it is gone."""
    try:
        stats = [path.stat()]
        if path.is_dir():
            with os.scandir(path) as items:
                stats += [item.stat() for item in items]
    except FileNotFoundError:
        return None
    size = sum(stat.st_size for stat in stats[1:] or stats)
    return blobs.Leftover(name=path.name, size_bytes=size, since_s=max(stat.st_mtime for stat in stats))
