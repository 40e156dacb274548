"""What an enveloped API answers, typed; or the fault that it tells."""

from typing import TypeVar

import msgspec

from covey import errors, wire

T = TypeVar("T")
_envelopes = msgspec.json.Decoder(wire.Envelope)
_NOT_JSON = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)


def opened(status: int, data: bytes, what: str, kind: type[T], busy_s: float) -> T:
    """What is in the envelope. FAIL at 200 raises Refused (`Not found`: NotFound) with the server's message; any other
    status raises RemoteError carrying it, with `busy_s` as the server's wish to be left alone."""
    try:
        envelope = _envelopes.decode(data)
    except _NOT_JSON as error:
        raise errors.RemoteError(f"{what}: HTTP {status} without the API's envelope", status) from error
    if status != 200:
        raise errors.RemoteError(envelope.message or f"HTTP {status}", status, retry_after_s=busy_s)
    if envelope.status != "OK":
        raise (errors.NotFound if envelope.message == "Not found" else errors.Refused)(envelope.message)
    if kind is type(None) or bytes(envelope.body) == b"null":
        return None  # type: ignore[return-value]
    try:
        return msgspec.json.decode(envelope.body, type=kind)
    except _NOT_JSON as error:
        raise errors.RemoteError(f"{what}: unexpected body: {error}", status) from error
