"""The typed client of a registry: manifests, blobs in both directions with resume, template views.

Rules: bytes are verified against their digest before a file appears under its name (promise I8); a transfer that is
cut goes on where it stood, at the next server if need be, and is given up only when nothing moved for a while
(`patience_s`: a server may be starting again); memory is constant. Faults: NotFound and Refused carry the registry's
text, RemoteError means that no registry gave an answer.

Used by agents (fetch by digest), the controller (views, `resolve`), the CLI and registry peers.
"""

import asyncio
import contextlib
import hashlib
import io
import os
import threading
import urllib.parse
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import aiohttp
import msgspec

from covey import durable, errors, model
from covey.client import http, oci

Progress = Callable[[int], None]  # called with the bytes that are done so far

_READ = 1 << 20
_PIECE = 512 << 20  # one PATCH: bounds what a killed server loses; a file of one piece is published without a copy
_PAUSE_S = 0.1  # after a failed try, doubled with each one in a row
_PAUSE_LIMIT_S = 2.0
_HEADERS_S = 5.0  # a server that has not begun to answer a download by then is left, if there is another one
_SLOW_DISK = 20e6  # bytes/s that a server can at least make durable


class Registry:
    """One registry, reached by one or several URLs of equal servers."""

    def __init__(self, endpoints: http.Endpoints, *, patience_s: float = 15.0, stall_s: float = 30.0) -> None:
        """`stall_s`: a peer that sends or takes nothing for so long is left."""
        self._http = endpoints
        self._patience_s = patience_s
        self._stall_s = stall_s

    # ---- template views --------------------------------------------------------------------------------------------

    async def templates(self) -> list[oci.TemplateItem]:
        return await self._http.ask("GET", "/registry/v2/vm", list[oci.TemplateItem])

    async def template(self, wanted: str) -> oci.TemplateView:
        """A template by id or name, versions oldest first. Raises NotFound."""
        if not wanted:  # without an id the same path lists all
            raise errors.NotFound("Not found")
        return await self._http.ask("GET", "/registry/v2/vm?" + _query(id=wanted), oci.TemplateView)

    async def resolve(self, template: str, tag: str = "", version: int | None = None) -> oci.Resolved:
        """One version by template id or name; the newest when neither tag nor version is given (safety S14).
        Raises NotFound for the template, Refused ``No such tag …`` or ``No such version …``, RemoteError when no
        registry can say."""
        number = "" if version is None else str(version)
        query = _query(id=template, tag=tag, version=number)
        return await self._http.ask("GET", "/registry/vm/info?" + query, oci.Resolved)

    async def delete(self, template: str) -> None:
        """Delete a template, by id or name, for ever. Harmless when repeated. Raises NotFound."""
        await self._http.ask("DELETE", "/registry/vm?" + _query(id=template), type(None))

    async def revert(self, template: str, tag: str = "", version: int | None = None) -> oci.Resolved:
        """Take back a version (the newest without tag and version) and all newer ones: the version it was. What it is
        is settled first, so that a repeat whose answer was lost takes back no other one (safety S38)."""
        found = await self.resolve(template, tag, version)
        query = {"id": found.id, "version": str(found.number), "digest": found.digest}
        await self.revert_as_asked(query, {}, "")
        return found

    async def revert_as_asked(self, query: Mapping[str, str], body: Mapping[str, object], key: str) -> None:
        """A revert in the words of whoever asks for it; `key` ("": none) makes a repeat the same request."""
        headers = {"Idempotency-Key": key} if key else {}
        await self._http.ask("DELETE", "/registry/revert?" + _query(**query), type(None), dict(body), headers=headers)

    async def set_arch(self, template: str, arch: model.Arch) -> None:
        """Correct the architecture that a template's versions say. Harmless when repeated. Raises NotFound."""
        await self._http.ask("PUT", "/registry/vm/arch", type(None), {"id": template, "arch": arch})

    async def disk(self) -> oci.DiskView:
        return await self._http.ask("GET", "/registry/disk", oci.DiskView)

    async def hold_name(self, name: str) -> model.TemplateId:
        """The id of the template of this name; a new name gets a fresh id. Harmless when repeated."""
        held = await self._http.ask("POST", "/registry/v2/vm", oci.NameHeld, oci.NameAsk(name=name), repeatable=True)
        return held.id

    # ---- manifests -------------------------------------------------------------------------------------------------

    async def manifest(self, repository: str, reference: str) -> tuple[oci.Manifest, model.Digest, bytes]:
        """A manifest by tag or digest: parsed, its digest, its bytes. Asked for by digest, it is verified."""
        accept = {"Accept": ", ".join(oci.MANIFEST_TYPES)}
        _, content = await self._call("GET", f"/v2/{repository}/manifests/{reference}", headers=accept)
        digest = oci.digest_of(content)
        if oci.valid_digest(reference) and reference != digest:
            raise errors.RemoteError(f"the registry sent manifest {digest} for {reference}")
        return oci.parse_manifest(content), digest, content

    async def push_manifest(
        self, repository: str, reference: str, content: bytes, *, force: bool = False
    ) -> tuple[model.Digest, int | None]:
        """Push a manifest: its digest and, for a template under a tag, its version number. Harmless when repeated."""
        headers = {"Content-Type": oci.parse_manifest(content).media_type or oci.OCI_MANIFEST}
        if force:
            headers[oci.FORCE_HEADER] = "true"
        path = f"/v2/{repository}/manifests/{reference}"
        answered, _ = await self._call("PUT", path, data=content, headers=headers)
        number = answered.get(oci.VERSION_HEADER)
        return oci.digest_of(content), None if number is None else int(number)

    async def delete_manifest(self, repository: str, reference: str) -> None:
        """Delete a tag, or a manifest with all its tags. Raises NotFound."""
        await self._call("DELETE", f"/v2/{repository}/manifests/{reference}")

    # ---- pulling blobs ---------------------------------------------------------------------------------------------

    async def has_blob(self, repository: str, digest: str) -> bool:
        try:
            await self._call("HEAD", f"/v2/{repository}/blobs/{digest}")
        except errors.NotFound:
            return False
        return True

    async def stream(self, repository: str, digest: str, offset: int = 0) -> AsyncIterator[bytes]:
        """The bytes of a blob from `offset` on, from one server, as they come: not verified, not resumed. Raises
        RemoteError when the transfer is cut."""
        headers = {"Range": f"bytes={offset}-"} if offset else {}
        async with self._open("GET", f"/v2/{repository}/blobs/{digest}", headers=headers) as answer:
            if offset and answer.status != 206:
                raise errors.RemoteError(f"{answer.url}: the server does not send ranges", answer.status)
            with _as_remote(answer.url):
                async for chunk in answer.content.iter_chunked(_READ):
                    yield chunk

    async def content(self, repository: str, digest: str, limit_bytes: int = oci.CONFIG_LIMIT) -> bytes:
        """A small blob (a template's config), verified."""
        parts = bytearray()
        async for chunk in self.stream(repository, digest):
            parts += chunk
            if len(parts) > limit_bytes:
                raise errors.RemoteError(f"{digest} is larger than {limit_bytes} bytes")
        if oci.digest_of(bytes(parts)) != digest:
            raise errors.RemoteError(f"the registry sent {oci.digest_of(bytes(parts))} for {digest}")
        return bytes(parts)

    async def fetch(
        self, repository: str, digest: str, size_bytes: int, target: Path, *, progress: Progress | None = None
    ) -> None:
        """Download a blob to `target`, which appears only when it is whole, verified and durable. What an earlier call
        left in ``<target>.part`` is continued. One call per target at a time."""
        partial = target.with_name(target.name + ".part")
        download = await asyncio.to_thread(_Download, partial, size_bytes)
        try:
            await self._persist(lambda: self._fetch_on(repository, digest, download, progress), lambda: download.offset)
            found = download.digest
        finally:
            await asyncio.to_thread(download.close)
        if found != digest:
            await asyncio.to_thread(partial.unlink)
            raise errors.RemoteError(f"the registry sent {found} for {digest}")
        await asyncio.to_thread(_reveal, partial, target)

    async def _fetch_on(self, repository: str, digest: str, download: "_Download", progress: Progress | None) -> None:
        """Download from where it stands to the end, or raise."""
        if download.offset < download.size_bytes:
            async for chunk in self.stream(repository, digest, download.offset):
                if download.offset + len(chunk) > download.size_bytes:
                    raise errors.RemoteError(f"{digest} is longer than the {download.size_bytes} bytes of its manifest")
                await asyncio.to_thread(download.add, chunk)
                if progress is not None:
                    progress(download.offset)
        if download.offset != download.size_bytes:
            raise errors.RemoteError(f"{digest} ended at {download.offset} of {download.size_bytes} bytes")

    # ---- pushing blobs ---------------------------------------------------------------------------------------------

    async def upload(self, repository: str, digest: str, source: Path, *, progress: Progress | None = None) -> bool:
        """Make the file `source` a blob of the repository. False when no byte had to move: it was there, or another
        repository had it. Harmless when repeated."""
        size_bytes = source.stat().st_size
        if await self.has_blob(repository, digest):
            return False
        location = await self._begin(repository, digest)
        if location is None:
            return False
        upload = _Upload(location, size_bytes)

        async def once() -> None:
            await self._upload_on(repository, digest, source, upload, progress)

        await self._persist(once, lambda: upload.best)
        return True

    async def upload_bytes(self, repository: str, content: bytes) -> model.Digest:
        """Make `content` a blob of the repository in one request."""
        digest = oci.digest_of(content)
        if not await self.has_blob(repository, digest):
            await self._call("POST", f"/v2/{repository}/blobs/uploads/?" + _query(digest=digest), data=content)
        return digest

    async def _begin(self, repository: str, digest: str) -> str | None:
        """Ask for a mount: the location of an upload session, or None when the blob has been mounted."""
        answered, _ = await self._call("POST", f"/v2/{repository}/blobs/uploads/?" + _query(mount=digest))
        location = answered.get("Location", "")
        return None if location.endswith(f"/blobs/{digest}") else _path(location)

    async def _upload_on(
        self, repository: str, digest: str, source: Path, upload: "_Upload", progress: Progress | None
    ) -> None:
        """Upload from where the session stands to the end, or raise. A lost session is begun anew."""
        try:
            if upload.uncertain:
                answered, _ = await self._call("GET", upload.location)
                upload.stands(answered)
            while upload.offset < upload.size_bytes:
                upload.uncertain = True
                upload.stands(await self._send_piece(source, upload, progress))
            upload.uncertain = True
            finish = f"{upload.location}?" + _query(digest=digest)
            await self._call("PUT", finish, work_s=upload.size_bytes / _SLOW_DISK)
        except errors.NotFound:
            location = await self._begin(repository, digest)
            if location is not None:
                upload.restart(location)
                raise errors.RemoteError("the registry lost the upload; it begins anew") from None

    async def _send_piece(self, source: Path, upload: "_Upload", progress: Progress | None) -> Mapping[str, str]:
        start, length = upload.offset, min(_PIECE, upload.size_bytes - upload.offset)
        headers = {
            "Content-Type": "application/octet-stream",
            "Content-Length": str(length),
            "Content-Range": f"{start}-{start + length - 1}",
        }
        stall_s = self._stall_s + length / _SLOW_DISK  # at the end the server makes the piece durable
        loop = asyncio.get_running_loop()
        with self._limit(f"PATCH {upload.location}", stall_s) as limit:

            def moved(done: int) -> None:
                limit.reschedule(loop.time() + stall_s)
                if progress is not None:
                    progress(start + done)

            body = _file_piece(source, start, length, moved)
            async with limit, self._open("PATCH", upload.location, data=body, headers=headers) as answer:
                return answer.headers

    async def _persist(self, attempt: Callable[[], Awaitable[None]], standing: Callable[[], int]) -> None:
        """Repeat `attempt` over RemoteErrors until it succeeds, or nothing has moved for as long as patience lasts."""
        loop = asyncio.get_running_loop()
        pause_s, moved_at = _PAUSE_S, loop.time()
        while True:
            before = standing()
            try:
                await attempt()
                return
            except errors.RemoteError as error:
                if standing() > before:
                    pause_s, moved_at = _PAUSE_S, loop.time()
                final = 400 <= error.status < 500 or error.status == 507
                if final or loop.time() + pause_s > moved_at + self._patience_s:
                    raise
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, _PAUSE_LIMIT_S)

    # ---- calls -----------------------------------------------------------------------------------------------------

    async def _call(
        self, method: str, path: str, *, data: bytes | None = None, headers: Mapping[str, str] = {}, work_s: float = 0.0
    ) -> tuple[Mapping[str, str], bytes]:
        """One call that may be repeated and succeeds in the end: the answer's headers and body. `work_s` is what the
        server may need for it beside an ordinary answer. Reading fails over within the call."""
        answers: list[tuple[Mapping[str, str], bytes]] = []

        async def once() -> None:
            if method in ("GET", "HEAD"):
                reply = await self._http.send(method, path, headers=headers, timeout_s=self._stall_s)
                if reply.status >= 400:
                    raise _fault(reply.status, reply.body)
                answers.append((reply.headers, reply.body))
                return
            with self._limit(f"{method} {path}", self._stall_s + work_s) as limit:
                async with limit, self._open(method, path, data=data, headers=headers) as answer:
                    with _as_remote(answer.url):
                        answers.append((answer.headers, await answer.read()))

        await self._persist(once, lambda: 0)
        return answers[-1]

    @contextlib.contextmanager
    def _limit(self, what: str, limit_s: float) -> Iterator[asyncio.Timeout]:
        """A deadline whose passing is the fault of the server that was asked: it is left for a while."""
        try:
            yield asyncio.timeout(limit_s)
        except TimeoutError as error:
            self._http.mark_bad(self._http.pick())
            raise errors.RemoteError(f"{what}: nothing moved for {limit_s:.0f} s") from error

    @contextlib.asynccontextmanager
    async def _open(
        self, method: str, path: str, *, data: Any = None, headers: Mapping[str, str] = {}
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """One request, at the next server when one cannot be reached or is going down. An error status is raised as
        our own fault. The caller sees to it that it ends: only a silent download is left by itself."""
        stall_s = self._stall_s if method == "GET" else None
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=2.0, sock_read=stall_s)
        failures: list[str] = []
        for _ in self._http.urls:
            url = self._http.pick()
            body = io.BytesIO(data) if isinstance(data, bytes) else data  # aiohttp sends a stream in pieces
            try:
                async with asyncio.timeout(_HEADERS_S if method == "GET" and len(self._http.urls) > 1 else None):
                    answer = await self._http.session.request(
                        method, url + path, data=body, headers=dict(headers), timeout=timeout
                    )
            except (aiohttp.ClientError, OSError) as error:
                self._http.mark_bad(url)
                failures.append(f"{url}: {type(error).__name__}{f' {error}' if str(error) else ''}")
            else:
                async with answer:
                    if answer.status < 400:
                        yield answer
                        return
                    fault = await _read_fault(answer)
                if answer.status != 503:
                    raise fault
                self._http.mark_bad(url)
                failures.append(f"{url}: {fault}")
            if body is not None and not isinstance(data, bytes):
                break  # a stream that was begun cannot be sent again
        raise errors.RemoteError("; ".join(failures))


class _Upload:
    """Where one upload stands. `uncertain`: the server must be asked before going on."""

    def __init__(self, location: str, size_bytes: int) -> None:
        self.location = location
        self.size_bytes = size_bytes
        self.offset = 0
        self.best = 0  # grows with progress: tells a slow transfer from a stuck one
        self.uncertain = False

    def stands(self, headers: Mapping[str, str]) -> None:
        self.offset = int(headers[oci.OFFSET_HEADER])
        self.best = max(self.best, self.offset)
        self.uncertain = False

    def restart(self, location: str) -> None:
        self.location, self.offset, self.uncertain = location, 0, False


class _Download:
    """A partial file and the hash of what is in it. Blocking: used in worker threads only. `close` waits for an `add`
    whose caller was cancelled, so that the next download of this file finds it at rest."""

    def __init__(self, path: Path, size_bytes: int) -> None:
        self.size_bytes = size_bytes
        self.offset = 0
        self._sha256 = hashlib.sha256()
        self._lock = threading.Lock()
        self._file = path.open("a+b", buffering=0)
        self._file.seek(0)
        while chunk := self._file.read(_READ):
            self._sha256.update(chunk)
            self.offset += len(chunk)
        if self.offset > size_bytes:
            self._file.truncate(0)
            self.offset, self._sha256 = 0, hashlib.sha256()

    @property
    def digest(self) -> str:
        return "sha256:" + self._sha256.hexdigest()

    def add(self, chunk: bytes) -> None:
        with self._lock:
            view = memoryview(chunk)
            while view:
                view = view[self._file.write(view) or 0 :]
            self._sha256.update(chunk)
            self.offset += len(chunk)

    def close(self) -> None:
        with self._lock:
            os.fsync(self._file.fileno())
            self._file.close()


def _reveal(partial: Path, target: Path) -> None:
    """Give a whole, durable file its name."""
    partial.rename(target)
    durable.sync_dir(target.parent)


async def _file_piece(source: Path, start: int, length: int, moved: Progress) -> AsyncIterator[bytes]:
    """Bytes of a file as a request's body."""
    stream = await asyncio.to_thread(source.open, "rb", buffering=0)
    try:
        await asyncio.to_thread(stream.seek, start)
        done = 0
        while done < length:
            chunk = await asyncio.to_thread(stream.read, min(_READ, length - done))
            if not chunk:
                raise errors.Refused(f"{source} became shorter while it was uploaded")
            yield chunk
            done += len(chunk)
            moved(done)
    finally:
        stream.close()


async def _read_fault(answer: aiohttp.ClientResponse) -> errors.CoveyError:
    body = b""
    with contextlib.suppress(aiohttp.ClientError, OSError):
        body = await answer.read()
    return _fault(answer.status, body)


def _fault(status: int, body: bytes) -> errors.CoveyError:
    """An error answer as our own fault, with the registry's text."""
    text = f"HTTP {status}"
    with contextlib.suppress(msgspec.MsgspecError, UnicodeDecodeError, LookupError, TypeError):
        text = msgspec.json.decode(body)["errors"][0]["message"]
    if status == 404:
        return errors.NotFound(text)
    if status in (400, 405, 409, 413):
        return errors.Refused(text)
    return errors.RemoteError(text, status)


@contextlib.contextmanager
def _as_remote(url: object) -> Iterator[None]:
    """A cut transfer as RemoteError."""
    try:
        yield
    except (aiohttp.ClientError, OSError) as error:
        raise errors.RemoteError(f"{url}: {type(error).__name__}{f' {error}' if str(error) else ''}") from error


def _query(**items: str) -> str:
    return urllib.parse.urlencode({name: text for name, text in items.items() if text})


def _path(location: str) -> str:
    """The path of a Location: the session may go on at any server of the registry."""
    return urllib.parse.urlsplit(location).path
