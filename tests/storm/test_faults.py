"""A plan of faults follows from its seed, fits into its time, and is one that a cloud can promise to survive."""

import pytest

from tests.storm import faults

HOSTS = faults.Hosts(
    members=("e1", "e2", "e3"), controllers=("c1", "c2", "c3"), agents=("n1", "n2", "n3", "n4"), balancers=("lb",)
)
SEEDS = range(30)


def test_a_seed_gives_one_plan() -> None:
    assert faults.plan(7, 300, HOSTS) == faults.plan(7, 300, HOSTS) != faults.plan(8, 300, HOSTS)


def test_every_kind_of_fault_comes_to_everybody() -> None:
    planned = [fault for seed in SEEDS for fault in faults.plan(seed, 300, HOSTS)]
    assert {fault.kind for fault in planned} == {*faults.PROCESS, *faults.LINK}
    assert {name for fault in planned for name in fault.targets} == {
        name for group in (HOSTS.members, HOSTS.controllers, HOSTS.agents, HOSTS.balancers) for name in group
    }
    assert any(fault.for_s > 30 for fault in planned), "longer than a node's lease"
    together = [one for one in planned if any(two.at_s < one.at_s < two.until_s for two in planned)]
    assert together, "faults overlap"


@pytest.mark.parametrize("seed", SEEDS)
def test_a_quorum_is_lost_for_short_spells_only(seed: int) -> None:
    plan = faults.plan(seed, 1800, HOSTS)
    assert len(plan) > 80
    assert all(0 < fault.at_s < fault.until_s < 1800 for fault in plan)
    for fault in plan:
        going = [one for one in plan if one.at_s <= fault.at_s < one.until_s]
        for group in (HOSTS.members, HOSTS.controllers):
            hurt = {name for one in going for name in (*one.targets, one.peer) if name in group}
            assert len(hurt) <= 1 or all(one.for_s <= faults.SPELL_S for one in going if hurt & set(one.targets))
