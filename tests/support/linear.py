"""Is there an order? A linearizability checker for the operations on one object (Wing and Gong 1993; Lowe 2017).

A history is linearizable when its operations can be put into one order in which

* each comes to pass somewhere between its call and its return,
* the object, which does one operation after the other, could have answered each as it was answered.

The object is a function of the state and the operation to the states it may be in afterwards; none: it could not have
answered so. Several: the object does things by itself. An operation that never returned may come to pass at any time
after its call, or never.

The search goes depth first through what may come next and remembers where it was: a set of operations done and the
state after them is a place, and a place is entered once. Objects are independent, so a long history of many objects is
many short ones; the cost grows with how many operations overlap, hardly with how many there are.
"""

import dataclasses
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Generic, TypeVar

State = TypeVar("State", bound=Hashable)
Asked = TypeVar("Asked")


class TooHard(Exception):
    """The search was given up; nothing is known."""


@dataclasses.dataclass(frozen=True)
class Op(Generic[Asked]):
    """One operation: what was asked and answered, as the object's function understands it."""

    called: int
    returned: int | None
    what: Asked


@dataclasses.dataclass(frozen=True)
class Verdict(Generic[State, Asked]):
    """`blocked` are operations of which one had to come next, after the longest order that was found, and none could;
    `state` is the object's then. Both are empty when the history is linearizable."""

    linearizable: bool
    done: int = 0
    state: State | None = None
    blocked: tuple[Op[Asked], ...] = ()


def check(
    ops: Sequence[Op[Asked]],
    initial: State,
    step: Callable[[State, Op[Asked]], Iterable[State]],
    *,
    limit: int = 200_000,
) -> Verdict[State, Asked]:
    """Look for an order. Raises TooHard after `limit` places."""
    line = sorted(ops, key=lambda op: op.called)
    due = sum(1 << place for place, op in enumerate(line) if op.returned is not None)
    visited: set[tuple[int, State]] = set()
    trail: list[tuple[int, State]] = [(0, initial)]
    furthest = trail[0]
    while trail:
        here = trail.pop()
        if here in visited:
            continue
        visited.add(here)
        if len(visited) > limit:
            raise TooHard(f"{len(line)} operations: more than {limit} places")
        done, state = here
        if done & due == due:
            return Verdict(linearizable=True)
        if (done & due).bit_count() > (furthest[0] & due).bit_count():
            furthest = here
        for place in _next(line, done):
            trail += [(done | 1 << place, after) for after in step(state, line[place])]
    done, state = furthest
    blocked = tuple(line[place] for place in _next(line, done) if line[place].returned is not None)
    return Verdict(linearizable=False, done=done.bit_count(), state=state, blocked=blocked)


def _next(line: Sequence[Op[Asked]], done: int) -> list[int]:
    """Operations that may come to pass now: those called before the first return that is still to come. The earliest
    call last, so that a stack tries it first."""
    found: list[int] = []
    first_return: int | None = None
    place = _first_undone(done)
    while place < len(line):
        op = line[place]
        if not done >> place & 1:
            if first_return is not None and op.called > first_return:
                break
            found.append(place)
            if op.returned is not None and (first_return is None or op.returned < first_return):
                first_return = op.returned
        place += 1
    return [place for place in reversed(found) if first_return is None or line[place].called <= first_return]


def _first_undone(done: int) -> int:
    return (~done & (done + 1)).bit_length() - 1
