"""HTTP to one of several equal servers: the transport of every typed client (CLI, agent, registry peers, tests).

    Endpoints ── which one? ─► balance.Balance        rules alone
        ├─────── one call ───► race.Race              from one server to the next
        └────── send ────────► Exchange               Sockets (aiohttp), or something without sockets in a simulation

Rules:

* A server that refuses, breaks off, says 503 or lets a call wait while another one answers is left for the next one at
  once; when it is used again is `balance`'s to say.
* A call that may be repeated and has no answer after about a second is also sent to another server that is well, and
  the first good answer counts: a frozen peer accepts connections and never answers. Copies are few on the whole, so
  that servers which are all slow get no more load from it.
* A call that waits for news on purpose (`parks`) is not copied. When its server fails another call it is given up and
  asked elsewhere at once.
* A call that may not be repeated (a POST without an Idempotency-Key) goes to another server only when the first
  certainly did nothing: no connection, or its own word (503).
* Whoever does not know the path, or answers without the API's envelope, is another program at that address (or an older
  version of the right one), and is passed by like one that is away.
* `Retry-After` counts when all servers say so. Until then the next one is asked.

All time is the running loop's, so that a simulation can run in time of its own.
"""

import asyncio
import contextlib
import os
import socket
import ssl
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self, TypeVar

import aiohttp
import msgspec

from covey import errors, wire
from covey.client import balance, envelope, plain, race

T = TypeVar("T")

_LOOK_LIMIT_S = 2.0


Reply = plain.Answer
NotSent = race.NotSent
Lost = race.Lost


class Exchange(Protocol):
    """Carries one request to one server and its answer back. Any number at once; cancelling gives one up."""

    async def send(
        self, url: str, method: str, path: str, data: bytes | None, headers: Mapping[str, str], timeout_s: float
    ) -> Reply:
        """The answer of the server at `url`. Raises NotSent or Lost, and nothing else."""
        ...


class Sockets:
    """Exchange over real sockets: pools of connections, opened at first use inside the running loop. Plain HTTP goes
    over `plain`, everything else by aiohttp. `ca_cert`: authorities that are believed beside the system's own.
    `receive_bytes`: how much of a stream may wait in the kernel; 0: as much as the kernel likes."""

    def __init__(self, connect_s: float = 2.0, ca_cert: Path | None = None, *, receive_bytes: int = 0) -> None:
        self._receive_bytes = receive_bytes
        self._connect_s = connect_s
        self._trust = trusting(ca_cert)
        self._session: aiohttp.ClientSession | None = None
        self._lines = plain.Lines(connect_s)

    @property
    def session(self) -> aiohttp.ClientSession:
        if self._session is None:
            connector = aiohttp.TCPConnector(
                limit=0,
                keepalive_timeout=60,
                ssl=self._trust,
                socket_factory=_receiving(self._receive_bytes) if self._receive_bytes else None,
            )
            timeout = aiohttp.ClientTimeout(total=None, sock_connect=self._connect_s)
            self._session = aiohttp.ClientSession(connector=connector, timeout=timeout, auto_decompress=False)
        return self._session

    async def send(
        self, url: str, method: str, path: str, data: bytes | None, headers: Mapping[str, str], timeout_s: float
    ) -> Reply:
        if not self._lines.takes(url, path, headers):
            return await self._send(url, method, path, data, headers, timeout_s)
        try:
            return await self._lines.send(url, method, path, data, headers, timeout_s)
        except plain.Unreachable as error:
            if isinstance(error.__cause__, TimeoutError):
                raise NotSent(f"cannot connect within {self._connect_s:g} s") from error
            why = _reason(error.__cause__) if isinstance(error.__cause__, OSError) else str(error)
            raise NotSent(f"cannot connect ({why})") from error
        except (plain.Broken, TimeoutError) as error:
            raise Lost(race.why_lost(error, timeout_s)) from error

    def begin(
        self, url: str, method: str, path: str, data: bytes | None, headers: Mapping[str, str], timeout_s: float
    ) -> asyncio.Future[Reply] | None:
        """As `send`, without the price of a task; None: not now. It fails with plain.Broken or TimeoutError."""
        if not self._lines.takes(url, path, headers):
            return None
        return self._lines.begin(url, method, path, data, headers, timeout_s)

    async def _send(
        self, url: str, method: str, path: str, data: bytes | None, headers: Mapping[str, str], timeout_s: float
    ) -> Reply:
        try:
            async with (
                asyncio.timeout(timeout_s),
                self.session.request(method, url + path, data=data, headers=headers) as answer,
            ):
                return Reply(answer.status, answer.headers, await answer.read())
        except aiohttp.ClientConnectorCertificateError as error:
            reason = getattr(error.certificate_error, "verify_message", "") or error.certificate_error
            raise NotSent(f"its certificate is not believed ({reason}); name its authority in CA_CERT") from error
        except aiohttp.ClientConnectorError as error:
            raise NotSent(f"cannot connect ({_reason(error.os_error)})") from error
        except aiohttp.ConnectionTimeoutError as error:
            raise NotSent(f"cannot connect within {self._connect_s:g} s") from error
        except TimeoutError as error:
            raise Lost(f"no answer within {timeout_s:g} s") from error
        except (aiohttp.ClientError, OSError) as error:
            raise Lost(f"{type(error).__name__}{f' {error}' if str(error) else ''}") from error

    async def close(self) -> None:
        await self._lines.close()
        if self._session is not None:
            await self._session.close()
            self._session = None


def _receiving(size_bytes: int) -> aiohttp.SocketFactoryType:
    def made(address: aiohttp.AddrInfoType) -> socket.socket:
        family, kind, protocol, *_ = address
        found = socket.socket(family, kind, protocol)
        found.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, size_bytes)
        return found

    return made


def trusting(ca_cert: Path | None) -> ssl.SSLContext | bool:
    """What aiohttp is to believe of a server's certificate. Raises SettingError for a file without certificates."""
    if ca_cert is None:
        return True
    context = ssl.create_default_context()
    try:
        context.load_verify_locations(ca_cert)
    except (OSError, ssl.SSLError) as error:
        raise errors.SettingError(f"CA_CERT {ca_cert} holds no certificates in PEM: {error}") from error
    return context


class Endpoints:
    """Several base URLs of equal servers, and what this client knows of their health.

    `learnt`: URLs that the cloud named earlier; they come before `urls`. `salt`: clients with different ones prefer
    different servers ("": the first). `near`: those that are clearly nearer come first. `patience_s`: how long `ask`
    may wait in all while every server says that it is busy. `ca_cert`: as for `Sockets`. `exchange`: may be shared with
    others, and is closed by whoever made it.
    """

    def __init__(
        self,
        urls: Sequence[str],
        *,
        learnt: Sequence[str] = (),
        salt: str = "",
        near: bool = False,
        timeout_s: float = 10.0,
        connect_s: float = 2.0,
        patience_s: float = 0.0,
        exchange: Exchange | None = None,
        ca_cert: Path | None = None,
    ) -> None:
        if not urls:
            raise errors.SettingError("no server URL is given; name one with --controller or --registry")
        self._balance = balance.Balance([_base(url) for url in urls], [_base(url) for url in learnt], salt, near=near)
        self._sockets = exchange if isinstance(exchange, Sockets) else Sockets(connect_s, ca_cert)
        self._exchange: Exchange = exchange or self._sockets
        self._begins = self._sockets.begin if self._exchange is self._sockets else None
        self._shared = exchange is not None
        self._timeout_s = timeout_s
        self._patience_s = patience_s
        self._looks: set[asyncio.Task[None]] = set()
        self._parked: dict[asyncio.Future[Reply], str] = {}

    @property
    def urls(self) -> tuple[str, ...]:
        return self._balance.urls

    @property
    def session(self) -> aiohttp.ClientSession:
        """For requests whose bodies are streams."""
        return self._sockets.session

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        for look in self._looks:
            look.cancel()
        await asyncio.gather(*self._looks, return_exceptions=True)
        if not self._shared:
            await self._sockets.close()

    # ---- which server ----------------------------------------------------------------------------------------------

    def learn(self, urls: Sequence[str]) -> None:
        """The servers that the cloud has now, in place of those it named before. The given ones stay, as a last
        resort; with an empty list they are all there is."""
        self._balance.learn([_base(url) for url in urls])

    def pick(self) -> str:
        """The server to use now."""
        self._look_around()
        return self._balance.order(_now())[0]

    def mark_bad(self, url: str) -> None:
        """It failed in a way that nobody here has seen. Calls that wait for news from it are asked elsewhere."""
        self._balance.failed(url, _now())
        if self.another_is_well(url):
            for task, where in self._parked.items():
                if where == url:
                    task.cancel()

    def another_is_well(self, url: str) -> bool:
        """Whether a server but this one may be used without need."""
        return any(self._balance.well(other) for other in self.urls if other != url)

    def _look_around(self) -> None:
        """Have a look at the servers that may be well again; nobody waits for it."""
        for url in self._balance.due(_now()):
            look = asyncio.create_task(self._look(url))
            self._looks.add(look)
            look.add_done_callback(self._looks.discard)

    async def _look(self, url: str) -> None:
        began_s = _now()
        took_s: float | None = None
        try:
            reply = await self._exchange.send(url, "GET", "/readyz", None, {}, _LOOK_LIMIT_S)
        except (NotSent, Lost):
            pass
        else:
            took_s = _now() - began_s if reply.status < 500 else None
        self._balance.looked(url, _now(), took_s)

    # ---- calls -----------------------------------------------------------------------------------------------------

    async def call(
        self,
        method: str,
        path: str,
        body: Any = None,
        *,
        repeatable: bool | None = None,
        parks: bool = False,
        timeout_s: float | None = None,
        headers: Mapping[str, str] = {},
    ) -> tuple[int, bytes]:
        """One call with fail-over: (HTTP status, body); 503 when every server says so. Raises RemoteError when none
        gave an answer in time; its text then says whether the call may have been carried out.

        `repeatable`: may be carried out twice without harm; unless given, all but a POST without Idempotency-Key.
        `parks`: the server may wait with its answer on purpose. `timeout_s` is each attempt's."""
        data = None if body is None else msgspec.json.encode(body)
        reply = await self.send(
            method, path, data, repeatable=repeatable, parks=parks, timeout_s=timeout_s, headers=headers
        )
        return reply.status, reply.body

    async def ask(
        self,
        method: str,
        path: str,
        kind: type[T],
        body: Any = None,
        *,
        repeatable: bool | None = None,
        parks: bool = False,
        timeout_s: float | None = None,
        headers: Mapping[str, str] = {},
    ) -> T:
        """One call of an enveloped API: the typed body. FAIL at 200 raises Refused (`Not found`: NotFound) with the
        server's message; any other status raises RemoteError carrying it."""
        reply, busy_s = await self._patiently(method, path, body, repeatable, parks, timeout_s, headers)
        return envelope.opened(reply.status, reply.body, f"{method} {path}", kind, busy_s)

    async def ask_page(
        self,
        method: str,
        path: str,
        kind: type[T],
        body: Any = None,
        *,
        repeatable: bool | None = None,
        parks: bool = False,
        timeout_s: float | None = None,
        headers: Mapping[str, str] = {},
    ) -> tuple[T, str]:
        """As `ask`, and the cursor to the next page; "" when none follows."""
        reply, busy_s = await self._patiently(method, path, body, repeatable, parks, timeout_s, headers)
        cursor = next((text for name, text in reply.headers.items() if name.lower() == wire.CURSOR_HEADER), "")
        return envelope.opened(reply.status, reply.body, f"{method} {path}", kind, busy_s), cursor

    async def _patiently(
        self,
        method: str,
        path: str,
        body: Any,
        repeatable: bool | None,
        parks: bool,
        timeout_s: float | None,
        headers: Mapping[str, str],
    ) -> tuple[Reply, float]:
        """The answer of an enveloped API, and for how long all servers asked to be left alone."""
        until_s = _now() + self._patience_s
        data = None if body is None else msgspec.json.encode(body)
        while True:
            busy_s = self._balance.busy_for_s(_now())
            if busy_s > 0:
                if _now() + busy_s > until_s:
                    text = f"busy; asked to be left alone for {busy_s:.1f} s: {', '.join(self.urls)}"
                    raise errors.RemoteError(text, 503, retry_after_s=busy_s)
                await asyncio.sleep(busy_s)
            reply = await self._answer(
                self._ask(method, path, data, repeatable, parks, timeout_s, headers, enveloped=True)
            )
            if reply.status != 503:
                return reply, 0.0
            busy_s = self._balance.busy_for_s(_now())
            if busy_s == 0 or _now() + busy_s > until_s:
                return reply, busy_s

    async def send(
        self,
        method: str,
        path: str,
        data: bytes | None = None,
        *,
        repeatable: bool | None = None,
        parks: bool = False,
        timeout_s: float | None = None,
        headers: Mapping[str, str] = {},
    ) -> Reply:
        """`call` with bytes, and the whole answer."""
        return await self._answer(self._ask(method, path, data, repeatable, parks, timeout_s, headers))

    def _ask(
        self,
        method: str,
        path: str,
        data: bytes | None,
        repeatable: bool | None,
        parks: bool,
        timeout_s: float | None,
        headers: Mapping[str, str],
        *,
        enveloped: bool = False,
    ) -> race.Ask:
        self._look_around()
        if repeatable is None:
            repeatable = method != "POST" or any(name.lower() == "idempotency-key" for name in headers)
        limit_s = self._timeout_s if timeout_s is None else timeout_s
        return race.Ask(method, path, data, headers, repeatable, parks, limit_s, enveloped)

    async def _answer(self, ask: race.Ask) -> Reply:
        """The first good one. Raises RemoteError. A good answer of the only server there is needs no race, which would
        cost as much as the call."""
        url, *others = self._balance.urls
        began_s = _now()
        begun = (
            None
            if others or self._begins is None
            else self._begins(url, ask.method, ask.path, ask.data, ask.headers, ask.limit_s)
        )
        if begun is not None:
            with contextlib.suppress(plain.Broken, TimeoutError):  # for the race to judge
                reply = await begun
                if reply.status == 200 and ask.may_be(reply):
                    self._balance.answered(url, _now(), None if ask.parks else _now() - began_s)
                    return reply
        running = race.Race(ask, self._balance, self._begin, self._parked, self.mark_bad)
        if begun is not None:
            running.enter(url, began_s, begun)
        return await running.run()

    def _begin(self, url: str, ask: race.Ask) -> asyncio.Future[Reply]:
        """One call to one server."""
        request = (url, ask.method, ask.path, ask.data, ask.headers, ask.limit_s)
        begun = None if self._begins is None else self._begins(*request)
        return begun or asyncio.get_running_loop().create_task(self._exchange.send(*request))


def _reason(error: OSError) -> str:
    """Why, in the system's plain words: asyncio puts addresses of its own into `strerror`."""
    plain = error.errno is not None and error.errno > 0
    return os.strerror(error.errno or 0) if plain else error.strerror or str(error)


def _base(url: str) -> str:
    return url.rstrip("/")


def _now() -> float:
    return asyncio.get_running_loop().time()
