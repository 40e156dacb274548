"""What a handler sees of a request: its route, its call, and the rules about its body and its age.

Rules that hold for every answer, errors included:

* Success is exactly 200, in the envelope (`covey.answer`). A business refusal (`errors.Refused`) is 200 with status
  FAIL. Other codes are for requests that were not understood (400, 404, 405, 413), for a server that cannot answer now
  (503 with Retry-After) and for our own faults (500). Only below prefixes for which a program brings its own error
  body (the registry's OCI paths), and in raw responses, is the body something else.
* Bodies are read as JSON whatever the Content-Type says, on DELETE too, as UTF-8 or else Latin-1: clients differ.
* Answers are ASCII-escaped JSON: one client decodes them with its platform's charset.

A handler is ``async def handler(call: Call) -> object``: None (a command's bare OK), something msgspec can encode (the
envelope's body), or an aiohttp response (sent as it is). Handlers know nothing of HTTP faults but `answer.Fault`, and
nothing of sockets: a `Request` may have come over one (`server`) or have been handed over in this process.

This module knows no store and no noun.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Protocol, TypeVar

import msgspec
import multidict

from covey import answer, errors, gate, room, world

T = TypeVar("T")

MIB = 1 << 20
AGE_LIMIT_S = 10.0  # safety S24: nothing is committed for an older request

Handler = Callable[["Call"], Awaitable[object]]


@dataclass(frozen=True, slots=True)
class Route:
    """One method on one path. In `path`, ``{name}`` matches one segment and ``{name:path}`` several.

    `time_limit_s` None is for streams and parked polls: they end by themselves.
    """

    method: str
    path: str
    handler: Handler
    body_limit_bytes: int = MIB
    time_limit_s: float | None = AGE_LIMIT_S
    lane: gate.Lane = gate.Lane.PEOPLE


class Request(Protocol):
    """A request as it came. `path` and `query` are decoded, header names match in any case."""

    @property
    def method(self) -> str: ...

    @property
    def path(self) -> str: ...

    @property
    def query(self) -> multidict.MultiMapping[str]: ...

    @property
    def headers(self) -> multidict.MultiMapping[str]: ...

    @property
    def peer(self) -> str:
        """The address that it came from; "" when there is none."""
        ...

    @property
    def has_body(self) -> bool: ...

    @property
    def whole(self) -> bytes | None:
        """The body, when all of it has arrived already."""
        ...

    @property
    def size_bytes(self) -> int | None:
        """Of the body, as announced; None when that was left open."""
        ...

    def gone(self) -> bool:
        """Nobody waits for the answer any more."""
        ...

    async def piece(self) -> bytes:
        """The next part of the body as it arrived, b"" at its end. Raises ConnectionError when the client has gone."""
        ...

    @property
    def direct(self) -> bool:
        """Whether `fill` spares copies, so that a body should be read by it from the first byte on."""
        ...

    async def fill(self, into: room.Room) -> None:
        """Instead of `piece`: the body until `into` is full, or to its end. Raises ConnectionError when the client has
        gone; what came before is in it, also when this is cancelled."""
        ...

    async def go_ahead(self) -> None:
        """Tell a client that waits for "100 Continue" to send the body."""
        ...


class House(Protocol):
    """What a call asks of the program that serves it."""

    @property
    def world(self) -> world.World: ...

    @property
    def draining(self) -> asyncio.Event: ...

    @property
    def gaps(self) -> int:
        """How often the event loop stood still for too long."""
        ...

    async def until_cut(self, reading: Awaitable[T]) -> T:
        """What `reading` brings. Raises Cut when uploads are to end."""
        ...


class Call:
    """One request on its way through a handler. `address` is where it comes from."""

    __slots__ = ("_arrived_ns", "_epoch", "_house", "_ticket", "address", "params", "request", "route")

    def __init__(
        self, house: House, route: Route, request: Request, params: Mapping[str, str], address: str = ""
    ) -> None:
        self.route = route
        self.request = request
        self.params = params
        self.address = address
        self._ticket: gate.Ticket | None = None
        self._house = house
        self._arrived_ns = house.world.boot_ns()
        self._epoch = house.gaps

    @property
    def query(self) -> multidict.MultiMapping[str]:
        return self.request.query

    @property
    def headers(self) -> multidict.MultiMapping[str]:
        return self.request.headers

    @property
    def draining(self) -> asyncio.Event:
        """Set when the server goes down: a parked poll answers at once."""
        return self._house.draining

    @property
    def age_s(self) -> float:
        return (self._house.world.boot_ns() - self._arrived_ns) / 1e9

    @property
    def until_ns(self) -> int:
        """On the boot clock: nothing is committed for this request after that (safety S24)."""
        return self._arrived_ns + int(AGE_LIMIT_S * 1e9)

    @property
    def client(self) -> str:
        """Who asks, for records of decisions."""
        return self.address or "unknown"

    def still_fresh(self) -> None:
        """Called just before a commit: raises Unavailable for a request that is too old or slept through a gap."""
        if self._epoch != self._house.gaps or self.age_s > AGE_LIMIT_S:
            raise errors.Unavailable("the request waited too long in this server and nothing was done; send it again")

    def still_here(self) -> None:
        """Raises ConnectionError when the client has gone: a parked poll need not answer it."""
        if self.request.gone():
            raise ConnectionResetError("the client has gone")

    def admit(self, ticket: gate.Ticket | None) -> None:
        """It has been let in (`gate`)."""
        self._ticket = ticket

    def aside(self) -> contextlib.AbstractContextManager[None]:
        """While a poll is parked it takes nobody's place."""
        return contextlib.nullcontext() if self._ticket is None else self._ticket.aside()

    async def read(self) -> bytes:
        """The whole body, up to the route's limit. Raises Fault 503 when bodies fill too much memory already, and
        Unavailable when it does not come in time: whoever is gone without a word must not keep a place for ever."""
        whole = self.request.whole
        if whole is not None:
            if len(whole) > self.route.body_limit_bytes:
                raise answer.too_large(self.route.body_limit_bytes)
            if self._ticket is not None:
                self._ticket.hold(len(whole))
            return whole
        try:
            async with asyncio.timeout(max(AGE_LIMIT_S - self.age_s, 0.0)):
                return await self._read()
        except TimeoutError as error:
            raise errors.Unavailable("the body did not come in time and nothing was done; send it again") from error

    async def _read(self) -> bytes:
        parts = []
        size = held = 0
        while part := await self.request.piece():
            size += len(part)
            if size > self.route.body_limit_bytes:
                raise answer.too_large(self.route.body_limit_bytes)
            if size > held and self._ticket is not None:
                more = max(self.request.size_bytes or 0, size) - held
                self._ticket.hold(more)
                held += more
            parts.append(part)
        return b"".join(parts)

    async def json(self, kind: type[T]) -> T:
        """The body as `kind`, whatever the Content-Type. Raises Fault 400 that names the field."""
        return parse(await self.read(), kind)

    async def chunks(self) -> AsyncIterator[bytes]:
        """The body piece by piece as it arrived, for streaming to disk. Raises Cut when the server goes down,
        ConnectionError when the client has gone."""
        while chunk := await self._house.until_cut(self.request.piece()):
            yield chunk

    async def fill(self, into: room.Room) -> None:
        """The body until `into` is full, or to its end. Raises as `chunks` does; what came before is in it."""
        await self._house.until_cut(self.request.fill(into))


def parse(raw: bytes, kind: type[T]) -> T:
    """A request's body as `kind`, read as UTF-8 or else as Latin-1. Raises Fault 400 that names the field."""
    if not raw.strip():
        raise answer.Fault(400, "the request has no body; send a JSON object")
    try:
        raw.decode()
    except UnicodeDecodeError:
        raw = raw.decode("latin-1").encode()
    try:
        return msgspec.json.decode(raw, type=kind)
    except msgspec.ValidationError as error:
        raise answer.Fault(400, _name_field(str(error))) from error
    except (msgspec.DecodeError, RecursionError) as error:
        raise answer.Fault(400, f"the body is not valid JSON ({error}); send a JSON object") from error


def _name_field(text: str) -> str:
    """msgspec's "Expected `int`, got `str` - at `$.count`" with the field first and what to do last."""
    what, _, where = text.partition(" - at `")
    name = where.rstrip("`").removeprefix("$").lstrip(".") or "the body"
    return f"{name}: {what[:1].lower()}{what[1:]}; correct it and send the request again"
