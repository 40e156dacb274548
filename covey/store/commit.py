"""Every write of Covey is a function of a `commit_*` module; this is the engine beneath them.

A write is a *rule*: a pure function that reads nouns through a `Reading` and answers with a `Write` or with a plain
value (a refusal, or "it is so already"). Everything a rule reads is compared by the transaction that carries its
writes, together with the store's format (safety S27), so a write happens exactly if what it was decided on still
stands. When it does not, the transaction's other branch brings the present values and the rule decides again on them:
callers get a definite answer without waiting for the mirror.

Replies get lost. An `Unsure` transaction is sent again unchanged until the outcome is definite (safety S15). Every
written noun carries the transaction's id, so a guard that fails because our own first copy was applied is known by
the bytes it finds. Nothing new is sent after `until_ns` (safety S24).

    commit_births     create (one transaction, all or none) and closing the door on a create whose reply was lost
    commit_instances  place, withdraw, launch, terminate, fail, update, forget
    commit_reports    what agents report
    commit_nodes      join, leave, remove, configure, word with adoption of claims, destroy orders
    commit_cloud      bootstrap, history nonces, controllers
"""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from typing import Generic, NamedTuple, TypeVar

import msgspec

from covey import errors, model, world
from covey.store import base, codec, schema, view

R = TypeVar("R")
T = TypeVar("T", bound=msgspec.Struct)

LIMIT_NS = 10_000_000_000  # nothing is committed for a request older than this (safety S24)
_ATTEMPTS = 50  # each lost race means that somebody else got on; this many in a row mean a bug
_RESEND_S = 0.05
_HOUR_NS = 3600 * 1_000_000_000


class Lost(NamedTuple):
    """What the decision rested on has changed meanwhile: look again."""

    why: str = ""


class Missing(NamedTuple):
    """The noun named does not exist."""


class Done(NamedTuple, Generic[T]):
    """The noun as it now stands. `changed` False: it was so already and nothing was written."""

    noun: codec.Kept[T]
    changed: bool = True


class Reading:
    """The nouns a rule rests on: from a snapshot, or fresh from the transaction that lost."""


class Writer:
    """The one way to the store for writes. One per process; holds no state but short-lived shared leases."""

    def __init__(self, store: base.Store, world: world.World, *, who: str = "controller") -> None:
        self.store = store
        self.world = world
        self.who = who
