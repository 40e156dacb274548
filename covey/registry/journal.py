"""The repositories' logs on a file system (safety S29): numbered files, made by link(), never rewritten.

Any number of servers may append at once: the file system decides who gets a number. What a process keeps in memory is
only ever a fold of entries it has read, so there is nothing to invalidate and no lock to hold.
"""

import asyncio
import contextlib
import errno
import os
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from covey import durable, failpoint, model, world
from covey.registry import blobs

T = TypeVar("T")

_LOG, _BLOBS, _PULLED = "_log", "_blobs", "_pulled"
_NO_WRITING = durable.NO_ROOM | {errno.EROFS}


class Journal:
    """`blobs.Logs` below one folder."""

    def __init__(
        self,
        base: Path,
        world: world.World,
        *,
        fsync: bool = True,
        on_entry: Callable[[str], None] = lambda log: None,
    ) -> None:
        """`on_entry` is told of each log that has grown, by a worker thread."""
        self._on_entry = on_entry
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
        folder = f"{self._repositories}/{log}/{_LOG}"  # as text: a list of all templates looks into each
        found: list[bytes] = []
        while True:
            try:
                with open(f"{folder}/{_entry_name(number + len(found))}", "rb", buffering=0) as stream:
                    found.append(stream.read())
            except (FileNotFoundError, NotADirectoryError):
                return found

    async def append(
        self, log: str, number: int, entry: bytes, check: Callable[[], Awaitable[None]] | None = None
    ) -> bool:
        aside = self._aside / f"entry.{self._world.token()}"
        try:
            await self._run(lambda: self._prepare(log, aside, entry))
            if check is not None:
                await check()
            return await self._run(lambda: self._enter(log, number, aside, entry))
        finally:
            await asyncio.shield(self._run(lambda: durable.discard(aside)))

    def _prepare(self, log: str, aside: Path, entry: bytes) -> None:
        """From here on the entry is pending: the collector reads it."""
        with no_room():
            durable.make_dirs(self._repositories / log / _LOG, fsync=self._fsync)
            durable.write_new(aside, entry, fsync=self._fsync)
            failpoint.reach("registry.entry.written")

    def _enter(self, log: str, number: int, aside: Path, entry: bytes) -> bool:
        with no_room():
            if not self._link(aside, self._repositories / log / _LOG / _entry_name(number), entry):
                return False
        failpoint.reach("registry.entry.linked")
        self._on_entry(log)
        return True

    def _link(self, aside: Path, target: Path, entry: bytes) -> bool:
        """Link, and on any refusal look whose entry it is: over NFS the answer to our own link may get lost, and its
        repetition then says EEXIST (safety S30). A file set aside that is gone was swept: it had waited too long."""
        try:
            if durable.link_new(aside, target, fsync=self._fsync):
                return True
        except OSError as error:
            if not target.exists():
                if isinstance(error, FileNotFoundError) and not aside.exists() and target.parent.exists():
                    return False
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
        with no_room():
            durable.make_dirs(path.parent, fsync=self._fsync)
            path.touch(mode=0o444)
            durable.sync_dir(path.parent, fsync=self._fsync)
        failpoint.reach("registry.blob.granted")

    async def granted(self, repository: str, digests: Sequence[str]) -> frozenset[str]:
        return await self._run(lambda: frozenset(digest for digest in digests if self._touch(repository, digest)))

    def _touch(self, repository: str, digest: str) -> bool:
        path = self._grant_path(repository, digest)
        try:
            os.utime(path)  # by the file server's clock
        except (FileNotFoundError, NotADirectoryError):
            return False
        except OSError as error:
            if error.errno not in _NO_WRITING:  # a pull goes on when the disk is full
                raise
            return path.exists()
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
            if error.errno not in _NO_WRITING:  # a pull goes on when the disk is full
                raise

    async def pulled_s(self, repositories: Sequence[str]) -> dict[str, int]:
        return await self._run(lambda: {name: self._pulled_s(name) for name in repositories})

    def _pulled_s(self, repository: str) -> int:
        try:
            return int(os.stat(f"{self._repositories}/{repository}/{_PULLED}").st_mtime)
        except FileNotFoundError:
            return 0


@contextlib.contextmanager
def no_room() -> Iterator[None]:
    """A full disk as the Protocol names it."""
    try:
        yield
    except OSError as error:
        if error.errno in durable.NO_ROOM:
            raise blobs.DiskFull(f"the registry's disk is full ({error.strerror})") from error
        raise


def _entry_name(number: int) -> str:
    return f"{number:010d}"
