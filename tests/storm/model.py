"""What clients may see of an instance: a small pure model, and the judgement of a recorded history by it.

An instance is one object; each call about it is an operation; `linear` looks for an order. The object goes its way by
itself along these arrows, and may stand anywhere on them:

    absent ──start──► Scheduling ─► Pulling ─► Started
                          └───────────┴──► Error
    any of these ──terminate──► Terminating ─► Terminated ─► forgotten

So it follows from the order alone that an accepted start is never lost, that every controller shows it at once, that it
never vanishes and comes back, that nothing is terminated unless a client asked for it (promise I4), and that it never
is Started after an accepted terminate (I5). No guest in this storm ends by itself, so Started never becomes Error.

A request to start is judged as a whole too: what was accepted has exactly as many instances as were asked for, however
often it was repeated (I7), and what was never answered has all of them or none; those the cloud may end by itself.
"""

import bisect
import dataclasses
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from tests.support import history, linear

ABSENT, FORGOTTEN = "absent", "forgotten"
_ON = {
    "Scheduling": ("Scheduling", "Pulling", "Started", "Error"),
    "Pulling": ("Pulling", "Started", "Error"),
    "Started": ("Started",),
    "Error": ("Error",),
    "Terminating": ("Terminating", "Terminated", FORGOTTEN),
    "Terminated": ("Terminated", FORGOTTEN),
    FORGOTTEN: (FORGOTTEN,),
    ABSENT: (ABSENT,),
}
_ENDING = ("Terminating", "Terminated", FORGOTTEN)


class Asked(NamedTuple):
    """An operation on one instance: start, terminate or look; `seen` is what a look showed. `call` is for people."""

    verb: str
    seen: str
    call: history.Call


Op = linear.Op[Asked]


def step(state: str, op: Op) -> Iterable[str]:
    """The states in which the instance may be once it answered so; where it goes by itself is left to the next look."""
    verb, seen, call = op.what
    if verb == "start":
        return ("Scheduling",) if state == ABSENT else ()
    if verb == "terminate":
        if seen == ABSENT and call.known:
            return (ABSENT,) if state == ABSENT else ()
        if state == ABSENT:
            return () if call.known else (ABSENT,)
        return (state,) if state in _ENDING else ("Terminating",)
    if seen != ABSENT:
        return (seen,) if seen in _ON[state] else ()
    if state == ABSENT:
        return (ABSENT,)
    return (FORGOTTEN,) if FORGOTTEN in _ON[state] else ()


# ---- requests to start ---------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Request:
    """One request to start, with all its repeats. `ids`: of each definite answer; `turned_up`: seen in a list only.

    `zombies`: an attempt without a key, recognised by external id and name, whose client hung up may still be under way
    (in a frozen balancer, say) when the repeat's instance was ended already; then it is a new start by the contract.
    """

    name: str
    count: int
    named: bool = False
    zombies: set[str] = dataclasses.field(default_factory=set)
    calls: list[history.Call] = dataclasses.field(default_factory=list)
    answers: list[tuple[str, ...]] = dataclasses.field(default_factory=list)
    turned_up: set[str] = dataclasses.field(default_factory=set)

    @property
    def accepted(self) -> bool:
        return bool(self.answers)

    @property
    def ids(self) -> set[str]:
        return {id for answer in self.answers for id in answer} | self.turned_up | self.zombies

    @property
    def called_ns(self) -> int:
        return min(call.called_ns for call in self.calls)

    @property
    def returned_ns(self) -> int | None:
        """When it was first known that it was accepted."""
        return min((call.returned_ns for call in self.calls if call.returned_ns and "ids" in call.answer), default=None)

    def trouble(self) -> str:
        """What is wrong with it as a whole; "" when nothing is."""
        if len(set(self.answers)) > 1:
            return f"its repeats were answered differently: {sorted(set(self.answers))}"
        if len(self.zombies) % self.count:
            return f"{self.count} were asked for, and a part came late: {sorted(self.zombies)}"
        ids = self.ids - self.zombies
        if self.accepted and len(ids) != self.count:
            return f"{self.count} were asked for and accepted, there are {len(ids)}: {sorted(ids)}"
        if len(ids) not in (0, self.count):
            return f"{self.count} were asked for, there are {len(ids)}: {sorted(ids)}"
        return ""


def requests(calls: Iterable[history.Call]) -> dict[str, Request]:
    """Every request to start, by the external id that its client gave it."""
    found: dict[str, Request] = {}
    lists = []
    ends: dict[str, int] = {}
    for call in calls:
        if call.what == "start":
            name = call.request["external_id"]
            named = call.request.get("kind") == "name"
            request = found.setdefault(name, Request(name, call.request["count"], named))
            request.calls.append(call)
            if call.known and "ids" in call.answer:
                request.answers.append(tuple(call.answer["ids"]))
        elif call.what == "list" and call.known:
            lists.append(call)
        elif call.what == "terminate":
            ends[call.request["id"]] = min(call.called_ns, ends.get(call.request["id"], call.called_ns))
    for call in sorted(lists, key=lambda call: call.returned_ns or 0):
        for id, (_state, name) in call.answer["vms"].items():
            if name in found and id not in found[name].ids:
                _enter(found[name], id, call, ends)
    return found


def _enter(request: Request, id: str, seen: history.Call, ends: dict[str, int]) -> None:
    """An instance that no answer has told of, where it was first seen."""
    lost = any(not call.known for call in request.calls)
    over = request.answers and all(ends.get(one, 1 << 63) < (seen.returned_ns or 0) for one in request.answers[0])
    (request.zombies if request.named and lost and over else request.turned_up).add(id)


# ---- histories of instances ----------------------------------------------------------------------------------------


def histories(calls: Sequence[history.Call], started: Iterable[Request]) -> dict[str, list[Op]]:
    """The operations of each instance: its start, looks and terminates of its own, and what lists said meanwhile."""
    own: dict[str, list[Op]] = defaultdict(list)
    for call in calls:
        if call.what == "terminate":
            own[call.request["id"]].append(_op(call, "terminate", (call.answer or {}).get("state", "")))
        elif call.what == "show" and call.known:
            own[call.request["id"]].append(_op(call, "look", call.answer["state"]))
    lists = sorted((call for call in calls if call.what == "list" and call.known), key=lambda call: call.called_ns)
    begun = [call.called_ns for call in lists]
    last = _last_seen(lists)
    found: dict[str, list[Op]] = {}
    for request in started:
        for id in request.ids:
            known_ns = None if id in request.zombies else request.returned_ns
            start = linear.Op(request.called_ns, known_ns, Asked("start", "", request.calls[0]))
            ops = [start, *own.get(id, ())]
            if not request.accepted:
                ops.append(linear.Op(request.called_ns, None, Asked("terminate", "", request.calls[0])))
            end = max([last.get(id, 0), *(op.returned or op.called for op in ops)])
            for call in _meanwhile(lists, begun, request.called_ns, end):
                seen = call.answer["vms"].get(id)
                ops.append(_op(call, "look", ABSENT if seen is None else seen[0]))
            found[id] = ops
    return found


def _op(call: history.Call, verb: str, seen: str) -> Op:
    return linear.Op(call.called_ns, call.returned_ns, Asked(verb, seen, call))


def _last_seen(lists: Iterable[history.Call]) -> dict[str, int]:
    """Instance → when a list that showed it last returned."""
    return {id: call.returned_ns or 0 for call in lists for id in call.answer["vms"]}


def _meanwhile(lists: list[history.Call], begun: list[int], first: int, last: int) -> Iterable[history.Call]:
    """The lists that overlap this time, and the one after it: whoever vanished is missing there."""
    after = bisect.bisect_right(begun, last)
    before = bisect.bisect_left(begun, first)
    while before > 0 and first - begun[before - 1] < _LONGEST_CALL_NS:
        before -= 1
    return (call for call in lists[before : after + 1] if (call.returned_ns or 0) >= first)


_LONGEST_CALL_NS = 30_000_000_000


def judge(ops: Sequence[Op]) -> str:
    """Why no order explains these operations; "" when one does."""
    verdict = linear.check(ops, ABSENT, step)
    if verdict.linearizable:
        return ""
    told = "; ".join(
        f"{op.what.verb} {op.what.seen} by {op.what.call.who} at {op.what.call.via}, called {op.called / 1e9:.3f},"
        f" returned {(op.returned or 0) / 1e9:.3f}"
        for op in verdict.blocked
    )
    return f"after {verdict.done} of {len(ops)} calls it was {verdict.state}, and none of these fits: {told}"
