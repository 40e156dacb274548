"""What may be left out of an answer, and how it is made whole again."""

import pytest

from covey import model, wire
from covey.decide import abridged

RUN, STOP, KEEP, DESTROY = wire.Verb.RUN, wire.Verb.STOP, wire.Verb.KEEP, wire.Verb.DESTROY


def want(name: str, verb: wire.Verb = RUN, *, epoch: int = 1, launched: bool = True) -> wire.Wanted:
    return wire.Wanted(instance=model.InstanceId(name), epoch=epoch, verb=verb, launched=launched)


@pytest.mark.parametrize(
    ("verb", "launched", "lasts"),
    [(RUN, True, True), (RUN, False, False), (STOP, True, True), (KEEP, False, True), (DESTROY, True, False)],
)
def test_orders_and_what_is_not_launched_are_told_every_time(verb: wire.Verb, launched: bool, lasts: bool) -> None:
    assert abridged.lasts(verb, launched=launched) == lasts


def test_what_lasts_stays_and_the_rest_is_as_it_is_told() -> None:
    known = [want("a"), want("b", launched=False), want("c", DESTROY), want("d", KEEP)]
    told = [want("e", launched=False), want("d", DESTROY)]
    assert abridged.whole(known, told) == (want("a"), want("d", DESTROY), want("e", launched=False))


def test_an_instance_is_wanted_in_one_epoch_and_ordered_away_in_others() -> None:
    known = [want("a", KEEP), want("b", epoch=2)]
    told = [want("a", epoch=2, launched=False), want("b", DESTROY)]
    assert abridged.whole(known, told) == (want("a", epoch=2, launched=False), want("b", DESTROY), want("b", epoch=2))


def test_the_tag_tells_when_something_is_missing_or_too_much() -> None:
    tag = wire.tag([want("a"), want("b")], ["question"])
    assert abridged.is_all([want("a"), want("b")], tag)
    assert not abridged.is_all([want("a")], tag)
    assert not abridged.is_all([want("a"), want("b", STOP)], tag)
    assert not abridged.is_all([want("a"), want("b"), want("c")], tag)
