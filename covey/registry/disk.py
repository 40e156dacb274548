"""Blobs on a local (or NFS) file system: content-addressed files and resumable uploads.

How bytes become a blob (safety S31): each write goes into its own O_EXCL file; after fsync and close a small record
``part.<offset>`` is linked in, and only that makes it count: of two requests at one offset one wins, and a server that
dies leaves the session at the last record. `finish` copies several parts into one private file while hashing what it
writes; a single part, hashed while it came in, is linked as it is. Nothing is published that somebody could still
write to.

Memory is constant: bytes travel in batches, one being hashed and written by a worker thread (both release the
interpreter lock) while the next one is received: `_BATCH` of pieces, or, where the source can fill memory of ours, one
of two rooms, which are used in turn and written past the page cache (`writing`). The file system is only touched in
worker threads.
"""

import asyncio
import contextlib
import hashlib
import os
import re
import shutil
from collections.abc import AsyncIterable, AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import ParamSpec, TypeVar

import msgspec

from covey import durable, errors, failpoint, model, room, world
from covey.client import oci
from covey.registry import blobs, mounts, writing

P = ParamSpec("P")
T = TypeVar("T")

_BATCH = 2 << 20
_ROOM = 2 << 20  # an upload holds two
_SESSION = re.compile(r"[0-9a-f]{32}")
_THREADS = 8


class _Part(model.Noun, frozen=True, kw_only=True):
    """The record of one durable part. `data` names its file; `sha256` is of that part alone."""

    data: str
    size_bytes: int
    sha256: str


def locate(base: Path, digest: str, place: blobs.Place = blobs.Place.SHELF) -> Path:
    """Where a blob lies, if it lies there; in the trash: the folder of all its names there."""
    algorithm, _, name = digest.partition(":")
    if place is blobs.Place.SHELF:
        return base / place / algorithm / name[:2] / name
    return base / place / f"{algorithm}-{name}"


def trashed_as(base: Path, digest: str) -> list[Path]:
    """The names under which a blob lies in the trash."""
    try:
        return sorted(locate(base, digest, blobs.Place.TRASH).iterdir())
    except FileNotFoundError:
        return []


class Disk:
    """`blobs.Blobs` below one folder. `reserved_bytes` are never given away; `fsync` False is for benchmarks only."""

    def __init__(self, base: Path, world: world.World, *, reserved_bytes: int = 0, fsync: bool = True) -> None:
        self._base = base
        self._world = world
        self._reserved_bytes = reserved_bytes
        self._fsync = fsync
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="registry-disk")
        self._blobs = base / "blobs"
        self._uploads = base / "uploads"
        self._aside = base / "aside"
        mounts.check(base)
        try:
            for folder in (self._blobs, self._uploads, self._aside):
                durable.make_dirs(folder, fsync=fsync)
            self._check_format()
        except OSError as error:
            raise errors.SettingError(f"BASE_PATH {base} cannot hold a registry: {error.strerror}") from error

    def _check_format(self) -> None:
        """Mark a new storage with the number of its layout; refuse one that a newer server has raised."""
        marker, aside = self._base / "format", self._aside / self._world.token()
        if not marker.exists():
            durable.write_new(aside, str(blobs.FORMAT).encode(), fsync=self._fsync)
            durable.link_new(aside, marker, fsync=self._fsync)
            durable.discard(aside)
        found = marker.read_text().strip()
        if found != str(blobs.FORMAT):
            text = f"BASE_PATH {self._base} has format {found}, this server knows {blobs.FORMAT}; use a newer Covey"
            raise errors.SettingError(text)

    def close(self) -> None:
        self._threads.shutdown(wait=True)

    async def _run(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, lambda: work(*args, **kwargs))

    async def _to_the_end(self, work: Callable[[], T]) -> T:
        """Work whose outcome must be settled when this returns, also when the caller is cancelled meanwhile."""
        working = asyncio.ensure_future(self._run(work))
        try:
            return await asyncio.shield(working)
        except asyncio.CancelledError:
            await asyncio.gather(working, return_exceptions=True)
            raise

    # ---- finished blobs --------------------------------------------------------------------------------------------

    async def stat(self, digest: model.Digest) -> blobs.Blob | None:
        return await self._run(self._stat, digest)

    def _stat(self, digest: model.Digest) -> blobs.Blob | None:
        path = self._path(digest)
        while True:  # a collector may move it between two looks, and no more often than it runs
            try:
                return blobs.Blob(digest=digest, size_bytes=path.stat().st_size, path=path)
            except FileNotFoundError:
                if not self._take_back(digest):
                    return None

    def _take_back(self, digest: model.Digest) -> bool:
        """Link a blob out of the trash, where the collector has put it: whoever asks for it may be about to need it."""
        path = self._path(digest)
        for trashed in trashed_as(self._base, digest):
            with contextlib.suppress(FileNotFoundError):  # the collector was first
                durable.make_dirs(path.parent, fsync=self._fsync)
                os.utime(trashed)
                durable.link_new(trashed, path, fsync=self._fsync)
                durable.discard(trashed)
        return path.exists()

    async def get(self, digest: model.Digest) -> bytes:
        return await self._run(self._get, digest)

    def _get(self, digest: model.Digest) -> bytes:
        while True:
            try:
                return self._path(digest).read_bytes()
            except FileNotFoundError:
                if not self._take_back(digest):
                    raise

    async def read(self, blob: blobs.Blob, start: int = 0, end: int | None = None) -> AsyncIterator[bytes]:
        stream = await self._run(lambda: self._path(blob.digest).open("rb", buffering=0))
        try:
            await self._run(stream.seek, start)
            left = (blob.size_bytes if end is None else end) - start
            while left > 0 and (piece := await self._run(stream.read, min(_BATCH, left))):
                left -= len(piece)
                yield piece
        finally:
            stream.close()

    async def address(self, blob: blobs.Blob) -> str:
        return ""

    async def put(self, content: bytes, digest: model.Digest | None = None) -> blobs.Blob:
        return await self._run(self._put, content, digest)

    def _put(self, content: bytes, wanted: model.Digest | None) -> blobs.Blob:
        digest = oci.digest_of(content, oci.algorithm_of(wanted) if wanted else oci.SHA256)
        if wanted not in (None, digest):
            raise blobs.WrongDigest(f"the bytes are {digest}, not {wanted}")
        known = self._stat(digest)
        if known is not None:
            os.utime(self._path(digest))
            durable.sync_dir(self._path(digest).parent, fsync=self._fsync)  # if whoever stored it has not
            return known
        aside = self._aside / self._world.token()
        try:
            durable.write_new(aside, content, fsync=self._fsync)
            failpoint.reach("registry.put.written")
            return self._publish(aside, digest, len(content))
        except FileNotFoundError:  # it was so long on its way that it was swept away
            return self._put(content, wanted)
        except OSError as error:
            raise _full_or(error) from error
        finally:
            durable.discard(aside)

    def _publish(self, source: Path, digest: model.Digest, size_bytes: int) -> blobs.Blob:
        """Link a verified, fsynced, closed file into place."""
        path = self._path(digest)
        durable.make_dirs(path.parent, fsync=self._fsync)
        os.utime(source)  # its bytes may have waited for long; the collector must not think that the blob has
        while not durable.link_new(source, path, fsync=self._fsync):
            with contextlib.suppress(FileNotFoundError):  # collected just now: it takes our link
                os.utime(path)  # the collector must see that somebody counts on it again (safety S32)
                break
        failpoint.reach("registry.blob.linked")
        durable.discard(locate(self._base, digest, blobs.Place.QUARANTINE))  # healed
        return blobs.Blob(digest=digest, size_bytes=size_bytes, path=path)

    def adopt(self, source: Path, digest: model.Digest, size_bytes: int) -> blobs.Blob:
        """Make a blob of a file on this file system whose bytes are verified and fsynced, and to which nobody writes
        any more (safety S31). Blocking."""
        return self._publish(source, digest, size_bytes)

    def _path(self, digest: model.Digest) -> Path:
        return locate(self._base, digest)

    # ---- upload sessions -------------------------------------------------------------------------------------------

    async def begin(self) -> blobs.SessionId:
        session = blobs.SessionId(self._world.token() + self._world.token())
        await self._run(self._begin, session)
        return session

    def _begin(self, session: blobs.SessionId) -> None:
        try:
            (self._uploads / session).mkdir()
            durable.sync_dir(self._uploads, fsync=self._fsync)
        except OSError as error:
            raise _full_or(error) from error

    async def offset(self, session: blobs.SessionId) -> int:
        return await self._run(lambda: sum(part.size_bytes for part in self._parts(session)))

    def _folder(self, session: blobs.SessionId) -> Path:
        folder = self._uploads / session
        if not _SESSION.fullmatch(session) or not folder.is_dir():
            raise blobs.NoSession(f"no upload session {session}")
        return folder

    def _parts(self, session: blobs.SessionId) -> list[_Part]:
        """The chain of recorded parts from offset 0 on."""
        folder = self._folder(session)
        chain: list[_Part] = []
        offset = 0
        while True:
            try:
                record = (folder / _record_name(offset)).read_bytes()
            except FileNotFoundError:
                return chain
            chain.append(msgspec.json.decode(record, type=_Part))
            offset += chain[-1].size_bytes

    async def write(self, session: blobs.SessionId, start: int, chunks: AsyncIterable[bytes]) -> int:
        standing = await self.offset(session)
        if start != standing:
            raise blobs.WrongOffset(standing)
        part = writing.Part(self._folder(session) / f"data.{self._world.token()}", self._room)
        try:
            await self._run(part.open)
            try:
                await (self._fill(part, chunks) if isinstance(chunks, blobs.Direct) else self._receive(part, chunks))
            except blobs.Cut:
                await self._to_the_end(lambda: self._enter(session, start, part))
                raise
            return await self._to_the_end(lambda: self._enter(session, start, part))
        except (OSError, blobs.DiskFull) as error:
            raise await self._removed(session, error) from error
        finally:
            await asyncio.shield(self._run(part.close))

    async def _fill(self, part: writing.Part, source: blobs.Direct) -> None:
        """Bytes from the network into a room, while threads write and hash the other one."""
        emptied: asyncio.Future[tuple[None, None]] | None = None
        filling, emptying = room.Room(_ROOM), room.Room(_ROOM)
        try:
            while True:
                filling.clear()
                try:
                    await source.fill(filling)
                finally:
                    if emptied is not None:
                        await emptied
                    if content := filling.filled:
                        emptied = asyncio.gather(self._run(part.write, content), self._run(part.hash, content))
                if not filling.full:
                    return
                filling, emptying = emptying, filling
        finally:
            if emptied is not None:
                await emptied

    async def _receive(self, part: writing.Part, chunks: AsyncIterable[bytes]) -> None:
        """Bytes from the network to the thread, one batch being written while the next one gathers."""
        added: asyncio.Future[None] | None = None
        batch: list[bytes] = []
        size = 0
        try:
            async for chunk in chunks:
                batch.append(chunk)
                size += len(chunk)
                if size < _BATCH:
                    continue
                if added is not None:
                    await added
                added, batch, size = asyncio.ensure_future(self._run(part.add, batch)), [], 0
        finally:
            if added is not None:
                await added
            if batch:
                await self._run(part.add, batch)

    def _enter(self, session: blobs.SessionId, start: int, part: writing.Part) -> int:
        """Make a part durable and record it; the number of its record decides between two requests at one offset."""
        if not part.size_bytes:
            return start
        part.seal(fsync=self._fsync)
        failpoint.reach("registry.part.written")
        record = _Part(data=part.path.name, size_bytes=part.size_bytes, sha256=part.sha256.hexdigest())
        folder = self._folder(session)
        aside = folder / f"record.{self._world.token()}"
        try:
            durable.write_new(aside, msgspec.json.encode(record), fsync=self._fsync)
            if not durable.link_new(aside, folder / _record_name(start), fsync=self._fsync):
                part.kept = False
                raise blobs.WrongOffset(sum(part.size_bytes for part in self._parts(session)))
        finally:
            durable.discard(aside)
        failpoint.reach("registry.part.entered")
        return start + part.size_bytes

    async def finish(self, session: blobs.SessionId, digest: model.Digest) -> blobs.Blob:
        try:
            return await self._run(self._finish, session, digest)
        except blobs.WrongDigest:
            await self.abort(session)
            raise
        except (OSError, blobs.DiskFull) as error:
            raise await self._removed(session, error) from error

    def _finish(self, session: blobs.SessionId, digest: model.Digest) -> blobs.Blob:
        parts, folder = self._parts(session), self._folder(session)
        algorithm = oci.algorithm_of(digest)
        if len(parts) == 1:
            whole, found = folder / parts[0].data, parts[0].sha256
            if algorithm != oci.SHA256:  # what came in was hashed by sha256; nobody can write to a recorded part
                found = _hash_file(whole, algorithm)
        else:
            whole = folder / f"whole.{self._world.token()}"
            found = self._join([folder / part.data for part in parts], whole, algorithm)
            failpoint.reach("registry.upload.joined")
        if f"{algorithm}:{found}" != digest:
            raise blobs.WrongDigest(f"the bytes received are {algorithm}:{found}, not {digest}")
        return self._publish(whole, digest, sum(part.size_bytes for part in parts))

    def _join(self, sources: list[Path], target: Path, algorithm: str) -> str:
        """Copy the parts into one private file; the digest is of the bytes written there."""
        self._room(sum(source.stat().st_size for source in sources))
        found = hashlib.new(algorithm)
        handle = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o444)
        try:
            for source in sources:
                with source.open("rb", buffering=0) as stream:
                    while batch := stream.read(_BATCH):
                        durable.write_all(handle, batch)
                        found.update(batch)
            if self._fsync:
                os.fsync(handle)
        finally:
            os.close(handle)
        return found.hexdigest()

    async def abort(self, session: blobs.SessionId) -> None:
        if _SESSION.fullmatch(session):
            await self._run(shutil.rmtree, self._uploads / session, ignore_errors=True)

    async def _removed(self, session: blobs.SessionId, error: OSError | blobs.DiskFull) -> Exception:
        """What to raise for a fault of the file system. No room: the session goes, its bytes only stand in the way."""
        if isinstance(error, FileNotFoundError):  # swept away meanwhile
            return blobs.NoSession(f"upload session {session} has expired")
        fault = _full_or(error) if isinstance(error, OSError) else error
        if isinstance(fault, blobs.DiskFull):
            await self.abort(session)
        return fault

    # ---- room ------------------------------------------------------------------------------------------------------

    async def space(self) -> blobs.Space:
        return await self._run(self._space)

    def _space(self) -> blobs.Space:
        stat = os.statvfs(self._base)
        free = max(0, stat.f_bavail * stat.f_frsize - self._reserved_bytes)
        return blobs.Space(total_bytes=stat.f_blocks * stat.f_frsize, free_bytes=free)

    def _room(self, size_bytes: int) -> None:
        free = self._space().free_bytes
        if free < size_bytes:
            raise blobs.DiskFull(
                f"the registry's disk is full ({free >> 20} MiB free beside the reserve): free some, then push again"
            )


def _hash_file(path: Path, algorithm: str) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, algorithm).hexdigest()


def _record_name(offset: int) -> str:
    return f"part.{offset:020d}"


def _full_or(error: OSError) -> Exception:
    """The fault as the Protocol names it."""
    if error.errno in durable.NO_ROOM:
        return blobs.DiskFull(f"the registry's disk is full ({error.strerror})")
    return error
