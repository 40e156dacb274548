"""OCI distribution: pushing blobs, in one piece, in chunks, or by mounting what another repository has.

Source: OCI distribution specification 1.1, "Pushing blobs". An upload that is cut, by the client or by this server
going down, ends at a durable offset, which GET on the upload tells and from which any server on the same storage goes
on. Bodies are streamed in constant memory.
"""

import re
import sys
from collections.abc import AsyncIterable, AsyncIterator, Mapping, Sequence

from aiohttp import web

from covey import answer, gate, model, room, serve
from covey.client import oci
from covey.registry import blobs, catalog, oci_faults

_CONTENT_RANGE = re.compile(r"(?:bytes[ =])?([0-9]{1,18})-([0-9]{1,18})(?:/(?:[0-9]+|\*))?")


class UploadApi:
    """Handlers of /v2/<name>/blobs/uploads/. `chunk_min_bytes` is announced where a storage likes no smaller chunks; a
    smaller one is taken all the same."""

    def __init__(self, catalog: catalog.Catalog, *, chunk_min_bytes: int = 0) -> None:
        self._catalog = catalog
        self._blobs = catalog.blobs
        self.writing = 0  # requests whose bytes are coming in
        self._begun = {"OCI-Chunk-Min-Length": str(chunk_min_bytes)} if chunk_min_bytes else {}

    def routes(self) -> Sequence[serve.Route]:
        sessions, session = "/v2/{name:path}/blobs/uploads/", "/v2/{name:path}/blobs/uploads/{session}"
        guard = oci_faults.oci_path
        return [
            _stream("POST", sessions, guard(self.begin)),
            _stream("POST", sessions.rstrip("/"), guard(self.begin)),
            serve.Route("GET", session, guard(self.status)),
            _stream("PATCH", session, guard(self.write)),
            _stream("PUT", session, guard(self.finish)),
            serve.Route("DELETE", session, guard(self.cancel)),
        ]

    async def begin(self, call: serve.Call) -> web.Response:
        name = call.params["name"]
        mount = call.query.get("mount", "")
        if mount and await self._mount(name, mount, call.query.get("from", "")):
            return _created(name, mount)
        digest = call.query.get("digest")
        if digest is not None:
            return await self._whole(call, model.Digest(digest))
        return _standing(202, name, await self._blobs.begin(), 0, self._begun)

    async def _mount(self, name: str, text: str, source: str) -> bool:
        """Whether `source` had the blob, so that `name` now has it too. Without a source any repository's will do
        (the specification's automatic discovery)."""
        digest = model.Digest(text)
        if not oci.valid_digest(digest) or (source and not oci.valid_name(source)):
            return False
        found = self._catalog.granted_blob(source, digest) if source else self._blobs.stat(digest)
        if await found is None:
            return False
        await self._catalog.logs.grant(name, digest)
        return True

    async def _whole(self, call: serve.Call, digest: model.Digest) -> web.Response:
        """The blob in the body of one POST. The client knows no session to resume, so none stays behind."""
        session = await self._blobs.begin()
        try:
            await self._take(session, 0, _body(call))
            return await self._publish(call.params["name"], session, digest)
        except blobs.Cut as error:
            raise answer.Fault(503, "the upload was cut; send it again", code="UNAVAILABLE") from error
        finally:
            await self._blobs.abort(session)

    async def _take(self, session: blobs.SessionId, start: int, body: AsyncIterable[bytes]) -> int:
        self.writing += 1
        try:
            return await self._blobs.write(session, start, body)
        finally:
            self.writing -= 1

    async def status(self, call: serve.Call) -> web.Response:
        session = blobs.SessionId(call.params["session"])
        return _standing(204, call.params["name"], session, await self._blobs.offset(session))

    async def write(self, call: serve.Call) -> web.Response:
        session = blobs.SessionId(call.params["session"])
        return _standing(202, call.params["name"], session, await self._write(call, session))

    async def _write(self, call: serve.Call, session: blobs.SessionId) -> int:
        """Append the request's body; the new durable offset. Raises the faults of a wrong range and of a cut."""
        name = call.params["name"]
        start, size_bytes = _range(call)
        try:
            standing = await self._blobs.offset(session)
            return await self._take(session, standing if start is None else start, _body(call, size_bytes))
        except blobs.WrongOffset as error:
            headers = _position(name, session, error.offset)
            raise answer.Fault(416, str(error), code="BLOB_UPLOAD_INVALID", headers=headers) from error
        except blobs.Cut as error:
            offset = await self._blobs.offset(session)
            headers = {**_position(name, session, offset), "Retry-After": "1"}
            text = f"the upload was cut; go on at {offset}"
            raise answer.Fault(503, text, code="UNAVAILABLE", headers=headers) from error

    async def finish(self, call: serve.Call) -> web.Response:
        name, session = call.params["name"], blobs.SessionId(call.params["session"])
        if "digest" not in call.query:
            raise answer.Fault(400, "the query names no digest", code="DIGEST_INVALID")
        digest = model.Digest(call.query["digest"])
        try:
            if call.request.has_body:
                await self._write(call, session)
            return await self._publish(name, session, digest)
        except blobs.NoSession:
            if await self._catalog.granted_blob(name, digest) is not None:  # a repetition: its answer was lost
                return _created(name, digest)
            raise

    async def _publish(self, name: str, session: blobs.SessionId, digest: model.Digest) -> web.Response:
        await self._blobs.finish(session, digest)
        await self._catalog.logs.grant(name, digest)
        await self._blobs.abort(session)
        return _created(name, digest)

    async def cancel(self, call: serve.Call) -> web.Response:
        session = blobs.SessionId(call.params["session"])
        await self._blobs.offset(session)  # raises when there is none
        await self._blobs.abort(session)
        return web.Response(status=204, headers={"Server": "covey"})


def _stream(method: str, path: str, handler: serve.Handler) -> serve.Route:
    """A route whose body is as long as it likes."""
    return serve.Route(method, path, handler, body_limit_bytes=sys.maxsize, time_limit_s=None, lane=gate.Lane.OPEN)


def _range(call: serve.Call) -> tuple[int | None, int | None]:
    """Where the request says that its bytes begin, and how many they are; None when it does not say."""
    text = call.headers.get("Content-Range")
    if text is None:
        return None, None
    found = _CONTENT_RANGE.fullmatch(text.strip())
    if found is None:
        raise answer.Fault(400, f"Content-Range {text!r} is not <first>-<last>", code="BLOB_UPLOAD_INVALID")
    first, last = int(found[1]), int(found[2])
    length = call.request.size_bytes
    if length is not None and length != last - first + 1:
        raise answer.Fault(400, f"Content-Range {text} does not fit {length} bytes", code="SIZE_INVALID")
    return first, last - first + 1


def _body(call: serve.Call, size_bytes: int | None = None) -> AsyncIterable[bytes]:
    """A request's body as `blobs` wants it. The length of one that comes directly has been announced, and so it has
    been compared with its range."""
    return _Direct(call) if call.request.direct else _chunks(call, size_bytes)


class _Direct:
    """`blobs.Direct`"""

    def __init__(self, call: serve.Call) -> None:
        self._call = call

    def __aiter__(self) -> AsyncIterator[bytes]:
        return _chunks(self._call)

    async def fill(self, into: room.Room) -> None:
        try:
            await self._call.fill(into)
        except (answer.Cut, ConnectionError) as error:
            raise blobs.Cut(str(error)) from error


async def _chunks(call: serve.Call, size_bytes: int | None = None) -> AsyncIterator[bytes]:
    """The body, its premature end in the words of `blobs`. One that is not as long as its range says is not taken."""
    found = 0
    try:
        async for chunk in call.chunks():
            found += len(chunk)
            if size_bytes is not None and found > size_bytes:
                break
            yield chunk
    except (answer.Cut, ConnectionError) as error:
        raise blobs.Cut(str(error)) from error
    if size_bytes not in (None, found):
        text = f"Content-Range promises {size_bytes} bytes, the body has {'more' if found > size_bytes else found}"
        raise answer.Fault(400, text, code="SIZE_INVALID")


def _position(name: str, session: blobs.SessionId, offset: int) -> dict[str, str]:
    """The headers that tell where an upload stands."""
    return {
        "Location": f"/v2/{name}/blobs/uploads/{session}",
        "Range": f"0-{max(0, offset - 1)}",
        "Docker-Upload-UUID": session,
        oci.OFFSET_HEADER: str(offset),
        "Server": "covey",
    }


def _standing(
    status: int, name: str, session: blobs.SessionId, offset: int, more: Mapping[str, str] = {}
) -> web.Response:
    return web.Response(status=status, headers={**_position(name, session, offset), **more})


def _created(name: str, digest: str) -> web.Response:
    headers = {"Location": f"/v2/{name}/blobs/{digest}", "Docker-Content-Digest": digest, "Server": "covey"}
    return web.Response(status=201, headers=headers)
