"""What is observed by what has changed is what is observed by going through everything."""

import random

import pytest

from covey.controller import observation, watchlist
from covey.decide import deadlines
from tests.support import jumble

S = 1_000_000_000
Kind = deadlines.Kind


@pytest.mark.parametrize("seed", range(20))
def test_a_look_at_what_differs_comes_to_the_same_as_a_look_at_everything(seed: int) -> None:
    chance = random.Random(seed)
    store = jumble.Jumble(chance)
    spans = deadlines.Spans()._replace(terminated_ns=5 * S, error_ns=9 * S, unwanted_ns=4 * S, waiting_ns=3 * S)
    quick = observation.Observation()
    quick.forget()
    plain: deadlines.Observed = {}
    kinds: set[Kind] = set()
    for second in range(1500):
        for _ in range(chance.choice((0, 0, 1, 1, 5))):
            store.change()
        if chance.random() < 0.02:
            chance.choice((store.restore, store.settle))()
        if chance.random() < 0.02:
            store.list_again()
        if chance.random() < 0.01:
            quick.forget()
            plain = {}
        snapshot = store.snapshot()
        now_ns = second * S
        quick.look(snapshot, now_ns)
        plain = deadlines.observe(plain, watchlist.things(snapshot), now_ns)
        assert {thing: quick.since(thing) for thing in quick} == plain
        patience_ns = chance.choice((0, S))
        ripe = deadlines.ripe(plain, spans, now_ns, patience_ns)
        assert quick.ripe(spans, now_ns, patience_ns) == ripe
        kinds |= {thing.kind for thing in ripe}
    assert kinds >= {Kind.TERMINATED, Kind.ERROR, Kind.UNWANTED, Kind.WAITING, Kind.UNACKNOWLEDGED}
