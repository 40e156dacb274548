"""How all servers of a set stand, asked one by one: what `covey registry status` shows.

A server is asked as anybody may ask it (`/registry/status`), so this needs neither its disk nor its secret. One that
does not answer is shown as such; what the others say about it is not guessed at.
"""

import asyncio
from collections.abc import Sequence
from pathlib import Path

import msgspec

from covey import errors, model
from covey.client import http
from covey.registry import standing

_ASK_S = 5.0


class Answer(model.Noun, frozen=True, kw_only=True):
    """One server's word. `seen` None: it did not answer, or is none of a set; `trouble` says which."""

    url: str
    seen: standing.Standing | None = None
    trouble: str = ""


class _Status(msgspec.Struct):
    trouble: str = ""
    replica: standing.Standing | None = None


class _Envelope(msgspec.Struct):
    body: _Status


async def ask(urls: Sequence[str], *, ca_cert: Path | None = None) -> list[Answer]:
    """All at once, in their order."""
    sockets = http.Sockets(ca_cert=ca_cert)
    try:
        return list(await asyncio.gather(*(_one(sockets, url) for url in urls)))
    finally:
        await sockets.close()


async def _one(sockets: http.Sockets, url: str) -> Answer:
    try:
        reply = await sockets.send(url, "GET", "/registry/status", None, {}, _ASK_S)
        told = msgspec.json.decode(reply.body, type=_Envelope).body
    except errors.RemoteError as error:
        return Answer(url=url, trouble=str(error))
    except (msgspec.MsgspecError, UnicodeDecodeError):
        return Answer(url=url, trouble="something else than a registry answers there")
    if told.replica is None:
        return Answer(url=url, trouble="it does not follow anybody: is its REGISTRY_MODE replica or write-only?")
    return Answer(url=url, seen=told.replica, trouble=told.trouble)


def disputes(answers: Sequence[Answer]) -> list[str]:
    """What is wrong with the answers taken together, one sentence each."""
    known = [one.seen for one in answers if one.seen is not None]
    holders = sorted(one.url for one in known if one.mine)
    found = []
    if len(holders) > 1:
        found.append(f"{' and '.join(holders)} both believe to take pushes: the one of the lower term will soon hear")
    if known and not holders:
        found.append("no server takes pushes")
    return found
