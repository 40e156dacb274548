"""The checker finds what is wrong with a history, and nothing in a right one: registers whose truth is known."""

import random
from collections.abc import Iterable

import pytest

from tests.support import linear

Op = linear.Op[tuple[str, int]]


def register(state: int, op: Op) -> Iterable[int]:
    """A number that is written and read."""
    verb, value = op.what
    if verb == "write":
        yield value
    elif value == state:
        yield state


def judge(*ops: tuple[int, int | None, str, int]) -> bool:
    made = [Op(called, returned, (verb, value)) for called, returned, verb, value in ops]
    return linear.check(made, 0, register).linearizable


def test_one_after_the_other() -> None:
    assert judge((0, 1, "write", 1), (2, 3, "read", 1), (4, 5, "write", 2), (6, 7, "read", 2))


def test_a_stale_read_is_found() -> None:
    assert not judge((0, 1, "write", 1), (2, 3, "read", 0))


def test_while_a_write_is_under_way_both_answers_are_right_but_never_back_again() -> None:
    assert judge((0, 9, "write", 1), (1, 2, "read", 0), (3, 4, "read", 1))
    assert not judge((0, 9, "write", 1), (1, 2, "read", 1), (3, 4, "read", 0))


def test_a_write_without_an_answer_may_come_late_or_never() -> None:
    assert judge((0, None, "write", 1), (2, 3, "read", 0), (4, 5, "read", 1))
    assert judge((0, None, "write", 1), (2, 3, "read", 0), (4, 5, "read", 0))
    assert not judge((0, None, "write", 1), (2, 3, "read", 1), (4, 5, "read", 0))
    assert not judge((4, None, "write", 1), (2, 3, "read", 1)), "not before it was asked for"


def test_the_verdict_names_what_could_not_come_next() -> None:
    ops = [Op(0, 1, ("write", 1)), Op(2, 3, ("read", 1)), Op(4, 5, ("read", 7))]
    verdict = linear.check(ops, 0, register)
    assert (verdict.linearizable, verdict.done, verdict.state) == (False, 2, 1)
    assert verdict.blocked == (ops[2],)


def test_a_search_without_end_is_given_up() -> None:
    ops = [Op(0, 1000, ("write", value)) for value in range(12)] + [Op(2000, 2001, ("read", 99))]
    with pytest.raises(linear.TooHard):
        linear.check(ops, 0, register, limit=1000)


def history(chance: random.Random, clients: int, count: int) -> list[Op]:
    """What clients of a true register saw: each operation comes to pass at a moment between its call and its return."""
    free = [0] * clients
    moments = []
    for _ in range(count):
        client = min(range(clients), key=free.__getitem__)
        called = free[client] + chance.randrange(1, 100)
        happens = called + chance.randrange(1, 100)
        free[client] = happens + chance.randrange(1, 100)
        moments.append((happens, called, free[client]))
    state, ops = 0, []
    for _, called, returned in sorted(moments):
        if chance.random() < 0.5:
            state = chance.randrange(5)
            ops.append(Op(called, returned, ("write", state)))
        else:
            ops.append(Op(called, returned, ("read", state)))
    return ops


@pytest.mark.parametrize("seed", range(20))
def test_a_true_register_passes_and_one_forged_answer_does_not(seed: int) -> None:
    chance = random.Random(seed)
    ops = history(chance, clients=5, count=200)
    assert linear.check(ops, 0, register).linearizable
    reads = [place for place, op in enumerate(ops) if op.what[0] == "read"]
    forged = list(ops)
    place = chance.choice(reads)
    forged[place] = Op(ops[place].called, ops[place].returned, ("read", 99))
    assert not linear.check(forged, 0, register).linearizable


@pytest.mark.parametrize("seed", range(20))
def test_an_answer_that_comes_from_long_ago_is_found(seed: int) -> None:
    """A read long after a value was overwritten, which tells that value: what a stale mirror does."""
    chance = random.Random(seed)
    ops = history(chance, clients=4, count=60)
    end = max(op.returned or 0 for op in ops)
    late = [Op(end + 1, end + 2, ("write", 7)), Op(end + 3, end + 4, ("write", 8)), Op(end + 5, end + 6, ("read", 7))]
    assert not linear.check([*ops, *late], 0, register).linearizable
    late[-1] = Op(end + 5, end + 6, ("read", 8))
    assert linear.check([*ops, *late], 0, register).linearizable
