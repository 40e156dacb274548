"""The cloud itself: bootstrap, the chain of history nonces (safety S18), controllers."""

from typing import NamedTuple

from covey.store import base, commit, schema


class Cloud(NamedTuple):
    id: str
    history: str  # the nonce just added


class WrongFormat(NamedTuple):
    """The store's data has another format than this program writes."""

    found: int


async def start(writer: commit.Writer) -> Cloud | WrongFormat:
    """At each controller start, before anything else: writes format and cloud id once, and adds a history nonce."""
    raise NotImplementedError


async def add_nonce(writer: commit.Writer) -> str:
    """Lengthen the history chain (hourly, and after each backup)."""
    raise NotImplementedError


async def announce(writer: commit.Writer, controller: schema.Controller, lease: base.Lease) -> None:
    """This controller is there as long as `lease` lives."""
    raise NotImplementedError
