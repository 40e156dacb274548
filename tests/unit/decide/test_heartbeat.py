"""The interval of heartbeats grows with the fleet, within what a lease allows (safety S8)."""

import pytest

from covey import wire
from covey.decide import heartbeat

SET_S = 5.0


def messages_per_s(nodes: int, controllers: int, least_s: float = SET_S) -> float:
    """What one controller gets from an idle fleet."""
    interval_s = heartbeat.interval_s(nodes, controllers, least_s)
    beats = 1 / interval_s if interval_s <= wire.POLL_LIMIT_S else 0.0  # else the next poll comes first
    return nodes / controllers * (1 / wire.POLL_LIMIT_S + beats)


@pytest.mark.parametrize(("nodes", "controllers"), [(0, 1), (1, 0), (1, 1), (600, 1), (2000, 3)])
def test_a_small_fleet_is_told_what_was_set(nodes: int, controllers: int) -> None:
    assert heartbeat.interval_s(nodes, controllers, SET_S) == SET_S


@pytest.mark.parametrize(("nodes", "controllers"), [(700, 1), (1000, 1), (1900, 1), (2000, 1), (3000, 3), (5000, 3)])
def test_a_controller_gets_no_more_messages_than_its_budget(nodes: int, controllers: int) -> None:
    assert messages_per_s(nodes, controllers) <= heartbeat.BUDGET * 1.0001


def test_beyond_that_polls_alone_are_the_sign_of_life() -> None:
    told_s = heartbeat.interval_s(10_000, 3, SET_S)
    assert told_s == heartbeat.MOST_S > wire.POLL_LIMIT_S
    assert messages_per_s(10_000, 3) == pytest.approx(10_000 / 3 / wire.POLL_LIMIT_S)


def test_it_grows_with_the_fleet_and_shrinks_with_more_controllers() -> None:
    for controllers in (1, 3, 5):
        told = [heartbeat.interval_s(nodes, controllers, SET_S) for nodes in range(0, 20_000, 50)]
        assert told == sorted(told)
    assert heartbeat.interval_s(3000, 5, SET_S) <= heartbeat.interval_s(3000, 3, SET_S)


@pytest.mark.parametrize("nodes", [1, *range(650, 1100, 10), 100_000])
@pytest.mark.parametrize("least_s", [1.0, SET_S, 8.0])
def test_two_signs_of_life_fit_into_a_lease(nodes: int, least_s: float) -> None:
    """However old the renewal is that an answer rests on."""
    told_s = heartbeat.interval_s(nodes, 1, least_s)
    believed_s = wire.LEASE_TTL_S - wire.LEASE_MARGIN_S - heartbeat.oldest_s(told_s)
    assert 2 * told_s <= believed_s


@pytest.mark.parametrize("told_s", [0.5, SET_S, 6.0, 7.5, 9.0, heartbeat.MOST_S, 20.0])
def test_the_next_renewal_is_asked_for_before_the_last_is_too_old(told_s: float) -> None:
    """By one of the messages that come in any case, so that none waits for it: where there is room for that."""
    asked_s, oldest_s = heartbeat.shared_s(told_s), heartbeat.oldest_s(told_s)
    assert heartbeat.SHARED_S <= asked_s <= oldest_s - heartbeat.GATHER_S
    if told_s <= SET_S:
        assert (asked_s, oldest_s) == (9.5, 15.0)
    if told_s >= heartbeat.MOST_S:
        assert (asked_s, oldest_s) == (heartbeat.SHARED_S, heartbeat.OLDEST_S)
    if asked_s > heartbeat.SHARED_S:
        assert asked_s + max(told_s, SET_S) <= oldest_s


def test_an_operator_who_wants_fewer_is_heeded() -> None:
    assert heartbeat.interval_s(10_000, 1, 20.0) == heartbeat.interval_s(1, 1, 20.0) == 20.0


@pytest.mark.parametrize("least_s", [1.0, SET_S, 20.0])
def test_silence_is_judged_by_the_longest_interval_that_is_told(least_s: float) -> None:
    told = max(heartbeat.interval_s(nodes, 1, least_s) for nodes in range(0, 50_000, 100))
    assert heartbeat.silent_after_s(least_s) == 2 * wire.LEASE_TTL_S + wire.WORD_S + told
