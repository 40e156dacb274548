"""Blobs in a bucket of S3, by the same rules as on a disk.

    BUCKET/
    ├── format                               the number of this layout
    ├── blobs/<algorithm>/<2 hex>/<hex>      a finished blob, named by its content
    ├── trash/<algorithm>-<hex>/<token>      one that nothing refers to; whoever asks for it copies it back
    ├── quarantine/<algorithm>-<hex>/<token> one whose bytes are not what its name says; never served
    ├── repositories/<name>/_log/…           see `s3_log`
    ├── notes/<name>                         what servers tell each other of their care
    ├── aside/entry.<token>                  a log entry that is being checked
    └── uploads/<session>/
        ├── begun                            empty: the session exists
        ├── data.<token>                     bytes of one part, an object of one request alone
        └── part.<20 digits>                 record of a part, made by a conditional PUT; the number is its offset

How bytes become a blob (safety S31): a PATCH goes to an object of its own, hashed on the way; then its record is
created, and only that makes it count. A session of one part is copied under its sha256 within the store. Several parts
(and one that is to be named by sha512) are read in their order, hashed and sent again straight under the digest: a
multipart upload shows nothing until it is completed, and it is completed only when the hash is right. So a name never
stands for other bytes, and nobody writes to an object that was published: S3 replaces objects whole, and here by equal
content only.

An object cannot be larger than what one copy takes, so a long PATCH is entered as several parts of 4 GiB.

`offset` is one listing and one read: records are dense, so the last one tells where the session stands.
"""

import asyncio
import contextlib
import errno
import hashlib
import re
from collections.abc import AsyncIterable, AsyncIterator
from typing import TypeVar

import msgspec

from covey import errors, failpoint, model, world
from covey.client import oci
from covey.registry import blobs, s3_bucket

T = TypeVar("T")

_BATCH = 2 << 20
_PART_LIMIT = 4 << 30  # CopyObject takes 5 GiB
_SESSION = re.compile(r"[0-9a-f]{32}")
_ENDLESS = 1 << 50  # a bucket has no end; a number that JSON readers can hold


class _Part(model.Noun, frozen=True, kw_only=True):
    """The record of one part. `data` names its object; `sha256` is of that part alone."""

    data: str
    size_bytes: int
    sha256: str


class S3:
    """`blobs.Blobs` in one bucket."""

    def __init__(self, bucket: s3_bucket.Bucket, world: world.World) -> None:
        self._bucket = bucket
        self._world = world

    async def open(self) -> None:
        """Mark a new bucket with the number of its layout; refuse one that a newer server has raised."""
        name = self._bucket.config.bucket
        try:
            if await self._bucket.create("format", str(blobs.FORMAT).encode()):
                return
            found = (await self._bucket.get("format")).decode(errors="replace").strip()
        except (errors.Unavailable, FileNotFoundError) as error:
            raise errors.SettingError(f"BACKEND_S3_BUCKET {name} cannot hold a registry: {error}") from error
        text = f"BACKEND_S3_BUCKET {name} has format {found}, this server knows {blobs.FORMAT}; use a newer Covey"
        raise errors.SettingError(text)

    # ---- finished blobs --------------------------------------------------------------------------------------------

    async def stat(self, digest: model.Digest) -> blobs.Blob | None:
        found = await self._bucket.find(key(digest))
        if found is None and await self._take_back(digest):
            found = await self._bucket.find(key(digest))
        return None if found is None else blobs.Blob(digest=digest, size_bytes=found.size_bytes)

    async def get(self, digest: model.Digest) -> bytes:
        try:
            return await self._bucket.get(key(digest))
        except FileNotFoundError:
            if not await self._take_back(digest):
                raise
        return await self._bucket.get(key(digest))

    async def _take_back(self, digest: model.Digest) -> bool:
        """Copy a blob out of the trash: whoever asks for it may be about to need it (`s3_care`)."""
        for item in await self._bucket.below(folder(digest, blobs.Place.TRASH)):
            with contextlib.suppress(FileNotFoundError):  # the collector was first
                await self._bucket.copy(item.key, key(digest))
                return True
        return False

    async def _published(self, digest: model.Digest, size_bytes: int) -> blobs.Blob:
        failpoint.reach("registry.blob.linked")
        bad = await self._bucket.below(folder(digest, blobs.Place.QUARANTINE))
        await self._bucket.delete([item.key for item in bad])  # healed
        return blobs.Blob(digest=digest, size_bytes=size_bytes)

    def read(self, blob: blobs.Blob, start: int = 0, end: int | None = None) -> AsyncIterator[bytes]:
        return self._bucket.read(key(blob.digest), start, blob.size_bytes if end is None else end)

    async def address(self, blob: blobs.Blob) -> str:
        return await self._bucket.sign(key(blob.digest))

    async def put(self, content: bytes, digest: model.Digest | None = None) -> blobs.Blob:
        found = oci.digest_of(content, oci.algorithm_of(digest) if digest else oci.SHA256)
        if digest not in (None, found):
            raise blobs.WrongDigest(f"the bytes are {found}, not {digest}")
        try:
            failpoint.reach("registry.put.written")
            await self._bucket.put(key(found), content)
        except OSError as error:
            raise _full_or(error) from error
        return await self._published(found, len(content))

    # ---- upload sessions -------------------------------------------------------------------------------------------

    async def begin(self) -> blobs.SessionId:
        session = blobs.SessionId(self._world.token() + self._world.token())
        await self._bucket.put(f"{_session(session)}begun", b"")
        return session

    async def offset(self, session: blobs.SessionId) -> int:
        """Where the last record ends; only `begun` makes a session, whatever else may be left of it."""
        records = await self._records(session)
        if not records:
            return 0
        last = await self._part(records[-1])
        return int(records[-1].rpartition(".")[2]) + last.size_bytes

    async def _records(self, session: blobs.SessionId) -> list[str]:
        """The keys of the session's records, by offset. Raises NoSession."""
        found = [] if not _SESSION.fullmatch(session) else await self._bucket.below(_session(session))
        names = [item.key for item in found]
        if f"{_session(session)}begun" not in names:
            raise blobs.NoSession(f"no upload session {session}")
        return [name for name in names if "/part." in name]

    async def _part(self, record: str) -> _Part:
        return msgspec.json.decode(await self._bucket.get(record), type=_Part)

    async def write(self, session: blobs.SessionId, start: int, chunks: AsyncIterable[bytes]) -> int:
        standing = await self.offset(session)
        if start != standing:
            raise blobs.WrongOffset(standing)
        incoming = _Incoming(chunks)
        try:
            while await incoming.more():
                start = await self._write_part(session, start, incoming)
        except (OSError, blobs.DiskFull) as error:
            fault = _full_or(error)
            if isinstance(fault, blobs.DiskFull):
                await self.abort(session)  # its bytes only stand in the way
            raise fault from error
        if incoming.cut is not None:
            raise incoming.cut
        return start

    async def _write_part(self, session: blobs.SessionId, start: int, incoming: "_Incoming") -> int:
        """Send one part to its own object and record it: of two requests at one offset one wins."""
        data = f"{_session(session)}data.{self._world.token()}"
        kept = False
        part = incoming.part()
        try:
            await self._bucket.send(data, part.batches())
            failpoint.reach("registry.part.written")
            record = _Part(data=data.rpartition("/")[2], size_bytes=part.size_bytes, sha256=part.sha256.hexdigest())
            kept = True  # unless we know better: an answer may be lost
            kept = await _settled(asyncio.ensure_future(self._enter(session, start, record)))
            if not kept:
                raise blobs.WrongOffset(await self.offset(session))
        finally:
            if not kept:
                await _settled(asyncio.ensure_future(self._bucket.delete([data])))
        failpoint.reach("registry.part.entered")
        return start + part.size_bytes

    async def _enter(self, session: blobs.SessionId, start: int, record: _Part) -> bool:
        """Create the record. Raises NoSession when the session went away meanwhile."""
        name = f"{_session(session)}part.{start:020d}"
        if not await self._bucket.create(name, msgspec.json.encode(record)):
            return False
        if await self._bucket.find(f"{_session(session)}begun") is None:
            await self._bucket.delete([name, f"{_session(session)}{record.data}"])
            raise blobs.NoSession(f"upload session {session} has expired")
        return True

    async def finish(self, session: blobs.SessionId, digest: model.Digest) -> blobs.Blob:
        try:
            return await self._finish(session, digest)
        except blobs.WrongDigest:
            await self.abort(session)
            raise
        except FileNotFoundError as error:  # aborted meanwhile
            raise blobs.NoSession(f"no upload session {session}") from error
        except (OSError, blobs.DiskFull) as error:
            fault = _full_or(error)
            if isinstance(fault, blobs.DiskFull):
                await self.abort(session)
            raise fault from error

    async def _finish(self, session: blobs.SessionId, digest: model.Digest) -> blobs.Blob:
        records = await self._records(session)
        parts = await asyncio.gather(*map(self._part, records))
        size = sum(part.size_bytes for part in parts)
        if len(parts) == 1 and oci.algorithm_of(digest) == oci.SHA256:
            _check(f"{oci.SHA256}:{parts[0].sha256}", digest)
            await self._bucket.copy(f"{_session(session)}{parts[0].data}", key(digest))
        elif parts:
            failpoint.reach("registry.upload.joined")
            await self._bucket.send(key(digest), self._joined(session, parts, digest), size)
        else:
            await self.put(b"", digest)
        return await self._published(digest, size)

    async def _joined(self, session: blobs.SessionId, parts: list[_Part], digest: model.Digest) -> AsyncIterator[bytes]:
        """The parts' bytes in their order. Raises WrongDigest at the end, before anything is visible."""
        found = hashlib.new(oci.algorithm_of(digest))
        for part in parts:
            async for piece in self._bucket.read(f"{_session(session)}{part.data}", 0, part.size_bytes):
                await asyncio.to_thread(found.update, piece)
                yield piece
        _check(f"{found.name}:{found.hexdigest()}", digest)

    async def abort(self, session: blobs.SessionId) -> None:
        """`begun` goes first: what is left of a session that was aborted half is no session."""
        if not _SESSION.fullmatch(session):
            return
        await self._bucket.delete([f"{_session(session)}begun"])
        await self._bucket.delete([item.key for item in await self._bucket.below(_session(session))])

    async def space(self) -> blobs.Space:
        return blobs.Space(total_bytes=_ENDLESS, free_bytes=_ENDLESS)


class _Incoming:
    """A request's body, to be made into parts. `cut` is why it ended early, if it did."""

    def __init__(self, chunks: AsyncIterable[bytes]) -> None:
        self.cut: blobs.Cut | None = None
        self._chunks = aiter(chunks)
        self._next = b""

    async def more(self) -> bool:
        """Whether another byte came."""
        if not self._next:
            self._next = await self.batch()
        return bool(self._next)

    def part(self) -> "_PartIn":
        return _PartIn(self)

    async def batch(self) -> bytes:
        """The next bytes, b"" at the end."""
        if self._next:
            batch, self._next = self._next, b""
            return batch
        gathered, size = [], 0
        try:
            while size < _BATCH and self.cut is None:
                chunk = await anext(self._chunks, b"")
                if not chunk:
                    break
                gathered.append(chunk)
                size += len(chunk)
        except blobs.Cut as error:
            self.cut = error
        return b"".join(gathered)


class _PartIn:
    """One part on its way: its hash and size grow while `batches` is read."""

    def __init__(self, incoming: _Incoming) -> None:
        self.sha256 = hashlib.sha256()
        self.size_bytes = 0
        self._incoming = incoming

    async def batches(self) -> AsyncIterator[bytes]:
        while self.size_bytes < _PART_LIMIT and (batch := await self._incoming.batch()):
            failpoint.reach("registry.part.write")
            await asyncio.to_thread(self.sha256.update, batch)
            self.size_bytes += len(batch)
            yield batch


async def _settled(work: asyncio.Future[T]) -> T:
    """What becomes of work that must be settled, also when the caller is cancelled meanwhile."""
    try:
        return await asyncio.shield(work)
    except asyncio.CancelledError:
        await asyncio.gather(work, return_exceptions=True)
        raise


def _check(found: str, digest: model.Digest) -> None:
    if found != digest:
        raise blobs.WrongDigest(f"the bytes received are {found}, not {digest}")


def key(digest: model.Digest) -> str:
    algorithm, _, name = digest.partition(":")
    return f"blobs/{algorithm}/{name[:2]}/{name}"


def folder(digest: model.Digest, place: blobs.Place) -> str:
    """Where the copies of a blob lie that are not on the shelf."""
    return f"{place}/{digest.replace(':', '-')}/"


def _session(session: blobs.SessionId) -> str:
    return f"uploads/{session}/"


def _full_or(error: Exception) -> Exception:
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return blobs.DiskFull(f"the registry's storage is full ({error.strerror})")
    return error
