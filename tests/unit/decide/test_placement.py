"""Which waiting instance goes where (promise I3, safety S10, S11)."""

import time

import msgspec
import pytest

from covey import model
from covey.decide import pauses, placement, rooms
from tests.support import nouns

Reason = placement.Reason
host = nouns.host
instance = nouns.instance
spec = nouns.spec
IMAGE = spec().digest


def plan_of(
    waiting: list[model.Instance],
    hosts: list[rooms.Host],
    births: dict[model.InstanceId, int] | None = None,
    paused: pauses.Paused | None = None,
) -> list[placement.Place | placement.Wait]:
    known = births or {}
    return placement.plan(waiting, placement.Cloud(hosts, lambda id: known.get(id, 0), paused or {}))


def placed(plan: list[placement.Place | placement.Wait]) -> dict[str, str]:
    return {item.instance: item.node for item in plan if isinstance(item, placement.Place)}


def reasons(plan: list[placement.Place | placement.Wait]) -> list[Reason]:
    return [item.reason for item in plan if isinstance(item, placement.Wait)]


def test_a_free_node_takes_it() -> None:
    one = instance()
    assert plan_of([one], [host("a")]) == [placement.Place(one.id, model.NodeId("a"))]


def test_claims_count_whatever_they_are_for() -> None:
    """Promise I3: also those that no instance wants any more."""
    assert reasons(plan_of([instance()], [host(slots=2, held=2)])) == [Reason.FULL]


def test_no_more_than_there_is_room_for() -> None:
    plan = plan_of([instance() for _ in range(5)], [host("a", slots=2), host("b", slots=1)])
    assert sorted(placed(plan).values()) == ["a", "a", "b"]
    assert reasons(plan) == [Reason.FULL, Reason.FULL]


def test_starts_spread() -> None:
    plan = plan_of([instance() for _ in range(4)], [host(id, slots=4) for id in "abcd"])
    assert sorted(placed(plan).values()) == ["a", "b", "c", "d"]


def test_the_template_already_there_is_worth_more_than_emptiness() -> None:
    one = instance()
    nodes = [host("empty", slots=4), host("has-it", slots=4, held=3, images=frozenset({IMAGE}))]
    assert placed(plan_of([one], nodes)) == {one.id: "has-it"}


def test_lower_priority_first_then_age() -> None:
    late, soon, early = (
        instance(created_ns=3, spec=spec(priority=1000)),
        instance(created_ns=2, spec=spec(priority=1)),
        instance(created_ns=1, spec=spec(priority=1000)),
    )
    plan = plan_of([late, soon, early], [host("a", slots=2)])
    assert set(placed(plan)) == {soon.id, early.id}


@pytest.mark.parametrize(
    ("nodes", "wanted", "reason"),
    [
        ([], spec(), Reason.NO_NODES),
        ([host(arch=model.Arch.ARM64)], spec(), Reason.NO_ARCH),
        ([host("a")], spec(node="b"), Reason.UNKNOWN_NODE),
        ([host("a", drain=True), host("b")], spec(node="a"), Reason.DRAINING),
        ([host(alive=False)], spec(), Reason.NOT_ALIVE),
        ([host(trouble="disk full")], spec(), Reason.TROUBLE),
        ([host(owed=True)], spec(), Reason.TROUBLE),
        ([host(held=2), host(drain=True), host(arch=model.Arch.ARM64)], spec(), Reason.FULL),
        ([host(capacity_mode=model.CapacityMode.RESOURCE)], spec(vcpu=99), Reason.TOO_LARGE),
        ([host(slots=0)], spec(), Reason.FULL),
    ],
    ids=lambda value: value.name if isinstance(value, Reason) else "",
)
def test_every_instance_left_waiting_has_a_reason(nodes: list[rooms.Host], wanted: model.Spec, reason: Reason) -> None:
    plan = plan_of([instance(spec=wanted)], nodes)
    assert reasons(plan) == [reason]
    assert isinstance(plan[0], placement.Wait)
    assert plan[0].text.startswith("Waiting: ")


def test_the_text_tells_of_all_nodes() -> None:
    (wait,) = plan_of([instance()], [host(held=2), host(held=2), host(drain=True)])
    assert isinstance(wait, placement.Wait)
    assert wait.text == "Waiting: all nodes that could take it are full (of 3 nodes: 2 full, 1 draining)"


def test_a_pinned_node_is_the_only_one() -> None:
    one = instance(spec=spec(node="b"))
    assert placed(plan_of([one], [host("a", images=frozenset({IMAGE})), host("b")])) == {one.id: "b"}


def test_a_node_that_owes_a_withdrawn_placement_gets_nothing_new() -> None:
    """Safety S10."""
    one = instance()
    assert placed(plan_of([one], [host("a", owed=True), host("b")])) == {one.id: "b"}


def test_a_node_that_still_holds_an_older_epoch_of_it_is_passed_over() -> None:
    """Its VM is being cleaned up; a second one of the same instance must not meet it there (promise I2)."""
    one, two = instance(created_ns=1), instance(created_ns=2)
    a = host("a", slots=5, claims=(model.Claim(instance=one.id, epoch=1),))
    assert placed(plan_of([one, two], [a, host("b", slots=1)])) == {one.id: "b", two.id: "a"}
    assert reasons(plan_of([one], [a])) == [Reason.CLEANING]


def test_nodes_that_refused_come_last() -> None:
    one = instance(refused=(model.NodeId("a"),))
    nodes = [host("a", images=frozenset({IMAGE})), host("b", slots=9, held=8)]
    assert placed(plan_of([one], nodes)) == {one.id: "b"}
    assert placed(plan_of([one], nodes[:1])) == {one.id: "a"}


def test_a_node_that_has_just_refused_it_is_left_alone_with_it_alone() -> None:
    one, two = instance(refused=(model.NodeId("a"),), message="disk full"), instance()
    a, b = host("a", name="a1", slots=5), host("b", slots=5)
    paused = {one.id: (a.id,)}
    assert placed(plan_of([one, two], [a], paused=paused)) == {two.id: "a"}
    assert placed(plan_of([one], [a, b], paused=paused)) == {one.id: "b"}
    assert placed(plan_of([one], [a])) == {one.id: "a"}
    (wait,) = plan_of([one], [a, host(held=2)], paused=paused)
    assert wait == placement.Wait(
        one.id,
        Reason.REFUSED,
        "Waiting: it was refused and is tried again after a pause (of 2 nodes: 1 tried again, 1 full)"
        "; refused by a1: disk full",
    )


def test_age_is_the_order_of_creation_and_no_clock() -> None:
    """Two controllers' clocks may differ; the store's order does not."""
    first, second = instance(created_ns=9), instance(created_ns=1)
    plan = plan_of([first, second], [host(slots=1)], births={first.id: 4, second.id: 5})
    assert set(placed(plan)) == {first.id}


def test_capacity_by_processors_and_memory() -> None:
    node = host("a", slots=1, cpu_count=8, ram_mb=8192, capacity_mode=model.CapacityMode.RESOURCE)
    wanted = [instance(spec=spec(vcpu=4, vram_mb=2048)) for _ in range(3)]
    assert len(placed(plan_of(wanted, [node]))) == 2
    wanted = [instance(spec=spec(vcpu=1, vram_mb=4096)) for _ in range(3)]
    assert len(placed(plan_of(wanted, [node]))) == 2


def test_overrides_of_the_operator() -> None:
    assert len(placed(plan_of([instance() for _ in range(9)], [host(slots=1, max_vms=3)]))) == 3
    resource = host(
        cpu_count=1, ram_mb=1, vcpu_override=4, ram_mb_override=4096, capacity_mode=model.CapacityMode.RESOURCE
    )
    assert len(placed(plan_of([instance(spec=spec(vcpu=2, vram_mb=2048)) for _ in range(9)], [resource]))) == 2


def test_the_same_snapshot_gives_the_same_plan() -> None:
    waiting = [instance() for _ in range(40)]
    nodes = [host(str(n), slots=3) for n in range(10)]
    assert plan_of(waiting, nodes) == plan_of(waiting[::-1], nodes[::-1])


def test_a_large_queue_is_planned_quickly() -> None:
    """1000 waiting and 500 nodes: the loop plans on every change."""
    waiting = [instance(spec=spec(digest=f"sha256:{n % 5}")) for n in range(1000)]
    nodes = [host(f"{n:03}", slots=3, held=n % 3) for n in range(500)]
    began = time.process_time()
    plan = plan_of(waiting, nodes)
    assert len(placed(plan)) == 1000
    full = plan_of(waiting, [host(f"{n:03}", held=2) for n in range(500)])
    assert len(reasons(full)) == 1000
    assert time.process_time() - began < 0.5


def test_a_large_queue_is_planned_quickly_whoever_refused_whom() -> None:
    """A registry is away: of 2000 that wait each was refused by other nodes, with a message of its own. A controller
    that plans for seconds counts as frozen (safety S24)."""
    nodes = [host(f"{n:03}", slots=3) for n in range(500)]
    waiting = [
        msgspec.structs.replace(
            instance(),
            refused=tuple(model.NodeId(f"{(n * k) % 500:03}") for k in (1, 3, 7)),
            message=f"blob {n} cannot be pulled",
        )
        for n in range(2000)
    ]
    paused = {one.id: (*one.refused[: n % 4], pauses.EVERYWHERE) for n, one in enumerate(waiting)}
    began = time.process_time()
    assert set(reasons(plan_of(waiting, nodes, paused=paused))) == {Reason.REFUSED}
    some = {one.id: one.refused for one in waiting}
    assert len(placed(plan_of(waiting, nodes, paused=some))) == 1500
    assert time.process_time() - began < 0.8


def candidates(wanted: model.Spec, nodes: list[rooms.Host], *waiting: model.Instance, liked: str = "") -> list[str]:
    if not placement.may_be_born_placed(wanted, waiting):
        return []
    fleet = [rooms.room(node) for node in nodes]
    return list(placement.candidates_for_new(placement.kind_of(wanted), fleet, lambda id: -(id == liked)))


def test_a_new_instance_does_not_overtake() -> None:
    nodes = [host("a")]
    assert candidates(spec(), nodes) == ["a"]
    assert candidates(spec(), nodes, instance()) == []
    assert candidates(spec(priority=1), nodes, instance()) == ["a"]
    assert candidates(spec(), nodes, instance(spec=spec(arch=model.Arch.ARM64))) == ["a"]
    assert candidates(spec(node="a"), nodes, instance(spec=spec(node="b"))) == ["a"]
    assert candidates(spec(), [host("b"), host("a"), host("c")], liked="b") == ["b", "a", "c"]
    assert candidates(spec(), [host("b", held=2), host("c", images=frozenset({IMAGE})), host("d")]) == ["c", "d"]
