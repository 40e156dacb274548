"""The other servers of a set of replicas: what they tell each other, and how one is asked.

    follower ── feed(cursor) ─────────► holder      which logs have grown since
             ── entries(log, start) ──►             what came in, byte for byte
             ── inventory() ──────────►             how every log stands, from time to time
             ── open(digest, start) ──► any server  the bytes of a blob that it has, verified

How a log stands is a `Head`: how many entries, and a chain of digests over all of them. Two logs with one head are the
same log; so "is mine a beginning of yours?" takes one comparison, and no entry is sent twice.

Peers know each other by a secret that all servers of a set are given. It travels in a header, is compared in constant
time, and stands in no log.
"""

import contextlib
import hmac
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol, TypeVar

import aiohttp
import msgspec

from covey import answer, errors, model, serve
from covey.client import http, line

T = TypeVar("T")

SECRET_HEADER = "Covey-Peer-Secret"  # noqa: S105  its name
_READ_BYTES = 256 << 10
_RECEIVE_BYTES = 1 << 20  # what waits in the kernel is fetched twice when this process is killed
_STALL_S = 15.0  # a peer that sends nothing for so long, in the middle of a blob, is left
_ASK_S = 10.0
_WORD_S = 3.0


class Word(model.Noun, frozen=True, kw_only=True):
    """Who takes pushes, as a server knows."""

    term: int
    holder: str


class Head(model.Noun, frozen=True, kw_only=True):
    """How a log stands."""

    count: int = 0
    chain: str = ""


class Feed(model.Noun, frozen=True, kw_only=True):
    """Heads that have changed since `cursor` was another one; all of them for a cursor that is not known. `term` and
    `holder`: who takes pushes, as the server that tells it knows."""

    term: int
    holder: str
    cursor: str
    heads: dict[str, Head]


class Part(model.Noun, frozen=True, kw_only=True):
    """Some entries of one log. `before` is the chain over what comes before them, `count` how many the log has."""

    before: str
    count: int
    entries: tuple[bytes, ...] = ()


class Inventory(model.Noun, frozen=True, kw_only=True):
    """How all logs stand."""

    term: int
    holder: str
    heads: dict[str, Head]


class Source(Protocol):
    """The bytes of a blob on their way from a peer. `size_bytes`: of the whole blob."""

    @property
    def size_bytes(self) -> int: ...

    def pieces(self) -> AsyncIterator[bytes]:
        """From where it was asked to begin. Raises RemoteError when they end early."""
        ...


class Peer(Protocol):
    """Another server of the set. Every verb may be repeated, and raises RemoteError when there is no answer."""

    @property
    def url(self) -> str: ...

    async def word(self) -> Word:
        """Who it believes to take pushes."""
        ...

    async def feed(self, cursor: str, wait_s: float) -> Feed:
        """What is new; waits for so long until there is something."""
        ...

    async def entries(self, log: str, start: int, *, certain: bool = False) -> Part:
        """From that number on, perhaps not all of them. An unknown log is empty. `certain`: only if this server holds
        the push role right now; it raises RemoteError when it cannot be sure of that."""
        ...

    async def inventory(self) -> Inventory: ...

    def open(
        self, digest: model.Digest, start: int = 0, end: int | None = None
    ) -> contextlib.AbstractAsyncContextManager[Source]:
        """The bytes of a blob from `start` to before `end`. Raises NotFound when it does not have the blob."""
        ...

    async def size_bytes(self, digest: model.Digest) -> int:
        """Of a blob that it has. Raises NotFound."""
        ...


def check(call: serve.Call, secret: str) -> None:
    """Raises Fault unless the call comes from a peer."""
    if not is_peer(call, secret):
        raise answer.Fault(401, "only servers of this set may ask this: REGISTRY_PEER_SECRET differs", code="DENIED")


def is_peer(call: serve.Call, secret: str) -> bool:
    given = call.headers.get(SECRET_HEADER, "")
    return bool(secret) and hmac.compare_digest(given.encode(), secret.encode())


def guarded(handler: serve.Handler, secret: str) -> serve.Handler:
    """For peers alone."""

    async def checked(call: serve.Call) -> object:
        check(call, secret)
        return await handler(call)

    return checked


# ---- over the network ----------------------------------------------------------------------------------------------


class Peers:
    """All peers by URL, over HTTP. `close` at the end."""

    def __init__(self, urls: Sequence[str], secret: str, *, ca_cert: Path | None = None) -> None:
        self._sockets = http.Sockets(ca_cert=ca_cert, receive_bytes=_RECEIVE_BYTES)
        self._headers = {SECRET_HEADER: secret}
        self.all: Mapping[str, Peer] = {url: _Remote(url, self._sockets, self._headers) for url in urls}

    async def close(self) -> None:
        await self._sockets.close()


class _Remote:
    """`Peer`"""

    def __init__(self, url: str, sockets: http.Sockets, headers: Mapping[str, str]) -> None:
        self.url = url
        self._sockets = sockets
        self._headers = headers

    async def _ask(self, path: str, kind: type[T], limit_s: float = _ASK_S) -> T:
        reply = await self._sockets.send(self.url, "GET", path, None, self._headers, limit_s)
        if reply.status != 200:
            raise errors.RemoteError(f"{self.url}: HTTP {reply.status} for {path.partition('?')[0]}", reply.status)
        try:
            return msgspec.json.decode(reply.body, type=kind)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise errors.RemoteError(f"{self.url}{path.partition('?')[0]}: unexpected body: {error}") from error

    async def word(self) -> Word:
        return await self._ask("/replica/v1/word", Word, _WORD_S)

    async def feed(self, cursor: str, wait_s: float) -> Feed:
        query = line.query(after=cursor, wait=f"{wait_s:g}")
        return await self._ask(f"/replica/v1/feed?{query}", Feed, wait_s + _ASK_S)

    async def entries(self, log: str, start: int, *, certain: bool = False) -> Part:
        query = line.query(start=str(start), **({"certain": "1"} if certain else {}))
        return await self._ask(f"/replica/v1/log/{log}?{query}", Part)

    async def inventory(self) -> Inventory:
        return await self._ask("/replica/v1/inventory", Inventory, 3 * _ASK_S)

    async def size_bytes(self, digest: model.Digest) -> int:
        async with self._request("HEAD", digest, {}) as reply:
            return reply.content_length or 0

    @contextlib.asynccontextmanager
    async def open(self, digest: model.Digest, start: int = 0, end: int | None = None) -> AsyncIterator[Source]:
        part = "" if end is None else str(end - 1)
        headers = {"Range": f"bytes={start}-{part}"} if start or end is not None else {}
        async with self._request("GET", digest, headers) as reply:
            if headers and reply.status != 206:
                raise errors.RemoteError(f"{self.url}: the server does not send ranges", reply.status)
            total = reply.headers.get("Content-Range", "").rpartition("/")[2]
            yield _Remotely(reply, int(total) if total.isdecimal() else reply.content_length or 0)

    @contextlib.asynccontextmanager
    async def _request(
        self, method: str, digest: model.Digest, headers: Mapping[str, str]
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=2.0, sock_read=_STALL_S)
        url = f"{self.url}/replica/v1/blobs/{digest}"
        with line.as_remote(self.url):
            request = self._sockets.session.request(
                method, url, headers={**self._headers, **headers}, timeout=timeout, read_bufsize=_READ_BYTES
            )
            reply = await request
        async with reply:
            if reply.status == 404:
                raise errors.NotFound(f"{self.url} has no blob {digest}")
            if reply.status >= 400:
                raise errors.RemoteError(f"{self.url}: HTTP {reply.status} for blob {digest}", reply.status)
            yield reply


class _Remotely:
    """`Source`"""

    def __init__(self, reply: aiohttp.ClientResponse, size_bytes: int) -> None:
        self.size_bytes = size_bytes
        self._reply = reply

    async def pieces(self) -> AsyncIterator[bytes]:
        with line.as_remote(self._reply.url):
            async for piece in self._reply.content.iter_any():
                yield piece
