"""How the bytes of a blob leave: by the kernel, through this process, or from elsewhere.

* A local file goes out by aiohttp's FileResponse: in the clear that is the kernel's sendfile (`outlet`).
* What is elsewhere (a bucket) is read in pieces and passed on; memory is a few pieces.
* Where the storage has an address of its own for the blob, a GET is sent there with 307: the bytes do not touch this
  server at all.

What the request's conditions mean is decided here, for all three alike (`conditions`). A digest names bytes that never
change, so it is also their ETag; validators that are made of a file's times would differ from server to server.
"""

from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path
from typing import IO, Any

import multidict
from aiohttp import web
from aiohttp.abc import AbstractStreamWriter

from covey import answer as answers
from covey import serve
from covey.registry import blobs, conditions, outlet

_CONDITIONS = ("If-Match", "If-None-Match", "If-Range", "If-Modified-Since", "If-Unmodified-Since", "Range")
_CHUNK = 1 << 20  # what FileResponse reads at once where there is no sendfile (TLS)

Read = Callable[[int, int], AsyncIterator[bytes]]


async def answer(call: serve.Call, store: blobs.Blobs, blob: blobs.Blob) -> web.StreamResponse:
    """A blob, the part of it that is wanted, where to get it, or the news that the client has it already."""
    headers = {
        "Content-Type": "application/octet-stream",
        "Docker-Content-Digest": blob.digest,
        "Cache-Control": "max-age=31536000, immutable",
        "ETag": conditions.etag(blob.digest),
        "Server": "covey",
    }
    if not conditions.allows({"If-Match": call.headers.get("If-Match", "*")}, blob.digest):
        raise answers.Fault(412, f"{blob.digest} is not what If-Match names", code="DENIED")
    if conditions.unchanged(call.headers, blob.digest):
        return web.Response(status=304, headers=headers)
    part = conditions.wanted_range(call.headers, blob.digest)
    if part is not None and conditions.unsatisfiable(part, blob.size_bytes):
        where = {"Content-Range": f"bytes */{blob.size_bytes}"}
        raise answers.Fault(416, f"{part} is no part of {blob.size_bytes} bytes", code="SIZE_INVALID", headers=where)
    if blob.path is not None:
        return _FileOnce(blob.path, part, headers)
    if call.request.method == "GET" and (address := await store.address(blob)):
        return web.Response(status=307, headers={**headers, "Location": address, "Cache-Control": "no-store"})
    return _Passed(blob, part, lambda start, end: store.read(blob, start, end), headers)


class _FileOnce(web.FileResponse):
    """A file that is sent when it is prepared first; the server prepares answers itself, and aiohttp does so again. Of
    the request's conditions only `part` is left."""

    def __init__(self, path: Path, part: str | None, headers: Mapping[str, str]) -> None:
        super().__init__(path, chunk_size=_CHUNK, headers=headers)
        self._part = part
        self._etag_header = headers["ETag"]

    async def prepare(self, request: web.BaseRequest) -> AbstractStreamWriter | None:
        if self.prepared:
            return None
        decided = multidict.CIMultiDict(request.headers)
        for name in _CONDITIONS:
            decided.popall(name, None)
        if self._part is not None:
            decided["Range"] = self._part
        return await super().prepare(request.clone(headers=decided))

    async def _start(self, request: web.BaseRequest) -> AbstractStreamWriter:
        self.headers["ETag"] = self._etag_header
        self.headers.pop("Last-Modified", None)
        return await super()._start(request)

    async def _sendfile(self, request: web.BaseRequest, fobj: IO[Any], offset: int, count: int) -> AbstractStreamWriter:
        transport = request.transport
        if transport is None or transport.get_extra_info("sslcontext") is not None:
            return await super()._sendfile(request, fobj, offset, count)
        writer = await web.StreamResponse.prepare(self, request)
        assert writer is not None  # noqa: S101  it was not prepared before
        transport.set_write_buffer_limits(0)
        try:
            await writer.drain()  # the head, and what may wait of an answer before this one
            await outlet.send(transport, transport.get_extra_info("socket"), fobj.fileno(), offset, offset + count)
        except outlet.NoSendfile:
            return await self._sendfile_fallback(writer, fobj, offset, count)
        finally:
            transport.set_write_buffer_limits()
        await web.StreamResponse.write_eof(self)
        return writer


class _Passed(web.StreamResponse):
    """Bytes from elsewhere, sent when the answer is prepared."""

    def __init__(self, blob: blobs.Blob, part: str | None, read: Read, headers: Mapping[str, str]) -> None:
        start, end = (0, blob.size_bytes) if part is None else _edges(part, blob.size_bytes)
        super().__init__(status=200 if part is None else 206, headers={**headers, "Accept-Ranges": "bytes"})
        if part is not None:
            self.headers["Content-Range"] = f"bytes {start}-{end - 1}/{blob.size_bytes}"
        self.content_length = end - start
        self._start_at, self._end_at = start, end
        self._read = read

    async def prepare(self, request: web.BaseRequest) -> AbstractStreamWriter | None:
        if self.prepared:
            return None
        writer = await super().prepare(request)
        if request.method != "HEAD":
            async for piece in self._read(self._start_at, self._end_at):
                await self.write(piece)
        return writer


def _edges(part: str, size_bytes: int) -> tuple[int, int]:
    """Where a satisfiable range begins and ends."""
    first, last = part.removeprefix("bytes=").split("-")
    if not first:
        return max(0, size_bytes - int(last)), size_bytes
    return int(first), min(int(last) + 1, size_bytes) if last else size_bytes
