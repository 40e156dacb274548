"""The table of the life-cycle, cell by cell, against an expectation written down independently of it.

`EXPECTED` is the life-cycle as docs/architecture.md tells it, in a notation of its own. Every State × Event that it
does not name must have no effect, for every combination of facts: a new event or state fails here until it is
considered.
"""

import itertools

import pytest

from covey import lifecycle, model

S = model.State
E = lifecycle.Event

# state: {event: outcome}. An outcome is a state, or "stays" | "waits again" (for a node) | "forgotten" | "before".
# A pair is (when launched, when not); a dict is by whether a claim is held.
BY_CLAIM = {True: S.TERMINATING, False: S.TERMINATED}
EXPECTED: dict[S, dict[E, object]] = {
    S.SCHEDULING: {E.PLACED: S.PULLING, E.FAILED: S.ERROR, E.TERMINATE: S.TERMINATED},
    S.PULLING: {
        E.PLACED: (None, S.PULLING),  # S1: once launched, never placed again
        E.BOOTED: S.STARTED,
        E.FAILED: S.ERROR,
        E.REFUSED: (None, "waits again"),
        E.NODE_LOST: ("stays", "waits again"),
        E.NODE_REMOVED: S.ERROR,
        E.TERMINATE: BY_CLAIM,
    },
    S.STARTED: {
        E.STOP: S.STOPPING,
        E.SAVE: S.PUSHING,
        E.FAILED: S.ERROR,
        E.NODE_LOST: "stays",
        E.NODE_REMOVED: S.ERROR,
        E.TERMINATE: BY_CLAIM,
    },
    S.STOPPING: {
        E.STOPPED: S.STOPPED,
        E.FAILED: S.ERROR,
        E.NODE_LOST: "stays",
        E.NODE_REMOVED: S.ERROR,
        E.TERMINATE: BY_CLAIM,
    },
    S.STOPPED: {
        E.START: S.PULLING,
        E.SAVE: S.PUSHING,
        E.FAILED: S.ERROR,
        E.NODE_LOST: "stays",
        E.NODE_REMOVED: S.ERROR,
        E.TERMINATE: BY_CLAIM,
    },
    S.PUSHING: {
        E.PUSHED: S.TERMINATING,
        E.PUSH_FAILED: "before",
        E.NODE_LOST: "stays",
        E.NODE_REMOVED: S.ERROR,
        E.TERMINATE: BY_CLAIM,
    },
    S.TERMINATING: {
        E.GONE: S.TERMINATED,
        E.NODE_LOST: "stays",
        E.NODE_REMOVED: S.TERMINATED,
        E.TERMINATE: "stays",
    },
    S.ERROR: {
        E.TERMINATE: BY_CLAIM,
        E.REAPED: BY_CLAIM,
        E.GONE: "stays",
        E.NODE_LOST: "stays",
        E.NODE_REMOVED: "stays",
    },
    S.TERMINATED: {E.TERMINATE: "stays", E.GONE: "stays", E.FORGOTTEN: "forgotten"},
}


def expected(state: S, event: E, *, launched: bool, claimed: bool) -> lifecycle.Step | None:
    outcome = EXPECTED[state].get(event)
    if isinstance(outcome, tuple):
        outcome = outcome[0 if launched else 1]
    if isinstance(outcome, dict):
        outcome = outcome[claimed]
    match outcome:
        case None:
            return None
        case "stays":
            return lifecycle.Step(state)
        case "waits again":
            return lifecycle.Step(state, replace=True)
        case "forgotten":
            return lifecycle.Step(None)
        case "before":
            return lifecycle.Step(S.STARTED)
        case S():
            return lifecycle.Step(outcome, new_epoch=event in (E.PLACED, E.START))
    raise AssertionError(f"the expectation of {state} × {event} is malformed: {outcome!r}")


def test_the_expectation_considers_every_state() -> None:
    assert set(EXPECTED) == set(S)


def test_every_event_means_something_somewhere() -> None:
    assert {event for row in EXPECTED.values() for event in row} == set(E)


@pytest.mark.parametrize("state", S)
@pytest.mark.parametrize("event", E)
def test_cell(state: S, event: E) -> None:
    for launched, claimed in itertools.product((True, False), repeat=2):
        step = lifecycle.step(state, event, launched=launched, claimed=claimed, before=S.STARTED)
        assert step == expected(state, event, launched=launched, claimed=claimed), (launched, claimed)


@pytest.mark.parametrize("before", [S.STARTED, S.STOPPED])
def test_a_failed_push_returns_to_the_state_it_was_asked_in(before: S) -> None:
    assert lifecycle.step(S.PUSHING, E.PUSH_FAILED, before=before) == lifecycle.Step(before)


@pytest.mark.parametrize("state", [S.TERMINATING, S.TERMINATED])
@pytest.mark.parametrize("claimed", [True, False])
@pytest.mark.parametrize("launched", [True, False])
def test_terminate_wins(state: S, claimed: bool, launched: bool) -> None:
    """After an accepted terminate no chain of events leads back to a living instance (promise I5)."""
    reached, fresh = set[S](), {state}
    while fresh:
        reached |= fresh
        steps = [lifecycle.step(at, event, launched=launched, claimed=claimed) for at in fresh for event in E]
        fresh = {step.state for step in steps if step is not None and step.state is not None} - reached
    assert reached <= {S.TERMINATING, S.TERMINATED}


@pytest.mark.parametrize("event", E)
def test_a_launched_instance_never_waits_for_a_node_again(event: E) -> None:
    """Safety S1: after launch, neither a placement nor a wait for one has a place in any row but a stopped one's."""
    for state in S:
        step = lifecycle.step(state, event, launched=True)
        if step is not None:
            assert not step.replace
            assert not step.new_epoch or state in (S.SCHEDULING, S.STOPPED)


def test_no_cell_is_written_twice() -> None:
    cells = [(state, event, fact) for state, event, fact, _target in lifecycle.ROWS]
    assert len(cells) == len(set(cells))
    always = {(state, event) for state, event, fact in cells if fact == lifecycle.Fact.ALWAYS}
    assert not always & {(state, event) for state, event, fact in cells if fact != lifecycle.Fact.ALWAYS}
