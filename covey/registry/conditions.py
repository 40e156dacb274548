"""What a request says of the state it counts on: If-Match, If-None-Match, If-Range, Range. Pure.

Source: RFC 9110, sections 13 and 14. The entity tag of everything that this registry serves is its digest, so it is the
same at every server and never changes with a file's times.
"""

import re
from collections.abc import Mapping

_TAG = re.compile(r'(?:W/)?"([^"]*)"')
_RANGE = re.compile(r"bytes=([0-9]{0,18})-([0-9]{0,18})")


def etag(digest: str) -> str:
    return f'"{digest}"'


def allows(headers: Mapping[str, str], current: str | None) -> bool:
    """Whether a write may go ahead where `current` is the digest that stands there (None: nothing does)."""
    wanted, unwanted = headers.get("If-Match"), headers.get("If-None-Match")
    return (wanted is None or _names(wanted, current)) and (unwanted is None or not _names(unwanted, current))


def unchanged(headers: Mapping[str, str], digest: str) -> bool:
    """Whether a reader has these bytes already: the answer is 304."""
    known = headers.get("If-None-Match")
    return known is not None and _names(known, digest)


def wanted_range(headers: Mapping[str, str], digest: str) -> str | None:
    """The Range to serve; None: the whole. A Range of another unit, or of several parts, is ignored, and so is one
    under an If-Range that does not name these very bytes."""
    text = headers.get("Range", "").strip()
    found = _RANGE.fullmatch(text)
    if found is None or not (found[1] or found[2]) or headers.get("If-Range", etag(digest)).strip() != etag(digest):
        return None
    return text


def unsatisfiable(text: str, size_bytes: int) -> bool:
    """Whether a range (as `wanted_range` gives it) holds no byte."""
    first, last = text.removeprefix("bytes=").split("-")
    if not first:
        return int(last) == 0 or size_bytes == 0
    return int(first) >= size_bytes or (last != "" and int(last) < int(first))


def _names(text: str, digest: str | None) -> bool:
    """Whether a list of entity tags names what stands there."""
    return digest is not None and (text.strip() == "*" or digest in _TAG.findall(text))
