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
created, and only that makes it count. A session of one part is copied under its sha256 within the store, several parts
are joined there (`s3_join`): no byte comes back. What they are all together is known from the records when one server
has taken them in their order, since a record tells the sha256 of all bytes up to its end; else, and for sha512, they
are read once more. Where the store cannot join (parts below 5 MiB, credentials we do not know), they are sent again
while they are read, straight under the digest: a multipart upload shows nothing until it is completed, and it is
completed only when the hash is right. So a name never stands for other bytes, and nobody writes to an object that was
published: S3 replaces objects whole, and here by equal content only.

A long PATCH is entered as several parts of 4 GiB, so that what a cut costs is bounded.

`offset` is one listing and one read: records are dense, so the last one tells where the session stands.
"""

import asyncio
import contextlib
import errno
import hashlib
import re
from collections.abc import AsyncIterable, AsyncIterator, Sequence
from typing import TYPE_CHECKING, TypeVar

import msgspec

from covey import errors, failpoint, model, world
from covey.client import oci
from covey.registry import blobs, s3_bucket, s3_join

if TYPE_CHECKING:
    from hashlib import _Hash as Hash

T = TypeVar("T")

_BATCH = 2 << 20
_PART_LIMIT = 4 << 30
_RUNNING = 1000  # sessions whose hash is kept
_SESSION = re.compile(r"[0-9a-f]{32}")
_ENDLESS = 1 << 50  # a bucket has no end; a number that JSON readers can hold


class _Part(model.Noun, frozen=True, kw_only=True):
    """The record of one part. `data` names its object. `through`: the sha256 of all bytes from the session's first to
    this part's last, "" where nobody knows. `sha256`: of the first part the same, for servers before 0.4."""

    data: str
    size_bytes: int
    sha256: str = ""
    through: str = ""


class S3:
    """`blobs.Blobs` in one bucket."""

    def __init__(self, bucket: s3_bucket.Bucket, world: world.World) -> None:
        self.bucket = bucket
        self._world = world
        self._running: dict[blobs.SessionId, tuple[int, Hash]] = {}  # up to that offset, of uploads that came here

    async def open(self) -> None:
        """Mark a new bucket with the number of its layout; refuse one that a newer server has raised."""
        name = self.bucket.config.bucket
        try:
            if await self.bucket.create("format", str(blobs.FORMAT).encode()):
                return
            found = (await self.bucket.get("format")).decode(errors="replace").strip()
        except (errors.Unavailable, FileNotFoundError) as error:
            raise errors.SettingError(f"BACKEND_S3_BUCKET {name} cannot hold a registry: {error}") from error
        text = f"BACKEND_S3_BUCKET {name} has format {found}, this server knows {blobs.FORMAT}; use a newer Covey"
        raise errors.SettingError(text)

    # ---- finished blobs --------------------------------------------------------------------------------------------

    async def stat(self, digest: model.Digest) -> blobs.Blob | None:
        found = await self.bucket.find(key(digest))
        if found is None and await self._take_back(digest):
            found = await self.bucket.find(key(digest))
        return None if found is None else blobs.Blob(digest=digest, size_bytes=found.size_bytes)

    async def get(self, digest: model.Digest) -> bytes:
        try:
            return await self.bucket.get(key(digest))
        except FileNotFoundError:
            if not await self._take_back(digest):
                raise
        return await self.bucket.get(key(digest))

    async def _take_back(self, digest: model.Digest) -> bool:
        """Copy a blob out of the trash: whoever asks for it may be about to need it (`s3_care`)."""
        for item in await self.bucket.below(folder(digest, blobs.Place.TRASH)):
            with contextlib.suppress(FileNotFoundError):  # the collector was first
                await self.bucket.copy(item.key, key(digest), item.size_bytes)
                return True
        return False

    async def _published(self, digest: model.Digest, size_bytes: int) -> blobs.Blob:
        failpoint.reach("registry.blob.linked")
        bad = await self.bucket.below(folder(digest, blobs.Place.QUARANTINE))
        await self.bucket.delete([item.key for item in bad])  # healed
        return blobs.Blob(digest=digest, size_bytes=size_bytes)

    def read(self, blob: blobs.Blob, start: int = 0, end: int | None = None) -> AsyncIterator[bytes]:
        return self.bucket.read(key(blob.digest), start, blob.size_bytes if end is None else end)

    async def address(self, blob: blobs.Blob) -> str:
        return await self.bucket.sign(key(blob.digest))

    async def put(self, content: bytes, digest: model.Digest | None = None) -> blobs.Blob:
        found = oci.digest_of(content, oci.algorithm_of(digest) if digest else oci.SHA256)
        if digest not in (None, found):
            raise blobs.WrongDigest(f"the bytes are {found}, not {digest}")
        try:
            failpoint.reach("registry.put.written")
            await self.bucket.put(key(found), content)
        except OSError as error:
            raise _full_or(error) from error
        return await self._published(found, len(content))

    # ---- upload sessions -------------------------------------------------------------------------------------------

    async def begin(self) -> blobs.SessionId:
        session = blobs.SessionId(self._world.token() + self._world.token())
        await self.bucket.put(f"{_session(session)}begun", b"")
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
        found = [] if not _SESSION.fullmatch(session) else await self.bucket.below(_session(session))
        names = [item.key for item in found]
        if f"{_session(session)}begun" not in names:
            raise blobs.NoSession(f"no upload session {session}")
        return [name for name in names if "/part." in name]

    async def _part(self, record: str) -> _Part:
        return msgspec.json.decode(await self.bucket.get(record), type=_Part)

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
        part = incoming.part(self._hash_up_to(session, start))
        try:
            await self.bucket.send(data, part.batches())
            failpoint.reach("registry.part.written")
            found = "" if part.hash is None else part.hash.hexdigest()
            record = _Part(
                data=data.rpartition("/")[2],
                size_bytes=part.size_bytes,
                sha256="" if start else found,
                through=found,
            )
            kept = True  # unless we know better: an answer may be lost
            kept = await _settled(asyncio.ensure_future(self._enter(session, start, record)))
            if not kept:
                raise blobs.WrongOffset(await self.offset(session))
        finally:
            if not kept:
                await _settled(asyncio.ensure_future(self.bucket.delete([data])))
        failpoint.reach("registry.part.entered")
        if part.hash is not None:
            self._running[session] = start + part.size_bytes, part.hash
        return start + part.size_bytes

    def _hash_up_to(self, session: blobs.SessionId, start: int) -> "Hash | None":
        """To be gone on with, if this server knows it."""
        if not start:
            return hashlib.sha256()
        known, found = self._running.pop(session, (0, hashlib.sha256()))
        while len(self._running) > _RUNNING:
            self._running.pop(next(iter(self._running)))
        return found.copy() if known == start else None

    async def _enter(self, session: blobs.SessionId, start: int, record: _Part) -> bool:
        """Create the record. Raises NoSession when the session went away meanwhile."""
        name = f"{_session(session)}part.{start:020d}"
        if not await self.bucket.create(name, msgspec.json.encode(record)):
            return False
        if await self.bucket.find(f"{_session(session)}begun") is None:
            await self.bucket.delete([name, f"{_session(session)}{record.data}"])
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
        sources = [s3_join.Source(f"{_session(session)}{part.data}", part.size_bytes) for part in parts]
        known = _known(parts) if oci.algorithm_of(digest) == oci.SHA256 else ""
        if known:
            _check(f"{oci.SHA256}:{known}", digest)
        size = sum(part.size_bytes for part in parts)
        if not parts:
            await self.put(b"", digest)
        elif len(parts) == 1 and known:
            await self.bucket.copy(sources[0].key, key(digest), size)
        else:
            failpoint.reach("registry.upload.joined")
            await self._join(sources, digest, size, checked=bool(known))
        return await self._published(digest, size)

    async def _join(
        self, sources: Sequence[s3_join.Source], digest: model.Digest, size_bytes: int, *, checked: bool
    ) -> None:
        """Put the parts together under the digest; unless they were checked, they are read for it."""
        if not self.bucket.joins(sources):
            await self.bucket.send(key(digest), self._read_all(sources, digest), size_bytes)
            return
        if not checked:
            async for _ in self._read_all(sources, digest):
                pass
        await self.bucket.join(key(digest), sources)

    async def _read_all(self, sources: Sequence[s3_join.Source], digest: model.Digest) -> AsyncIterator[bytes]:
        """The bytes in their order. Raises WrongDigest at the end, before anything is visible."""
        found = hashlib.new(oci.algorithm_of(digest))
        for source in sources:
            async for piece in self.bucket.read(source.key, 0, source.size_bytes):
                await asyncio.to_thread(found.update, piece)
                yield piece
        _check(f"{found.name}:{found.hexdigest()}", digest)

    async def abort(self, session: blobs.SessionId) -> None:
        """`begun` goes first: what is left of a session that was aborted half is no session."""
        if not _SESSION.fullmatch(session):
            return
        self._running.pop(session, None)
        await self.bucket.delete([f"{_session(session)}begun"])
        await self.bucket.delete([item.key for item in await self.bucket.below(_session(session))])

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

    def part(self, hash: "Hash | None") -> "_PartIn":
        return _PartIn(self, hash)

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
    """One part on its way: `hash` and size grow while `batches` is read."""

    def __init__(self, incoming: _Incoming, hash: "Hash | None") -> None:
        self.hash = hash
        self.size_bytes = 0
        self._incoming = incoming

    async def batches(self) -> AsyncIterator[bytes]:
        while self.size_bytes < _PART_LIMIT and (batch := await self._incoming.batch()):
            failpoint.reach("registry.part.write")
            if self.hash is not None:
                await asyncio.to_thread(self.hash.update, batch)
            self.size_bytes += len(batch)
            yield batch


async def _settled(work: asyncio.Future[T]) -> T:
    """What becomes of work that must be settled, also when the caller is cancelled meanwhile."""
    try:
        return await asyncio.shield(work)
    except asyncio.CancelledError:
        await asyncio.gather(work, return_exceptions=True)
        raise


def _known(parts: Sequence[_Part]) -> str:
    """The sha256 of all bytes, as the records tell it; "" when they do not."""
    if not parts:
        return ""
    return parts[-1].through or (parts[0].sha256 if len(parts) == 1 else "")


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
