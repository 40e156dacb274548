"""The repositories' logs on a file system (safety S29): numbered files, made by link(), never rewritten.

Any number of servers may append at once: the file system decides who gets a number. What a process keeps in memory is
only ever a fold of entries it has read, so there is nothing to invalidate and no lock to hold.
"""

import asyncio
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from covey import durable, failpoint, model, world
from covey.registry import blobs

T = TypeVar("T")

_LOG, _BLOBS, _PULLED = "_log", "_blobs", "_pulled"


class Journal:
    """`blobs.Logs` below one folder."""

    def __init__(self, base: Path, world: world.World, *, fsync: bool = True) -> None:
        self._repositories = base / "repositories"
        self._aside = base / "aside"
        self._world = world
        self._fsync = fsync
        self._threads = ThreadPoolExecutor(4, thread_name_prefix="registry-log")
        for folder in (self._repositories, self._aside):
            durable.make_dirs(folder, fsync=fsync)

    def close(self) -> None:
        self._threads.shutdown(wait=True)

    async def _run(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)

    # ---- entries ---------------------------------------------------------------------------------------------------

    async def read(self, positions: Mapping[str, int]) -> dict[str, list[bytes]]:
        return await self._run(lambda: {log: self._entries(log, number) for log, number in positions.items()})

    def _entries(self, log: str, number: int) -> list[bytes]:
        folder = self._repositories / log / _LOG
        found: list[bytes] = []
        while True:
            try:
                found.append((folder / _entry_name(number + len(found))).read_bytes())
            except (FileNotFoundError, NotADirectoryError):
                return found

    async def append(self, log: str, number: int, entry: bytes) -> bool:
        return await self._run(lambda: self._append(log, number, entry))

    def _append(self, log: str, number: int, entry: bytes) -> bool:
        folder = self._repositories / log / _LOG
        target = folder / _entry_name(number)
        aside = self._aside / self._world.token()
        try:
            durable.make_dirs(folder, fsync=self._fsync)
            durable.write_new(aside, entry, fsync=self._fsync)
            failpoint.reach("registry.entry.written")
            if self._link(aside, target, entry):
                failpoint.reach("registry.entry.linked")
                return True
            return False
        except OSError as error:
            if error.errno in durable.NO_ROOM:
                raise blobs.DiskFull(f"the registry's disk is full ({error.strerror})") from error
            raise
        finally:
            durable.discard(aside)

    def _link(self, aside: Path, target: Path, entry: bytes) -> bool:
        """Link, and on any refusal look whose entry it is: over NFS the answer to our own link may get lost, and its
        repetition then says EEXIST (safety S30)."""
        try:
            if durable.link_new(aside, target, fsync=self._fsync):
                return True
        except OSError:
            if not target.exists():
                raise
        ours = target.read_bytes() == entry
        if ours:
            durable.sync_dir(target.parent, fsync=self._fsync)
        return ours

    async def names(self, folder: str) -> Sequence[str]:
        return await self._run(lambda: self._names(folder))

    def _names(self, folder: str) -> list[str]:
        try:
            with os.scandir(self._repositories / folder) as found:
                return [f"{folder}/{item.name}" for item in found if item.is_dir()]
        except FileNotFoundError:
            return []

    # ---- which blobs a repository may read -------------------------------------------------------------------------

    async def grant(self, repository: str, digest: model.Digest) -> None:
        await self._run(lambda: self._grant(repository, digest))

    def _grant(self, repository: str, digest: model.Digest) -> None:
        path = self._grant_path(repository, digest)
        try:
            durable.make_dirs(path.parent, fsync=self._fsync)
            path.touch(mode=0o444)
            durable.sync_dir(path.parent, fsync=self._fsync)
        except OSError as error:
            if error.errno in durable.NO_ROOM:
                raise blobs.DiskFull(f"the registry's disk is full ({error.strerror})") from error
            raise
        failpoint.reach("registry.blob.granted")

    async def granted(self, repository: str, digests: Sequence[str]) -> frozenset[str]:
        return await self._run(lambda: frozenset(digest for digest in digests if self._touch(repository, digest)))

    def _touch(self, repository: str, digest: str) -> bool:
        try:
            os.utime(self._grant_path(repository, digest))  # by the file server's clock
        except (FileNotFoundError, NotADirectoryError):
            return False
        return True

    async def withdraw(self, repository: str, digest: model.Digest) -> bool:
        return await self._run(lambda: self._withdraw(repository, digest))

    def _withdraw(self, repository: str, digest: model.Digest) -> bool:
        path = self._grant_path(repository, digest)
        try:
            path.unlink()
        except (FileNotFoundError, NotADirectoryError):
            return False
        durable.sync_dir(path.parent, fsync=self._fsync)
        return True

    def _grant_path(self, repository: str, digest: str) -> Path:
        return self._repositories / repository / _BLOBS / digest.partition(":")[2]

    # ---- pulls -----------------------------------------------------------------------------------------------------

    async def mark_pulled(self, repository: str) -> None:
        await self._run(lambda: self._mark_pulled(repository))

    def _mark_pulled(self, repository: str) -> None:
        try:
            (self._repositories / repository / _PULLED).touch()
        except OSError as error:
            if error.errno not in durable.NO_ROOM:  # a pull goes on when the disk is full
                raise

    async def pulled_s(self, repositories: Sequence[str]) -> dict[str, int]:
        return await self._run(lambda: {name: self._pulled_s(name) for name in repositories})

    def _pulled_s(self, repository: str) -> int:
        try:
            return int((self._repositories / repository / _PULLED).stat().st_mtime)
        except FileNotFoundError:
            return 0


def _entry_name(number: int) -> str:
    return f"{number:010d}"
