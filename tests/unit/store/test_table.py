"""A table's frozen copies stay as they were."""

import itertools
import random

import pytest

from covey.store import view


@pytest.mark.parametrize("seed", range(5))
def test_what_is_frozen_does_not_change(seed: int) -> None:
    chance = random.Random(seed)
    table: view.Table[int] = view.Table()
    now: dict[str, int] = {}
    frozen: list[tuple[view.Table[int], dict[str, int]]] = []
    for step in range(2000):
        key = f"k{chance.randrange(300)}"
        if chance.random() < 0.6:
            assert table.put(key, step) == now.get(key)
            now[key] = step
        else:
            assert table.drop(key) == now.pop(key, None)
        if chance.random() < 0.1:
            frozen.append((table.freeze(), dict(now)))
    for copy, then in frozen:
        assert (dict(zip(copy.keys(), copy.values(), strict=True)), len(copy)) == (then, len(then))
    for (one, before), (other, after) in itertools.pairwise(frozen):
        differs = {key for key in before.keys() | after.keys() if before.get(key) != after.get(key)}
        assert set(other.differing(one)) == differs


def test_what_has_not_changed_is_not_frozen_again() -> None:
    table: view.Table[int] = view.Table()
    table.put("a", 1)
    copy = table.freeze()
    assert table.freeze() is copy
    table.drop("b")
    assert table.freeze() is copy
    table.drop("a")
    assert (copy.get("a"), table.freeze().get("a")) == (1, None)
