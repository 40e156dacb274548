"""What blocks raising the store's format (safety S27)."""

import pytest

from covey.decide import upgrade


def program(number: int, format: int, version: str = "1.0.0", url: str = "") -> upgrade.Program:
    return upgrade.Program(f"id-{number}", url, version, format)


def test_nothing_is_to_be_raised_while_nobody_knows_more() -> None:
    found = upgrade.verdict(1, [program(1, 1), program(2, 1)], [])
    assert (found.target, found.blockers, found.may_finish) == (1, (), False)
    assert (
        found.notes[0] == "the store has format 1, the newest that any controller here knows: nothing is to be raised"
    )


def test_a_controller_that_knows_less_blocks_and_is_named() -> None:
    old = program(1, 1, "0.2.0", "http://one:8090")
    found = upgrade.verdict(1, [old, program(2, 2)], [])
    assert not found.may_finish
    assert found.blockers == (
        "controller http://one:8090 (id-1, version 0.2.0) writes format 1 at most: upgrade it, or stop it",
    )


def test_all_know_the_new_one() -> None:
    found = upgrade.verdict(1, [program(1, 2), program(2, 3)], [], target=2)
    assert (found.target, found.blockers, found.may_finish) == (2, (), True)


def test_by_itself_it_aims_at_the_newest_that_anybody_knows() -> None:
    found = upgrade.verdict(1, [program(1, 2), program(2, 3)], [])
    assert found.target == 3
    assert len(found.blockers) == 1


def test_a_restore_that_is_not_settled_blocks() -> None:
    found = upgrade.verdict(1, [program(1, 2)], [], unsettled="the store was restored and nodes have not told")
    assert found.blockers == ("the store was restored and nodes have not told: wait until that is settled",)


def test_without_a_live_controller_nothing_is_known() -> None:
    assert not upgrade.verdict(1, [], [], target=2).may_finish


@pytest.mark.parametrize("format", [2, 3])
def test_there_is_no_way_down(format: int) -> None:
    assert not upgrade.verdict(format, [program(1, 3)], [], target=2).may_finish


def test_agents_are_counted_and_never_block() -> None:
    found = upgrade.verdict(1, [program(1, 2)], ["0.1.0", "0.2.0", "0.1.0", ""])
    assert found.may_finish
    assert found.notes == (
        "agents: 2 of version 0.1.0, 1 of version 0.2.0, 1 of version unknown (any version may stay)",
    )


def test_several_versions_at_once_are_told() -> None:
    found = upgrade.verdict(1, [program(1, 1, "0.2.0"), program(2, 1, "0.3.0")], [])
    assert "an upgrade of the controllers is under way: 1 of version 0.2.0, 1 of version 0.3.0" in found.notes
