"""What may be done after the store's history was broken by a restore: pure (safety S18, S19).

A store that was restored from a backup has forgotten what happened after it: terminates, launches, placements. Its
revisions count on from the backup's, so they may overtake what others have seen. Three questions are answered here:

    belongs      is a view that somebody saw one of this store's history?
    is_restored  has the store gone back since its newest nonce was written?
    may_begin    may an instance from before a break be placed or launched?

The chain of nonces tells histories apart: a nonce is random and never written twice, so a view (nonce, revision) is of
this history exactly if the newest nonce at that revision is that very nonce here too. A restored store that has
overtaken the revision is found out as soon as it got one nonce of its own, and the first thing that any controller
writes to it is one.

A *break* is a point in the chain where a controller found that the store was restored. Every node that was known then
is held until it has told what it has (adopted), or is given up by its operator. A held node is given nothing and asked
for nothing. An instance from before the break that the store does not know to be launched may run on a node that has
not told yet: it waits for all of them.
"""

import bisect
from collections.abc import Iterable, Sequence
from enum import StrEnum
from typing import NamedTuple

NAMES_SHOWN = 3
HELD = "it has not yet said what it runs since the store was restored"  # of a node


class Link(NamedTuple):
    """One nonce of the chain, oldest first in a chain."""

    revision: int  # at which it was created
    nonce: str


class View(NamedTuple):
    """What somebody saw of a store: the newest nonce then, and the revision."""

    nonce: str
    revision: int


class Kinship(StrEnum):
    """How a view relates to a store."""

    OWN = "own"
    FORGOTTEN = "older than what is known of this store's history"  # no proof of anything: hold and adopt
    AHEAD = "of a revision that this store has not reached"  # proof of a break, or of a store that lags
    FOREIGN = "of another history than this store's"  # proof of a break


class Origin(NamedTuple):
    """Where a store is in its own life; 0 and "" where that is not known. Within one history `cluster` is the same,
    and neither `term` nor `entries` ever goes back."""

    cluster: str = ""
    term: int = 0
    entries: int = 0  # of its log: the raft index


def newest(chain: Sequence[Link], revision: int) -> str:
    """The newest nonce at `revision`; "" when the chain does not reach back so far."""
    at = bisect.bisect_right(chain, revision, key=lambda link: link.revision)
    return chain[at - 1].nonce if at else ""


def kinship(chain: Sequence[Link], revision: int, seen: View) -> Kinship:
    """Whether `seen` is a view of the store whose chain and linearizable revision these are."""
    if not chain or seen.revision < chain[0].revision:
        return Kinship.FORGOTTEN
    if newest(chain, seen.revision) != seen.nonce:
        return Kinship.FOREIGN if seen.revision <= revision else Kinship.AHEAD
    return Kinship.OWN if seen.revision <= revision else Kinship.AHEAD


def restored(noted: Origin, present: Origin) -> str:
    """Why the store must have been restored since `noted` was written into it; "" when nothing says so."""
    if noted.cluster and present.cluster and noted.cluster != present.cluster:
        return f"its cluster id is {present.cluster}, and was {noted.cluster}"
    if present.term < noted.term and present.term:
        return f"its raft term went back from {noted.term} to {present.term}"
    if present.entries < noted.entries and present.entries:
        return f"its raft index went back from {noted.entries} to {present.entries}"
    return ""


def recorded_by_another(before: Sequence[Link], found: Link) -> bool:
    """Whether `found`, the newest break, was written after the restore that the holder of the chain `before` has just
    noticed: it is not in that chain, which is complete from its oldest link on."""
    return bool(before) and found.revision > before[0].revision and all(link.nonce != found.nonce for link in before)


class Standing(NamedTuple):
    """A node that the store knows, as far as breaks matter. `adopted` and `excused` name breaks."""

    node: str
    name: str
    adopted: str = ""
    excused: str = ""


def held(breach: str, adopted: str) -> bool:
    """Whether a node must tell what it has before anything is done there."""
    return breach not in ("", adopted)


def awaited(breach: Link, nodes: Iterable[Standing]) -> list[Standing]:
    """The nodes that were known at the break, or came forward after it, and have neither adopted nor been given up. A
    node that joins for the first time is entered as adopted: it has nothing to tell."""
    return [one for one in nodes if held(breach.nonce, one.adopted) and one.excused != breach.nonce]


def may_begin(breach: Link, settled: str, *, created: int, learnt: str, launched: bool) -> bool:
    """Whether an instance may be placed and launched. `settled`: the newest break that all nodes have answered for.
    `learnt`: the break after which the store learnt of the instance from a node, "" when a client asked for it."""
    before = created <= breach.revision or learnt == breach.nonce
    return launched or not before or breach.nonce in ("", settled)


def why_held_back(waits_for: Sequence[Standing]) -> str:
    """What a person is told of an instance that may not begin, and what to do."""
    if not waits_for:
        return "the store was restored; nodes that it has forgotten have a moment to come forward"
    names = ", ".join(one.name or one.node for one in waits_for[:NAMES_SHOWN])
    more = f" and {len(waits_for) - NAMES_SHOWN} more" if len(waits_for) > NAMES_SHOWN else ""
    has, it = ("has", "it is") if len(waits_for) == 1 else ("have", "they are")
    first = waits_for[0].name or waits_for[0].node
    noun = "node" if len(waits_for) == 1 else "nodes"
    return (
        f"until {noun} {names}{more} {has} reported what runs there: the store was restored; "
        f"`covey node release {first}` if {it} lost"
    )
