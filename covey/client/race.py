"""One call on its way: at one of several equal servers after the other, sometimes at several at once.

Which one is next, and what each outcome means for it, is `balance`'s to say; how a request gets to a server is told by
whoever begins the race. The rules are those of `client.http`: here they are carried out.
"""

import asyncio
import contextlib
from collections.abc import Callable, Mapping
from typing import NamedTuple

from covey import errors
from covey.client import balance, plain

_BROKEN_S = 0.5  # a connection that breaks so soon may have been an old one that the server had closed
_BYTES_PER_S = 1e6  # a line this slow is no reason for a second copy


class NotSent(errors.RemoteError):
    """No connection: the server certainly did nothing."""


class Lost(errors.RemoteError):
    """The connection broke or time was up: nobody knows what the server did."""


class Ask(NamedTuple):
    """One call, wherever it goes."""

    method: str
    path: str
    data: bytes | None
    headers: Mapping[str, str]
    repeatable: bool
    parks: bool
    limit_s: float
    enveloped: bool  # the answer must be the API's

    def may_be(self, reply: plain.Answer) -> bool:
        """Whether its body looks as it must."""
        return not self.enveloped or reply.body.startswith(b"{")


class _Attempt(NamedTuple):
    url: str
    began_s: float


class Race:
    """One call on its way: at one server after the other, sometimes at several at once."""

    def __init__(
        self,
        ask: Ask,
        servers: balance.Balance,
        begin: Callable[[str, Ask], asyncio.Future[plain.Answer]],
        parked: dict[asyncio.Future[plain.Answer], str],
        mark_bad: Callable[[str], None],
    ) -> None:
        """`begin` sends to one server. `parked`: where calls that wait for news are entered. `mark_bad`: a server that
        failed, which ends those."""
        self._ask = ask
        self._balance = servers
        self._send = begin
        self._parked = parked
        self._mark_bad = mark_bad
        self._alone = len(servers.urls) == 1  # there is nowhere else to go, so nobody gives an attempt up
        self._running: dict[asyncio.Future[plain.Answer], _Attempt] = {}
        self._tried: list[str] = []
        self._again = ""  # a server that may be tried once more
        self._failures: list[str] = []
        self._unwilling: list[plain.Answer] = []  # 503
        self._strange: plain.Answer | None = None  # of a server that is none of ours
        self._may_copy = ask.repeatable and not ask.parks
        self._loop = asyncio.get_running_loop()
        self._bell: asyncio.Future[None] | None = None  # rung when one of those that run is done, or late

    def enter(self, url: str, began_s: float, call: asyncio.Future[plain.Answer]) -> None:
        """A call to `url` that is on its way, or has ended."""
        self._tried.append(url)
        self._running[call] = _Attempt(url, began_s)
        if self._alone:
            return
        call.add_done_callback(self._ring)
        if self._ask.parks:
            self._parked[call] = url
            call.add_done_callback(self._parked.pop)

    async def run(self) -> plain.Answer:
        """The first good answer. Raises RemoteError."""
        try:
            while True:
                if not self._running:
                    url = self._next()
                    if not url:
                        return self._no_answer()
                    self.enter(url, self._loop.time(), self._send(url, self._ask))
                await self._until_some_is_done()
                done = [task for task in self._running if task.done()]
                if not done:
                    self._copy()
                for task in done:
                    reply = self._outcome(task, self._running.pop(task))
                    if reply is not None:
                        return reply
        finally:
            if self._running:
                for task in self._running:
                    task.cancel()
                await asyncio.gather(*self._running, return_exceptions=True)

    async def _until_some_is_done(self) -> None:
        """Or until it is time for a second copy. As `asyncio.wait`, which costs a small call more than all the rest."""
        if any(task.done() for task in self._running):
            return
        if self._alone:
            (only,) = self._running
            with contextlib.suppress(NotSent, Lost, plain.Broken, TimeoutError):  # see `_outcome`
                await only
            return
        bell = self._bell = self._loop.create_future()
        late_s = self._copy_after_s()
        timer = None if late_s is None else self._loop.call_later(late_s, self._ring)
        try:
            await bell
        finally:
            self._bell = None
            if timer is not None:
                timer.cancel()

    def _ring(self, _: object = None) -> None:
        if self._bell is not None and not self._bell.done():
            self._bell.set_result(None)

    def _next(self) -> str:
        """Where to try now; "" when everything was tried."""
        for url in self._balance.order(self._loop.time()):
            if url not in self._tried:
                return url
        url, self._again = self._again, ""
        return url

    # ---- second copies ---------------------------------------------------------------------------------------------

    def _copy_after_s(self) -> float | None:
        """How long to wait for what is running before another server is asked as well; None: as long as it takes."""
        if not self._may_copy or not self._spare():
            return None
        newest = max(self._running.values(), key=lambda attempt: attempt.began_s)
        late_s = self._balance.late_after_s(newest.url) + len(self._ask.data or b"") / _BYTES_PER_S
        return max(0.0, newest.began_s + late_s - self._loop.time())

    def _spare(self) -> str:
        """A server that is well and was not asked yet; "" when there is none."""
        order = self._balance.order(self._loop.time())
        return next((url for url in order if url not in self._tried and self._balance.well(url)), "")

    def _copy(self) -> None:
        url = self._spare()
        if url:
            self._may_copy = self._balance.take_copy()
            if self._may_copy:
                self.enter(url, self._loop.time(), self._send(url, self._ask))

    # ---- outcomes --------------------------------------------------------------------------------------------------

    def _outcome(self, task: asyncio.Future[plain.Answer], attempt: _Attempt) -> plain.Answer | None:
        """The answer, or None when another server is to be asked. Raises RemoteError when that may not be."""
        url, took_s = attempt.url, self._loop.time() - attempt.began_s
        if task.cancelled():  # by `mark_bad`
            self._failures.append(f"{url}: given up, because another call to it failed")
            return None
        try:
            reply = task.result()
        except NotSent as error:
            self._missed(url, str(error))
            return None
        except (Lost, plain.Broken, TimeoutError) as error:
            self._lost(url, why_lost(error, self._ask.limit_s), took_s)
            return None
        if reply.status in (502, 504) and self._ask.repeatable:  # a gateway had no answer from what is behind it
            self._lost(url, f"HTTP {reply.status}", took_s)
            return None
        if reply.status == 503:
            self._balance.busy(url, self._loop.time(), _retry_after_s(reply.headers))
            self._failures.append(f"{url}: not ready (503)")
            self._unwilling.append(reply)
            return None
        if self._is_strange(reply):
            self._strange = reply
            self._missed(url, f"HTTP {reply.status}: no such API there")
            return None
        self._balance.answered(url, self._loop.time(), None if self._ask.parks else took_s)
        self._pass_by(took_s)
        return reply

    def _is_strange(self, reply: plain.Answer) -> bool:
        """Whether another server may know better: this one does not know the path, or is no server of this API."""
        unknown = self._ask.enveloped and reply.status in (404, 405)
        return unknown or (self._ask.repeatable and not self._ask.may_be(reply))

    def _missed(self, url: str, why: str) -> None:
        self._failures.append(f"{url}: {why}")
        self._mark_bad(url)

    def _lost(self, url: str, why: str, took_s: float) -> None:
        self._missed(url, why)
        if not self._ask.repeatable:
            raise errors.RemoteError(f"{self._failures[-1]}; the request may have been carried out")
        if took_s < _BROKEN_S and self._tried.count(url) == 1:
            self._again = url

    def _pass_by(self, took_s: float) -> None:
        """Those that still owe the answer which another one gave much sooner are not well."""
        for attempt in self._running.values():
            if self._loop.time() - attempt.began_s > 2 * took_s + balance.LATE_S / 2:
                self._mark_bad(attempt.url)

    def _no_answer(self) -> plain.Answer:
        """Every server was asked in vain: their word when all say the same, else RemoteError naming each."""
        if self._unwilling and len(self._unwilling) == len(self._failures):
            return self._unwilling[-1]
        if self._strange is not None and len(self._failures) == 1:
            return self._strange
        raise errors.RemoteError("; ".join(dict.fromkeys(self._failures)), 503 if self._unwilling else 0)


def why_lost(error: Exception, limit_s: float) -> str:
    return f"no answer within {limit_s:g} s" if isinstance(error, TimeoutError) else str(error)


def _retry_after_s(headers: Mapping[str, str]) -> float:
    """Seconds only; a date is not worth comparing clocks for (safety S9)."""
    text = next((value for name, value in headers.items() if name.lower() == "retry-after"), "")
    return float(text) if text.isdecimal() else 0.0
