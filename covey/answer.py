"""Answers: the envelope, ASCII JSON, and how each of our errors looks in HTTP. Beneath `serve`; knows no server.

Every answer is one object: ``status`` ("OK" or "FAIL"), ``message`` (always a string) and, where there is one,
``body``. A business refusal is 200 + FAIL with its text unchanged; `Fault` is a request that ends with another status.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import msgspec
from aiohttp import web

from covey import errors, observe

HEADERS = {"Content-Type": "application/json", "Cache-Control": "no-store", "Server": "covey"}

log = observe.log("http")


class Fault(errors.CoveyError):
    """A request that ends with an HTTP status other than 200. `code` is the OCI error code, where one is wanted."""

    def __init__(self, status: int, message: str, *, code: str = "", headers: Mapping[str, str] = {}) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code
        self.headers = dict(headers)


class Cut(errors.CoveyError):
    """The server goes down: end this transfer at a durable offset and say where."""


class Plain(NamedTuple):
    """An answer that is all there, as nearly every one is."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    def response(self) -> web.Response:
        return web.Response(status=self.status, body=self.body, headers=self.headers)


class _Envelope(msgspec.Struct, omit_defaults=False):
    status: str
    message: str


class _FullEnvelope(msgspec.Struct):
    status: str
    message: str
    body: Any


def envelope(status: str, message: str = "", body: Any = None) -> bytes:
    """The API's answer as ASCII JSON. A body of None is left out; an empty list stays ``[]``."""
    noun = _Envelope(status, message) if body is None else _FullEnvelope(status, message, body)
    return ascii_json(noun)


def enveloped_list(elements: Iterable[bytes]) -> bytes:
    """A list of which each element is ASCII JSON already."""
    return b'{"status":"OK","message":"","body":[' + b",".join(elements) + b"]}"


def ascii_json(value: Any) -> bytes:
    """JSON with every non-ASCII character escaped (they occur only inside strings)."""
    raw = msgspec.json.encode(value)
    return raw if raw.isascii() else _NON_ASCII.sub(_escape, raw.decode()).encode("ascii")


_NON_ASCII = re.compile(r"[^\x00-\x7f]")


def _escape(found: re.Match[str]) -> str:
    units = found.group().encode("utf-16-be")
    return "".join(f"\\u{units[i]:02x}{units[i + 1]:02x}" for i in range(0, len(units), 2))


# Words by which clients recognise other situations: a time-out of their own, or a missing login.
_TELLTALES = re.compile(r"deadline exceeded|client\.timeout|authentication required", re.IGNORECASE)


def enveloped_fault(fault: Fault) -> bytes:
    """The error body of every path that has no other."""
    message = fault.message if fault.status == 401 else _TELLTALES.sub("time ran out", fault.message)
    return envelope("FAIL", message)


ErrorBody = Callable[[Fault], bytes]


def too_large(limit_bytes: int) -> Fault:
    return Fault(413, f"the request's body is larger than {limit_bytes} bytes", code="SIZE_INVALID")


def as_fault(error: errors.CoveyError) -> Fault:
    """How each of our errors looks in HTTP."""
    match error:
        case Fault():
            return error
        case errors.Refused():
            return Fault(200, str(error), code="DENIED")
        case Cut() | errors.Unavailable() | errors.Unsure():
            return Fault(503, str(error) or "not ready; try again", code="UNAVAILABLE", headers={"Retry-After": "1"})
        case errors.StoreError():
            text = f"the store does not take this now: {error}"
            return Fault(503, text, code="UNAVAILABLE", headers={"Retry-After": "5"})
        case errors.RemoteError():
            return Fault(502, str(error), code="UNAVAILABLE")
    log.error("a request failed", kind=type(error).__name__, why=str(error))
    return Fault(500, f"{type(error).__name__}: {error}", code="UNKNOWN")


def respond(fault: Fault, body: ErrorBody) -> Plain:
    """A fault as the answer of a path whose error body is made by `body`."""
    return Plain(fault.status, {**HEADERS, **fault.headers}, body(fault))
