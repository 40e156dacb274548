"""HTTP to one of several equal servers: the typed client's transport (used by CLI, agent, registry peers, tests).

Rules: every attempt has a deadline; a call goes to the endpoint that answered best last; a refusal, a time-out, a 503
or a frozen peer moves it to the next one at once; an endpoint that failed is tried again after a pause. A call that
is not `repeatable` (a POST without an idempotency key) is only repeated when the first server certainly never saw it
(connection refused) or said itself that nothing was done (503).
"""

import asyncio
import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Self, TypeVar

import aiohttp
import msgspec

from covey import errors, wire

T = TypeVar("T")

_PAUSE_S = 3.0  # a failed endpoint is left alone this long while another one works


class Endpoints:
    """Several base URLs of equal servers, with their own health."""

    def __init__(
        self, urls: Sequence[str], *, timeout_s: float = 10.0, connect_s: float = 2.0, headers: Mapping[str, str] = {}
    ) -> None:
        if not urls:
            raise errors.SettingError("no server URL is given; name one with --controller or --registry")
        self._urls = [url.rstrip("/") for url in urls]
        self._bad_until = dict.fromkeys(self._urls, 0.0)
        self._current = 0
        self._timeout_s = timeout_s
        self._connect_s = connect_s
        self._headers = dict(headers)
        self._session: aiohttp.ClientSession | None = None

    @property
    def urls(self) -> tuple[str, ...]:
        return tuple(self._urls)

    @property
    def session(self) -> aiohttp.ClientSession:
        """The connection pool, opened at first use inside the running loop."""
        if self._session is None:
            connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=60)
            timeout = aiohttp.ClientTimeout(total=None, sock_connect=self._connect_s)
            self._session = aiohttp.ClientSession(
                connector=connector, timeout=timeout, headers=self._headers, auto_decompress=False
            )
        return self._session

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()
            self._session = None

    def pick(self) -> str:
        """The endpoint to use now: the current one while it is well, else the next that is, else the least bad."""
        now = time.monotonic()
        for step in range(len(self._urls)):
            index = (self._current + step) % len(self._urls)
            if self._bad_until[self._urls[index]] <= now:
                self._current = index
                return self._urls[index]
        return min(self._urls, key=lambda url: self._bad_until[url])

    def mark_bad(self, url: str) -> None:
        self._bad_until[url] = time.monotonic() + _PAUSE_S

    async def call(
        self,
        method: str,
        path: str,
        body: Any = None,
        *,
        repeatable: bool = True,
        timeout_s: float | None = None,
        headers: Mapping[str, str] = {},
    ) -> tuple[int, bytes]:
        """One call with fail-over: (HTTP status, body). Raises RemoteError when no endpoint gave an answer in time;
        its text then says whether the call may have been carried out."""
        data = None if body is None else msgspec.json.encode(body)
        limit_s = self._timeout_s if timeout_s is None else timeout_s
        failures: list[str] = []
        for _ in range(len(self._urls) + 1):
            url = self.pick()
            try:
                async with (
                    asyncio.timeout(limit_s),
                    self.session.request(method, url + path, data=data, headers=dict(headers)) as answer,
                ):
                    content = await answer.read()
            except aiohttp.ClientConnectorError as error:
                self.mark_bad(url)
                failures.append(f"{url}: cannot connect ({error.os_error.strerror or error.os_error})")
                continue
            except (TimeoutError, aiohttp.ClientError, OSError) as error:
                self.mark_bad(url)
                failures.append(f"{url}: {type(error).__name__}{f' {error}' if str(error) else ''}")
                if repeatable:
                    continue
                raise errors.RemoteError(f"{failures[-1]}; the request may have been carried out") from error
            if answer.status == 503 and len(self._urls) > 1:
                self.mark_bad(url)
                failures.append(f"{url}: not ready (503)")
                if all(self._bad_until[other] > time.monotonic() for other in self._urls):
                    return answer.status, content
                continue
            return answer.status, content
        raise errors.RemoteError("; ".join(dict.fromkeys(failures)))

    async def ask(
        self,
        method: str,
        path: str,
        kind: type[T],
        body: Any = None,
        *,
        repeatable: bool = True,
        timeout_s: float | None = None,
        headers: Mapping[str, str] = {},
    ) -> T:
        """One call of an enveloped API: the typed body. FAIL at 200 raises Refused (`Not found`: NotFound) with the
        server's message; any other status raises RemoteError carrying it."""
        status, content = await self.call(
            method, path, body, repeatable=repeatable, timeout_s=timeout_s, headers=headers
        )
        try:
            envelope = msgspec.json.decode(content, type=wire.Envelope)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise errors.RemoteError(f"{method} {path}: HTTP {status} without the API's envelope", status) from error
        if status != 200:
            raise errors.RemoteError(envelope.message or f"HTTP {status}", status)
        if envelope.status != "OK":
            raise (errors.NotFound if envelope.message == "Not found" else errors.Refused)(envelope.message)
        if kind is type(None) or bytes(envelope.body) == b"null":
            return None  # type: ignore[return-value]
        try:
            return msgspec.json.decode(envelope.body, type=kind)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise errors.RemoteError(f"{method} {path}: unexpected body: {error}", status) from error
