"""Nouns to bytes and back, keeping what this program does not know (safety S27).

A newer program may add a field to a noun. An older one reads the value, changes what it knows, and writes the rest
back as it was: at the top, in nested nouns, and in lists of nouns, whose elements are matched by what names them.
`Any` lives in this module only.
"""

from typing import Any, Generic, NamedTuple, TypeVar

import msgspec

from covey import errors
from covey.store import base

T = TypeVar("T", bound=msgspec.Struct)

_NAMING = ("id", "instance", "epoch", "name", "node", "tag")  # the fields by which an element of a list is known again
_encoder = msgspec.json.Encoder()
_decoders: dict[type, msgspec.json.Decoder[Any]] = {}


class Kept(NamedTuple, Generic[T]):
    """A noun as the store holds it. `extra` is its whole text when that has fields unknown to us, else empty."""

    noun: T
    revision: int  # of its last write
    created: int  # of its creation: the same for the whole life of the key
    extra: bytes = b""


class Broken(errors.CoveyError):
    """A value is not what its key promises. It is shown and left alone, never overwritten."""


def decode(kv: base.Kv, kind: type[T]) -> Kept[T]:
    """Read one key. Raises Broken."""
    decoder = _decoders.get(kind)
    if decoder is None:
        decoder = _decoders[kind] = msgspec.json.Decoder(kind)
    try:
        noun: T = decoder.decode(kv.value)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise Broken(f"{kv.key}: {error}") from error
    extra = b"" if _encoder.encode(noun) == kv.value else kv.value
    return Kept(noun, kv.mod_revision, kv.create_revision, extra)


def encode(noun: msgspec.Struct, old: Kept[Any] | None = None) -> bytes:
    """Write `noun` over `old`, with the fields of `old` that only newer programs know."""
    if old is None or not old.extra:
        return _encoder.encode(noun)
    return _encoder.encode(_merge(noun, msgspec.json.decode(old.extra)))


def _merge(noun: msgspec.Struct, stored: Any) -> dict[str, Any]:
    """`noun` as a JSON object plus those of `stored`'s members that its type does not declare."""
    known = noun.__struct_fields__
    merged: dict[str, Any] = msgspec.to_builtins(noun)
    if not isinstance(stored, dict):
        return merged
    for name in known:
        if name in merged:
            merged[name] = _merge_value(getattr(noun, name), merged[name], stored.get(name))
    return merged | {name: value for name, value in stored.items() if name not in known}


def _merge_value(value: Any, plain: Any, stored: Any) -> Any:
    if isinstance(value, msgspec.Struct):
        return _merge(value, stored)
    if isinstance(value, tuple) and isinstance(stored, list) and value and isinstance(value[0], msgspec.Struct):
        by_name = {_naming(element): element for element in stored if isinstance(element, dict)}
        return [_merge(element, by_name.get(_naming(msgspec.to_builtins(element)))) for element in value]
    return plain


def _naming(element: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(element.get(name) for name in _NAMING if not isinstance(element.get(name), dict | list))
