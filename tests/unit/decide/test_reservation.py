"""Nobody waits for ever: a node is kept free for what smaller ones pass over, and waiting lifts a turn.

Trials over time are made from a seed (`fleet`); each bound that is checked is stated in docs/architecture.md.
"""

import random
from typing import Any

import msgspec
import pytest

from covey import model
from covey.decide import placement, reservation, rooms
from tests.support import nouns
from tests.unit.decide import fleet

RESOURCE = model.CapacityMode.RESOURCE
NUMBER = model.CapacityMode.NUMBER
Reason = placement.Reason
SPAN = 60


def node(id: str, *claims: tuple[str, int], cpu: int = 8, **changes: Any) -> rooms.Host:
    """A node by processors, with claims (instance, processors)."""
    held = tuple(model.Claim(instance=model.InstanceId(id), epoch=1, vcpu=vcpu, vram_mb=1) for id, vcpu in claims)
    return nouns.host(id, claims=held, cpu_count=cpu, ram_mb=1 << 20, capacity_mode=RESOURCE, **changes)


def big(vcpu: int = 6, **changes: object) -> model.Instance:
    return nouns.instance(id=model.InstanceId("big"), spec=nouns.spec(vcpu=vcpu, vram_mb=1), **changes)


def small(id: str = "small") -> model.Instance:
    return nouns.instance(id=model.InstanceId(id), spec=nouns.spec(vcpu=1, vram_mb=1))


def plan(
    waiting: list[model.Instance], hosts: list[rooms.Host], **births: int
) -> dict[str, placement.Place | placement.Wait]:
    """Births by name; what is not named was created before everything else."""
    cloud = placement.Cloud(hosts, lambda id: births.get(id, 0))
    return {decision.instance: decision for decision in placement.plan(waiting, cloud)}


def kept(decision: placement.Place | placement.Wait) -> str:
    assert isinstance(decision, placement.Wait)
    return decision.reserved


def test_later_ones_pass_by_until_they_have_taken_as_much_as_it_needs() -> None:
    older = node("n", ("a", 3), ("b", 3))
    found = plan([big(), small()], [older], a=1, b=2, big=5, small=6)
    assert (kept(found["big"]), found["small"]) == ("", placement.Place(model.InstanceId("small"), model.NodeId("n")))
    younger = node("n", ("a", 2), ("x", 2), ("y", 2))
    found = plan([big(), small()], [younger], a=1, x=6, y=7, big=5, small=8)
    assert kept(found["big"]) == "n"
    assert isinstance(found["small"], placement.Wait)
    assert found["small"].reason == Reason.RESERVED


def test_the_reason_names_what_is_kept_and_for_whom_nothing_is_kept_says_so() -> None:
    found = plan([big(), small()], [node("n", ("x", 4), name="mac-1")], x=6, big=5, small=8)
    texts = {id: decision.text for id, decision in found.items() if isinstance(decision, placement.Wait)}
    assert texts == {
        "big": "Waiting: all nodes that could take it are full (of 1 node: 1 full); mac-1 is kept free for it",
        "small": "Waiting: what is free is kept for instances that wait longer (of 1 node: 1 kept for another)",
    }


def test_it_is_placed_as_soon_as_it_fits_and_then_nothing_is_kept() -> None:
    found = plan([big(), small()], [node("n", ("x", 1))], x=6, big=5, small=8)
    assert isinstance(found["big"], placement.Place)
    assert isinstance(found["small"], placement.Place)


def test_one_that_stands_before_it_may_still_take_the_node() -> None:
    before = msgspec.structs.replace(small(), spec=nouns.spec(vcpu=1, vram_mb=1, priority=1))
    found = plan([big(), before], [node("n", ("x", 4))], x=6, big=5, small=8)
    assert isinstance(found["small"], placement.Place)
    assert kept(found["big"]) == "n"


def test_of_several_nodes_the_one_whose_last_awaited_vm_is_the_oldest() -> None:
    hosts = [node("n1", ("a", 4), ("x", 4)), node("n2", ("b", 4), ("y", 4)), node("n3", ("c", 4), ("z", 4))]
    births = {"a": 6, "x": 12, "b": 7, "y": 9, "c": 8, "z": 10, "big": 5}
    assert kept(plan([big(8)], hosts, **births)["big"]) == "n2"
    assert kept(plan([big(4)], hosts, **births)["big"]) == "n1"


@pytest.mark.parametrize(
    "host",
    [node("n", ("x", 6), drain=True), node("n", ("x", 6), alive=False), node("n", ("x", 6), trouble="disk full")],
    ids=["draining", "not alive", "in trouble"],
)
def test_no_node_is_kept_that_could_not_take_it(host: rooms.Host) -> None:
    assert kept(plan([big()], [host], x=6, big=5)["big"]) == ""


def test_no_node_is_kept_that_is_too_small_or_still_holds_it() -> None:
    assert kept(plan([big(9)], [node("n", ("x", 8))], x=6, big=5)["big"]) == ""
    assert kept(plan([big()], [node("n", ("x", 6), ("big", 1))], x=6, big=5)["big"]) == ""


def test_at_most_a_quarter_of_the_nodes_is_kept_and_each_for_one() -> None:
    hosts = [node(f"n{number}", (f"x{number}", 8)) for number in range(8)]
    waiting = [nouns.instance(id=model.InstanceId(f"b{n}"), spec=nouns.spec(vcpu=8, vram_mb=1)) for n in range(8)]
    births = {f"x{number}": 100 + number for number in range(8)} | {f"b{number}": number for number in range(8)}
    found = plan(waiting, hosts, **births)
    assert [kept(found[f"b{number}"]) for number in range(8)] == ["n0", "n1", "", "", "", "", "", ""]


def test_a_vm_that_does_not_end_is_not_waited_for_twice() -> None:
    """What was there before the last attempt counts no more as what will end soon."""
    hosts = [node("n1", ("eternal", 6)), node("n2", ("short", 6))]
    births = {"eternal": 6, "short": 500, "big": 5}
    assert kept(plan([big()], hosts, **births)["big"]) == "n1"
    one = placement.older(placement.older(big(), revision=300), revision=400)
    assert kept(plan([one], hosts, **births)["big"]) == "n2"


def test_attempts_last_longer_each_time() -> None:
    one, begins = big(), []
    for revision in range(1, placement.AGES + 1):
        before, one = one, placement.older(one, revision)
        if one.aged_from != before.aged_from:
            begins.append(revision)
    assert begins == [2, 8, 32]


# ---- turns -------------------------------------------------------------------------------------------------------


def test_each_span_of_waiting_lifts_a_turn_and_the_fourth_makes_all_equal() -> None:
    one = nouns.instance(spec=nouns.spec(priority=10_000))
    turns = []
    for revision in range(6):
        turns.append(placement.turn(one))
        one = placement.older(one, revision)
    assert turns == [10_000, 1000, 100, 10, 1, 1]


@pytest.mark.parametrize("seed", range(5))
def test_a_flood_of_the_first_class_starves_nobody(seed: int) -> None:
    """Bound: four spans, and then no longer than what was there before needs."""
    chance = random.Random(seed)
    trial = fleet.Fleet(chance, {f"n{number}": (NUMBER, 2, 8) for number in range(3)})
    last = trial.arrives(1, SPAN, priority=10_000)
    while not last.placed:
        while len(trial.waiting) < 8:
            trial.arrives(1, chance.randint(1, SPAN), priority=1)
        trial.turn()
        assert trial.waited(last) < 4 * fleet.AGE_TURNS + 10 * SPAN
    assert trial.waited(last) >= 4 * fleet.AGE_TURNS - SPAN, "the flood was none"


# ---- trials ------------------------------------------------------------------------------------------------------


def flood(trial: fleet.Fleet, turns: int, bigs: int = 0) -> list[fleet.Job]:
    """Small ones without end, and a large one now and then."""
    wanted = []
    for turn in range(turns):
        while sum(job.instance.spec.vcpu < 4 for job in trial.waiting.values()) < 6:
            trial.arrives(trial.chance.choice((1, 1, 2)), trial.chance.randint(1, SPAN))
        if bigs and turn % (turns // bigs) == SPAN:
            wanted.append(trial.arrives(12, SPAN))
        trial.turn()
    return wanted


def of_four(seed: int, *, reserves: bool = True, eternal: int = 0) -> fleet.Fleet:
    """Four nodes of sixteen processors, two of them with VMs that never end."""
    trial = fleet.Fleet(random.Random(seed), {f"n{number}": (RESOURCE, 0, 16) for number in range(4)}, reserves)
    for _ in range(eternal):
        trial.arrives(8, 1 << 40)
    trial.turn()
    return trial


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("eternal", [0, 2])
def test_a_large_request_is_placed_within_two_spans_of_the_others(seed: int, eternal: int) -> None:
    """As long as slots turn over: one span until enough was given to others, one until they have ended."""
    of = of_four(seed, eternal=eternal)
    jobs = flood(of, turns=1200, bigs=4)
    assert all(job.placed for job in jobs)
    assert max(map(of.waited, jobs)) <= 2 * SPAN


@pytest.mark.parametrize("seed", range(4))
def test_vms_that_never_end_and_came_later_hold_it_up_for_one_attempt(seed: int) -> None:
    """At first they look like the others. Bound: the attempts until one outlasts the spans of those that do end."""
    trial = of_four(seed)
    flood(trial, turns=SPAN)
    one = trial.arrives(12, SPAN)
    for _ in range(8):
        trial.arrives(2, 1 << 40)
    while not one.placed:
        flood(trial, turns=1)
        assert trial.waited(one) <= 2 * fleet.AGE_TURNS + 2 * SPAN


def test_without_it_a_large_request_starves_and_what_it_costs() -> None:
    """The reason for all this; and the price: less than three parts of a hundred of the processors."""
    greedy, fair = of_four(1, reserves=False), of_four(1)
    starved, served = flood(greedy, 1200, 4), flood(fair, 1200, 4)
    assert [bool(job.placed) for job in starved] == [False] * 4
    assert all(job.placed for job in served)
    assert fair.used > 0.97 * greedy.used


@pytest.mark.parametrize("seed", range(30))
def test_nobody_waits_while_something_free_and_unreserved_fits(seed: int) -> None:
    """Random fleets in both modes, planned and looked at with fresh eyes."""
    chance = random.Random(seed)
    modes = {f"n{n}": (chance.choice((NUMBER, RESOURCE)), chance.randint(0, 4), 8) for n in range(chance.randint(1, 9))}
    trial = fleet.Fleet(chance, modes)
    for _ in range(60):
        for _ in range(chance.randint(0, 6)):
            trial.arrives(chance.choice((1, 2, 4, 8, 9)), chance.randint(1, SPAN), priority=chance.choice((1, 1000)))
        decisions = trial.turn()
        reserved = {one.reserved for one in decisions if isinstance(one, placement.Wait)} - {""}
        free = [rooms.room(trial.host(id)) for id in trial.nodes if id not in reserved]
        assert len(reserved) <= max(sum(mode == RESOURCE for mode, _, _ in modes.values()) // 4, 1)
        for job in trial.waiting.values():
            assert not any(room.has_room(rooms.size(job.instance.spec)) for room in free)


def test_a_plan_is_the_same_for_whoever_makes_it() -> None:
    trial = of_four(7)
    flood(trial, 200, 2)
    cloud, waiting = trial.cloud(), [job.instance for job in trial.waiting.values()]
    again = cloud._replace(hosts=list(cloud.hosts)[::-1])
    assert placement.plan(waiting, cloud) == placement.plan(waiting[::-1], again)


def test_nothing_is_kept_where_every_vm_takes_one_slot() -> None:
    hosts = [nouns.host(slots=1, held=1)]
    reservations = reservation.Reservations([rooms.room(host) for host in hosts], lambda _: 9)
    assert reservations.exhausted
