"""What may be done after a restore, rule by rule (safety S18, S19)."""

import pytest

from covey.decide import permission

Kinship = permission.Kinship
Link = permission.Link
Origin = permission.Origin
View = permission.View
CHAIN = (Link(10, "a"), Link(50, "b"), Link(90, "c"))


@pytest.mark.parametrize(
    ("seen", "kin"),
    [
        (View("a", 10), Kinship.OWN),
        (View("a", 49), Kinship.OWN),
        (View("b", 50), Kinship.OWN),
        (View("c", 100), Kinship.OWN),
        (View("c", 101), Kinship.AHEAD),
        (View("b", 95), Kinship.FOREIGN),  # seen before a restore that has overtaken it: here it would have been "c"
        (View("x", 95), Kinship.FOREIGN),
        (View("b", 49), Kinship.FOREIGN),
        (View("x", 120), Kinship.AHEAD),
        (View("x", 9), Kinship.FORGOTTEN),  # away for longer than the chain is kept
    ],
)
def test_a_view_is_of_this_history_if_the_newest_nonce_then_is_its_own(seen: View, kin: Kinship) -> None:
    assert permission.kinship(CHAIN, 100, seen) is kin


def test_without_a_chain_nothing_is_proved() -> None:
    assert permission.kinship((), 100, View("a", 50)) is Kinship.FORGOTTEN


@pytest.mark.parametrize(
    ("present", "why"),
    [
        (Origin("one", 3, 900), ""),
        (Origin("one", 4, 901), ""),
        (Origin("one", 2, 950), "raft term"),
        (Origin("one", 3, 12), "raft index"),
        (Origin("two", 9, 5000), "cluster id"),
        (Origin(), ""),  # not known now
    ],
)
def test_a_store_that_went_back_was_restored(present: Origin, why: str) -> None:
    found = permission.restored(Origin("one", 3, 900), present)
    assert (why in found) if why else found == ""


def test_nonces_of_an_older_version_say_nothing() -> None:
    assert permission.restored(Origin(), Origin("one", 2, 8)) == ""


@pytest.mark.parametrize(
    ("found", "known"),
    [
        (Link(95, "d"), True),  # by another controller, since this one's copy was made
        (Link(50, "b"), False),  # an earlier break, which this one knew
        (Link(5, "z"), False),  # from before all that this one knew: a backup that old says nothing
        (Link(0, ""), False),
    ],
)
def test_one_restore_is_entered_once(found: Link, known: bool) -> None:
    assert permission.recorded_by_another(CHAIN, found) is known


def test_a_node_is_held_until_it_has_adopted_since_the_newest_break() -> None:
    assert not permission.held("", "")
    assert permission.held("b2", "")
    assert permission.held("b2", "b1")
    assert not permission.held("b2", "b2")


def test_who_is_waited_for() -> None:
    silent = permission.Standing("n1", "one")
    told = permission.Standing("n2", "two", adopted="b2")
    given_up = permission.Standing("n3", "three", excused="b2")
    given_up_before = permission.Standing("n4", "four", adopted="b1", excused="b1")
    assert permission.awaited(Link(90, "b2"), [silent, told, given_up, given_up_before]) == [silent, given_up_before]


@pytest.mark.parametrize(
    ("settled", "created", "learnt", "launched", "may"),
    [
        ("", 80, "", False, False),  # from before the break: it may run on a node that has not told yet
        ("", 80, "", True, True),  # the store knows where it runs
        ("", 91, "", False, True),  # born after it
        ("", 95, "b2", False, False),  # learnt from a node: it is older than its record
        ("b2", 80, "", False, True),
        ("b1", 80, "", False, False),
    ],
)
def test_what_may_begin(settled: str, created: int, learnt: str, launched: bool, may: bool) -> None:
    found = permission.may_begin(Link(90, "b2"), settled, created=created, learnt=learnt, launched=launched)
    assert found is may


def test_nothing_is_held_back_where_there_was_no_break() -> None:
    assert permission.may_begin(Link(0, ""), "", created=1, learnt="", launched=False)


def test_why_an_instance_is_held_back_names_who_and_what_to_do() -> None:
    nodes = [permission.Standing(f"n{number}", f"node-{number}") for number in range(5)]
    assert permission.why_held_back(nodes[:1]) == (
        "until node node-0 has reported what runs there: "
        "the store was restored; `covey node release node-0` if it is lost"
    )
    assert "node-0, node-1, node-2 and 2 more have" in permission.why_held_back(nodes)
    assert "moment" in permission.why_held_back([])
