"""The line to a registry's servers that blobs and manifests travel over: calls that are repeated until they succeed,
and open streams.

Rules: what fails is tried again, at the next server if need be, and given up only when nothing moved for a while
(`patience_s`: a server may be starting again). A download in which nothing moves is left after `QUIET_S` while another
server is well, so that it goes on within two seconds when a server freezes; one that finds all of them silent waits
longer (`Silence`), for they may just be slow. Faults: NotFound and Refused carry the registry's text,
RemoteError means that no registry gave an answer.
"""

import asyncio
import contextlib
import io
import urllib.parse
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from typing import Any

import aiohttp
import msgspec

from covey import errors
from covey.client import http

READ_BYTES = 1 << 20
_PAUSE_S = 0.1  # after a failed try, doubled with each one in a row
_PAUSE_LIMIT_S = 2.0
_CONNECT_S = 2.0
_LONGER = 8
_ANSWER_S = 2.0  # for a small answer, of each of several servers, at first
QUIET_S = 1.0  # a server that sends nothing of a download for so long is left, if another one is well


class Line:
    """One registry, reached by one or several URLs of equal servers."""

    def __init__(self, endpoints: http.Endpoints, *, patience_s: float, stall_s: float) -> None:
        """`stall_s`: a peer that sends or takes nothing for so long is left, whether there is another one or not."""
        self._http = endpoints
        self._patience_s = patience_s
        self.stall_s = stall_s

    @property
    def name(self) -> str:
        """Which registry this is, for what is remembered of it."""
        return " ".join(sorted(self._http.urls))

    async def persist(self, attempt: Callable[[], Awaitable[None]], standing: Callable[[], int]) -> None:
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

    async def call(
        self, method: str, path: str, *, data: bytes | None = None, headers: Mapping[str, str] = {}, work_s: float = 0.0
    ) -> tuple[Mapping[str, str], bytes]:
        """One call that may be repeated and succeeds in the end: the answer's headers and body. `work_s` is what the
        server may need for it beside an ordinary answer. Reading fails over within the call."""
        answers: list[tuple[Mapping[str, str], bytes]] = []
        silence = Silence(_ANSWER_S)

        async def once() -> None:
            if method in ("GET", "HEAD"):
                with silence.measured(lambda: len(answers)) as quiet_s:
                    answers.append(await self._read(method, path, headers, quiet_s))
                return
            with self.limit(f"{method} {path}", self.stall_s + work_s) as limit:
                async with limit, self.open(method, path, data=data, headers=headers) as answer:
                    with as_remote(answer.url):
                        answers.append((answer.headers, await answer.read()))

        await self.persist(once, lambda: 0)
        return answers[-1]

    async def _read(
        self, method: str, path: str, headers: Mapping[str, str], quiet_s: float
    ) -> tuple[Mapping[str, str], bytes]:
        """One round over all servers. Usually a second one is asked as well before a silent one is left (`http`), but
        not when that happened often of late."""
        limit_s = min(quiet_s, self.stall_s) if len(self._http.urls) > 1 else self.stall_s
        reply = await self._http.send(method, path, headers=headers, timeout_s=limit_s)
        if reply.status >= 400:
            raise fault(reply.status, reply.body)
        return reply.headers, reply.body

    @contextlib.contextmanager
    def limit(self, what: str, limit_s: float) -> Iterator[asyncio.Timeout]:
        """A deadline whose passing is the fault of the server that was asked: it is left for a while."""
        try:
            yield asyncio.timeout(limit_s)
        except TimeoutError as error:
            self._http.mark_bad(self._http.pick())
            raise errors.RemoteError(f"{what}: nothing moved for {limit_s:.0f} s") from error

    @contextlib.asynccontextmanager
    async def open(
        self, method: str, path: str, *, data: Any = None, headers: Mapping[str, str] = {}, quiet_s: float = QUIET_S
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """One request, at the next server when one cannot be reached or is going down. An error status is raised as
        our own fault. The caller sees to it that it ends: only a silent download is left by itself (`quiet_s`), and a
        server whose download broke is not the next one to be asked."""
        failures: list[str] = []
        for _ in self._http.urls:
            url = self._http.pick()
            body = io.BytesIO(data) if isinstance(data, bytes) else data  # aiohttp sends a stream in pieces
            try:
                answer = await self._http.session.request(
                    method,
                    url + path,
                    data=body,
                    headers=dict(headers),
                    timeout=self._limits(method, url, quiet_s),
                    read_bufsize=READ_BYTES,
                )
            except (aiohttp.ClientError, OSError) as error:
                self._http.mark_bad(url)
                failures.append(f"{url}: {type(error).__name__}{f' {error}' if str(error) else ''}")
            else:
                async with answer:
                    if answer.status < 400:
                        with self._blamed(method, url):
                            yield answer
                        return
                    found = await _read_fault(answer)
                if answer.status != 503:
                    raise found
                self._http.mark_bad(url)
                failures.append(f"{url}: {found}")
            if body is not None and not isinstance(data, bytes):
                break  # a stream that was begun cannot be sent again
        raise errors.RemoteError("; ".join(failures))

    def _limits(self, method: str, url: str, quiet_s: float) -> aiohttp.ClientTimeout:
        if method != "GET":
            return aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_S)
        silence_s = min(quiet_s, self.stall_s) if self._http.another_is_well(url) else self.stall_s
        return aiohttp.ClientTimeout(total=None, sock_connect=min(silence_s, _CONNECT_S), sock_read=silence_s)

    @contextlib.contextmanager
    def _blamed(self, method: str, url: str) -> Iterator[None]:
        try:
            yield
        except errors.RemoteError:
            if method == "GET":
                self._http.mark_bad(url)
            raise


class Silence:
    """For how long one download waits for a silent server: much longer after a round in which none sent anything, since
    then they are just slow, and patience ends; as at first once bytes came."""

    def __init__(self, least_s: float = QUIET_S) -> None:
        self._least_s = self.limit_s = least_s

    @contextlib.contextmanager
    def measured(self, standing: Callable[[], int]) -> Iterator[float]:
        """Around one attempt; `standing` tells how far the download is."""
        loop = asyncio.get_running_loop()
        before, began_s = standing(), loop.time()
        try:
            yield self.limit_s
        finally:
            if standing() > before:
                self.limit_s = self._least_s
            elif loop.time() - began_s >= self.limit_s:
                self.limit_s *= _LONGER


async def pieces(answer: aiohttp.ClientResponse) -> AsyncIterator[bytes]:
    """The body as it comes. Raises RemoteError when the transfer is cut."""
    with as_remote(answer.url):
        async for chunk in answer.content.iter_any():
            yield chunk


async def _read_fault(answer: aiohttp.ClientResponse) -> errors.CoveyError:
    body = b""
    with contextlib.suppress(aiohttp.ClientError, OSError):
        body = await answer.read()
    return fault(answer.status, body)


def fault(status: int, body: bytes) -> errors.CoveyError:
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
def as_remote(url: object) -> Iterator[None]:
    """A cut transfer as RemoteError."""
    try:
        yield
    except (aiohttp.ClientError, OSError) as error:
        raise errors.RemoteError(f"{url}: {type(error).__name__}{f' {error}' if str(error) else ''}") from error


def query(**items: str) -> str:
    return urllib.parse.urlencode({name: text for name, text in items.items() if text})


def path_of(location: str) -> str:
    """The path of a Location: the session may go on at any server of the registry."""
    return urllib.parse.urlsplit(location).path
