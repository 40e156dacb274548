"""The life-cycle of an instance: State × Event → State. The only place where a state changes.

`step` answers with a `Step`, or None when the event has no place in the row: a late "booted" after "terminate" is
simply not there. What an event means can depend on two facts beside the state: whether this epoch was *launched* (it
may have run guest code, so it is never placed again, safety S1) and whether any node holds a *claim* for it (else
nobody would ever say `gone`, safety S13). The picture in docs/reference/lifecycle.md is drawn from `ROWS`.
"""

from enum import StrEnum
from typing import NamedTuple

from covey import model

State = model.State


class Event(StrEnum):
    """What can happen to an instance."""

    PLACED = "placed"  # a node was chosen; the epoch rises
    BOOTED = "booted"  # the agent reports a complete vminfo (and a monitored script that ended well)
    FAILED = "failed"  # the agent reports that it cannot go on; or nothing could ever take it
    REFUSED = "refused"  # the agent cannot take this placement, or did not acknowledge it
    NODE_LOST = "node-lost"  # the node's lease ended
    NODE_REMOVED = "node-removed"  # an operator removed the node
    STOP = "stop"
    STOPPED = "stopped"
    START = "start"  # a stopped instance starts again; the epoch rises
    SAVE = "save"
    PUSHED = "pushed"
    PUSH_FAILED = "push-failed"
    TERMINATE = "terminate"
    GONE = "gone"  # the node says that nothing of the VM is left
    REAPED = "reaped"  # 24 h in Error
    FORGOTTEN = "forgotten"  # INSTANCE_TIME_OUT after Terminated: the record goes


class Fact(StrEnum):
    """When a row's cell applies, beside the state."""

    ALWAYS = ""
    LAUNCHED = "launched"
    NOT_LAUNCHED = "not launched"
    CLAIMED = "claimed"
    UNCLAIMED = "no claim"


class Step(NamedTuple):
    """The outcome of an event. `state` None: the record is removed. `replace`: it waits for a node again."""

    state: State | None
    replace: bool = False
    new_epoch: bool = False


BEFORE = "as before"  # a failed push returns to the state it was asked in

_S, _E, _F = State, Event, Fact
_KEEP = "keep"
_REPLACE = "re-place"
_REMOVE = "remove"

# (state, event, fact) -> target state, or one of the words above. Order is the order of drawing.
ROWS: tuple[tuple[State, Event, Fact, State | str], ...] = (
    (_S.SCHEDULING, _E.PLACED, _F.ALWAYS, _S.PULLING),
    (_S.SCHEDULING, _E.FAILED, _F.ALWAYS, _S.ERROR),
    (_S.SCHEDULING, _E.TERMINATE, _F.ALWAYS, _S.TERMINATED),
    (_S.PULLING, _E.PLACED, _F.NOT_LAUNCHED, _S.PULLING),
    (_S.PULLING, _E.BOOTED, _F.ALWAYS, _S.STARTED),
    (_S.PULLING, _E.FAILED, _F.ALWAYS, _S.ERROR),
    (_S.PULLING, _E.REFUSED, _F.NOT_LAUNCHED, _REPLACE),
    (_S.PULLING, _E.NODE_LOST, _F.NOT_LAUNCHED, _REPLACE),
    (_S.PULLING, _E.NODE_LOST, _F.LAUNCHED, _KEEP),
    (_S.PULLING, _E.NODE_REMOVED, _F.ALWAYS, _S.ERROR),
    (_S.PULLING, _E.TERMINATE, _F.CLAIMED, _S.TERMINATING),
    (_S.PULLING, _E.TERMINATE, _F.UNCLAIMED, _S.TERMINATED),
    (_S.STARTED, _E.STOP, _F.ALWAYS, _S.STOPPING),
    (_S.STARTED, _E.SAVE, _F.ALWAYS, _S.PUSHING),
    (_S.STARTED, _E.FAILED, _F.ALWAYS, _S.ERROR),
    (_S.STARTED, _E.NODE_LOST, _F.ALWAYS, _KEEP),
    (_S.STARTED, _E.NODE_REMOVED, _F.ALWAYS, _S.ERROR),
    (_S.STARTED, _E.TERMINATE, _F.CLAIMED, _S.TERMINATING),
    (_S.STARTED, _E.TERMINATE, _F.UNCLAIMED, _S.TERMINATED),
    (_S.STOPPING, _E.STOPPED, _F.ALWAYS, _S.STOPPED),
    (_S.STOPPING, _E.FAILED, _F.ALWAYS, _S.ERROR),
    (_S.STOPPING, _E.NODE_LOST, _F.ALWAYS, _KEEP),
    (_S.STOPPING, _E.NODE_REMOVED, _F.ALWAYS, _S.ERROR),
    (_S.STOPPING, _E.TERMINATE, _F.CLAIMED, _S.TERMINATING),
    (_S.STOPPING, _E.TERMINATE, _F.UNCLAIMED, _S.TERMINATED),
    (_S.STOPPED, _E.START, _F.ALWAYS, _S.PULLING),
    (_S.STOPPED, _E.SAVE, _F.ALWAYS, _S.PUSHING),
    (_S.STOPPED, _E.FAILED, _F.ALWAYS, _S.ERROR),
    (_S.STOPPED, _E.NODE_LOST, _F.ALWAYS, _KEEP),
    (_S.STOPPED, _E.NODE_REMOVED, _F.ALWAYS, _S.ERROR),
    (_S.STOPPED, _E.TERMINATE, _F.CLAIMED, _S.TERMINATING),
    (_S.STOPPED, _E.TERMINATE, _F.UNCLAIMED, _S.TERMINATED),
    (_S.PUSHING, _E.PUSHED, _F.ALWAYS, _S.TERMINATING),
    (_S.PUSHING, _E.PUSH_FAILED, _F.ALWAYS, BEFORE),
    (_S.PUSHING, _E.NODE_LOST, _F.ALWAYS, _KEEP),
    (_S.PUSHING, _E.NODE_REMOVED, _F.ALWAYS, _S.ERROR),
    (_S.PUSHING, _E.TERMINATE, _F.CLAIMED, _S.TERMINATING),
    (_S.PUSHING, _E.TERMINATE, _F.UNCLAIMED, _S.TERMINATED),
    (_S.TERMINATING, _E.GONE, _F.ALWAYS, _S.TERMINATED),
    (_S.TERMINATING, _E.NODE_LOST, _F.ALWAYS, _KEEP),
    (_S.TERMINATING, _E.NODE_REMOVED, _F.ALWAYS, _S.TERMINATED),
    (_S.TERMINATING, _E.TERMINATE, _F.ALWAYS, _KEEP),
    (_S.ERROR, _E.TERMINATE, _F.CLAIMED, _S.TERMINATING),
    (_S.ERROR, _E.TERMINATE, _F.UNCLAIMED, _S.TERMINATED),
    (_S.ERROR, _E.REAPED, _F.CLAIMED, _S.TERMINATING),
    (_S.ERROR, _E.REAPED, _F.UNCLAIMED, _S.TERMINATED),
    (_S.ERROR, _E.GONE, _F.ALWAYS, _KEEP),
    (_S.ERROR, _E.NODE_LOST, _F.ALWAYS, _KEEP),
    (_S.ERROR, _E.NODE_REMOVED, _F.ALWAYS, _KEEP),
    (_S.TERMINATED, _E.TERMINATE, _F.ALWAYS, _KEEP),
    (_S.TERMINATED, _E.GONE, _F.ALWAYS, _KEEP),
    (_S.TERMINATED, _E.FORGOTTEN, _F.ALWAYS, _REMOVE),
)

_TABLE: dict[tuple[State, Event], dict[Fact, State | str]] = {}
for _state, _event, _fact, _target in ROWS:
    _TABLE.setdefault((_state, _event), {})[_fact] = _target


def step(
    state: State, event: Event, *, launched: bool = False, claimed: bool = True, before: State | None = None
) -> Step | None:
    """What `event` does to an instance in `state`, or None when it has no place there.

    `launched` and `claimed` are facts of the instance's present epoch; `before` is where a failed push returns to.
    """
    cell = _TABLE.get((state, event))
    if cell is None:
        return None
    facts = (
        Fact.ALWAYS,
        Fact.LAUNCHED if launched else Fact.NOT_LAUNCHED,
        Fact.CLAIMED if claimed else Fact.UNCLAIMED,
    )
    target = next((cell[fact] for fact in facts if fact in cell), None)
    if target is None:
        return None
    if isinstance(target, State):
        return Step(target, new_epoch=event in (Event.PLACED, Event.START))
    if target == _REMOVE:
        return Step(None)
    if target == BEFORE:
        return Step(before or State.STOPPED)
    return Step(state, replace=target == _REPLACE)


def adopted(*, launched: bool, running: bool, stopped: bool, complete: bool) -> State:
    """The state of an instance that the store learns of from its node, after a restore from a backup (safety S19).
    `complete`: all is known of the VM that an instance in Started shows. What is launched and does not run is Pulling
    until its node, asked to run it, says that it failed."""
    if stopped:
        return State.STOPPED
    return State.STARTED if launched and running and complete else State.PULLING


# Shown by docs/reference/lifecycle.md and used by listings: states in which an instance may hold a slot on its node.
LIVING = frozenset(State) - {State.TERMINATED}
