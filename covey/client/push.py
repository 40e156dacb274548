"""One blob goes up: asked for first, mounted from wherever it is, and only then sent; a cut or killed upload goes on.

An upload session is remembered in a file (`remembered`) before the first byte goes out. Whoever pushes the same blob
next, this process or a later one, asks the session where it stands and goes on there, at any server of the registry.
The registry hashes what it receives: a file that changes meanwhile is refused. Memory: one piece.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path

from covey import errors
from covey.client import line, oci, remembered

Progress = Callable[[int], None]  # called with the bytes that are sent

_PIECE = 512 << 20  # one PATCH: bounds what a killed server loses; a file of one piece is published without a copy
_SLOW_DISK = 20e6  # bytes/s that a server can at least make durable


class Push:
    """Sends blobs to one registry."""

    def __init__(self, line: line.Line, notes: remembered.Notes | None) -> None:
        self._line = line
        self._notes = notes

    async def has(self, repository: str, digest: str) -> bool:
        try:
            await self._line.call("HEAD", f"/v2/{repository}/blobs/{digest}")
        except errors.NotFound:
            return False
        return True

    async def upload(self, repository: str, digest: str, source: Path, *, progress: Progress | None = None) -> bool:
        """Make the file `source` a blob of the repository. False when no byte had to move: it was there, or another
        repository had it. Harmless when repeated."""
        key = f"{self._line.name} {repository} {digest}"
        session = await asyncio.to_thread(remembered.session, self._notes, key)
        try:
            there = await self.has(repository, digest)
            moved = not there and await self._upload(repository, digest, source, session, progress)
            session.forget()
        finally:
            session.close()
        return moved

    async def _upload(
        self, repository: str, digest: str, source: Path, session: remembered.Session, progress: Progress | None
    ) -> bool:
        known = session.location
        location: str | None = known or await self._begin(repository, digest)
        if location is None:
            return False
        session.remember(location)
        upload = _Upload(location, source.stat().st_size, session, uncertain=bool(known))

        async def once() -> None:
            await self._upload_on(repository, digest, source, upload, progress)

        await self._line.persist(once, lambda: upload.best)
        return True

    async def _begin(self, repository: str, digest: str) -> str | None:
        """Ask for a mount: the location of an upload session, or None when the blob has been mounted."""
        answered, _ = await self._line.call("POST", f"/v2/{repository}/blobs/uploads/?" + line.query(mount=digest))
        location = answered.get("Location", "")
        return None if location.endswith(f"/blobs/{digest}") else line.path_of(location)

    async def _upload_on(
        self, repository: str, digest: str, source: Path, upload: "_Upload", progress: Progress | None
    ) -> None:
        """Upload from where the session stands to the end, or raise. A lost session is begun anew."""
        try:
            if upload.uncertain:
                answered, _ = await self._line.call("GET", upload.location)
                upload.stands(answered)
            while upload.offset < upload.size_bytes:
                upload.uncertain = True
                upload.stands(await self._send_piece(source, upload, progress))
            upload.uncertain = True
            finish = f"{upload.location}?" + line.query(digest=digest)
            await self._line.call("PUT", finish, work_s=upload.size_bytes / _SLOW_DISK)
        except errors.NotFound:
            location = await self._begin(repository, digest)
            if location is not None:
                upload.restart(location)
                raise errors.RemoteError("the registry lost the upload; it begins anew") from None
        except errors.RemoteError as error:
            if error.status != 416:
                raise
            raise errors.RemoteError(str(error)) from error  # what a killed push sent was still being written

    async def _send_piece(self, source: Path, upload: "_Upload", progress: Progress | None) -> Mapping[str, str]:
        start, length = upload.offset, min(_PIECE, upload.size_bytes - upload.offset)
        headers = {
            "Content-Type": "application/octet-stream",
            "Content-Length": str(length),
            "Content-Range": f"{start}-{start + length - 1}",
        }
        stall_s = self._line.stall_s + length / _SLOW_DISK  # at the end the server makes the piece durable
        loop = asyncio.get_running_loop()
        with self._line.limit(f"PATCH {upload.location}", stall_s) as limit:

            def moved(done: int) -> None:
                limit.reschedule(loop.time() + stall_s)
                if progress is not None:
                    progress(start + done)

            body = _file_piece(source, start, length, moved)
            async with limit, self._line.open("PATCH", upload.location, data=body, headers=headers) as answer:
                return answer.headers


class _Upload:
    """Where one upload stands. `uncertain`: the server must be asked before going on."""

    def __init__(self, location: str, size_bytes: int, session: remembered.Session, *, uncertain: bool) -> None:
        self.location = location
        self.size_bytes = size_bytes
        self.offset = 0
        self.best = 0  # grows with progress: tells a slow transfer from a stuck one
        self.uncertain = uncertain
        self._session = session

    def stands(self, headers: Mapping[str, str]) -> None:
        self.offset = int(headers[oci.OFFSET_HEADER])
        self.best = max(self.best, self.offset)
        self.uncertain = False

    def restart(self, location: str) -> None:
        self.location, self.offset, self.uncertain = location, 0, False
        self._session.remember(location)


async def _file_piece(source: Path, start: int, length: int, moved: Progress) -> AsyncIterator[bytes]:
    """Bytes of a file as a request's body."""
    stream = await asyncio.to_thread(source.open, "rb", buffering=0)
    try:
        await asyncio.to_thread(stream.seek, start)
        done = 0
        while done < length:
            chunk = await asyncio.to_thread(stream.read, min(line.READ_BYTES, length - done))
            if not chunk:
                raise errors.Refused(f"{source} became shorter while it was uploaded")
            yield chunk
            done += len(chunk)
            moved(done)
    finally:
        stream.close()
