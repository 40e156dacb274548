"""How often agents send a sign of life, and when a node counts as silent: pure (safety S8, S26).

A controller hears of a node by its poll, which parks for a third of the lease's life, and by a heartbeat when the node
has said nothing for the interval that it was told. In a small fleet that interval is the one that was set: a frozen
controller is noticed by what an idle node says next. In a large one it grows, so that a controller gets no more than
so many messages a second for the mere being there of nodes:

    messages a second = nodes / controllers × (1 / POLL_LIMIT_S + 1 / interval)

It ends at half of the time for which an agent believes in its lease at least, which is less by how old the renewal may
be that an answer rests on. Two signs of life still fit into that time, so one may get lost; and as polls come more
often, they alone are the sign then: nothing cheaper would keep the lease.

The other way round the interval says how old such a renewal may be (`oldest_s`). Where signs of life come often, one
renewal carries many of them: an agent is told its age, so what it believes stays right. The next renewal is asked for
an interval before that (`shared_s`), by a message that does not wait for it:

    told interval      5 s     6 s     7 s   7.5 s on
    oldest renewal    15 s    13 s    11 s     10 … 3.5 s   = TTL − margin − 2 × interval
    asked for after  9.5 s   6.5 s   3.5 s           3 s    = oldest − interval − GATHER_S, at least SHARED_S

Whoever is told is not written down, and an old agent may not heed it. So silence is judged by the longest interval
that any controller tells: late for some, early for none.
"""

import msgspec

from covey import model, wire

BUDGET = 200.0  # messages a second that a controller takes for granted: about a fifth of a core
GATHER_S = 0.5  # from when a renewal is asked for until it is there, while the store is well
SHARED_S = 3.0  # for so long at least the messages of a node rest on one renewal without asking for another
OLDEST_S = SHARED_S + GATHER_S
MOST_S = (wire.LEASE_TTL_S - wire.LEASE_MARGIN_S - OLDEST_S) / 2


def interval_s(nodes: int, controllers: int, least_s: float) -> float:
    """What to tell the agents of so many nodes, shared by so many controllers. `least_s` is what was set."""
    most_s = max(least_s, MOST_S)
    if nodes <= 0:
        return least_s
    spare = BUDGET * max(controllers, 1) / nodes - 1 / wire.POLL_LIMIT_S  # heartbeats a second of one node
    return max(least_s, min(most_s, 1 / spare)) if spare > 0 else most_s


def oldest_s(told_s: float) -> float:
    """How old a renewal is at most that an answer rests on, while the store can be asked, where agents are told this
    interval. No less often than by default do they count on a sign of life, however short an interval was set."""
    signs_s = 2 * max(told_s, wire.HEARTBEAT_S)
    return max(OLDEST_S, wire.LEASE_TTL_S - wire.LEASE_MARGIN_S - signs_s)


def shared_s(told_s: float) -> float:
    """How old a renewal is when a message asks for the next one."""
    return max(SHARED_S, oldest_s(told_s) - max(told_s, wire.HEARTBEAT_S) - GATHER_S)


def silent_after_s(least_s: float) -> float:
    """For how long a node's word may stand still while its lease lives. Two lease times (a lease may outlive its node,
    as each election restarts it), after the word's own minute and the heartbeat by which it is sent at the latest."""
    return 2 * wire.LEASE_TTL_S + wire.WORD_S + max(least_s, MOST_S)


def figureless(word: model.Word) -> model.Word:
    """The word without the figures that change all the time: those alone are no news (safety S26)."""
    return msgspec.structs.replace(
        word, messages=0, at_ns=0, free_disk_bytes=0, image_bytes=0, cpu_util=0.0, ram_util=0.0, tx=""
    )


def is_news(word: model.Word, before: model.Word | None) -> bool:
    """Whether a node's word says more than newer figures."""
    return before is None or figureless(word) != figureless(before)
