"""Who fetches from whom: one copy leaves the registry, or each holder, and no node sends many."""

import collections

from covey import model
from covey.decide import neighbours

TEMPLATE = model.Digest("sha256:" + "a" * 64)


def nodes(*names: str) -> list[model.NodeId]:
    return [model.NodeId(name) for name in names]


def many(count: int, mark: str = "n") -> list[model.NodeId]:
    return [model.NodeId(f"{mark}{number:03}") for number in range(count)]


def first(asker: str, holders: list[model.NodeId], pulling: list[model.NodeId]) -> str:
    """Whom it uses; "" for the registry."""
    return next(iter(neighbours.name(model.NodeId(asker), TEMPLATE, holders, pulling)), "")


def test_of_those_that_pull_at_once_one_goes_to_the_registry_and_each_other_to_the_one_before_it() -> None:
    pulling = nodes("c", "a", "b")
    assert [first(node, [], pulling) for node in pulling] == ["", "c", "a"]


def test_others_are_named_for_when_the_first_does_not_help() -> None:
    pulling = nodes("a", "b", "c", "d", "e")
    assert neighbours.name(pulling[4], TEMPLATE, [], pulling) == ("d", "c", "b")
    assert neighbours.name(pulling[2], TEMPLATE, [], pulling) == ("b", "a")


def test_each_holder_begins_a_chain() -> None:
    holders, pulling = nodes("h1", "h2"), many(6)
    found = [first(node, holders, pulling) for node in pulling]
    assert sorted(found[:2]) == ["h1", "h2"]
    assert found[2:] == pulling[:4]


def test_a_holder_is_always_among_the_named() -> None:
    holders, pulling = nodes("h1"), many(10)
    assert all("h1" in neighbours.name(node, TEMPLATE, holders, pulling) for node in pulling)


def test_however_many_pull_nobody_sends_more_than_one_copy_and_nobody_waits_for_itself() -> None:
    for holders in ([], many(1, "h"), many(3, "h"), many(40, "h")):
        pulling = many(30)
        uses = [first(node, holders, pulling) for node in pulling]
        assert max(collections.Counter(use for use in uses if use).values()) == 1
        assert uses.count("") == (0 if holders else 1)
        for node, use in zip(pulling, uses, strict=True):
            assert use in ("", *holders) or pulling.index(model.NodeId(use)) < pulling.index(node)


def test_a_node_with_several_vms_of_the_template_is_one_and_a_holder_waits_for_nobody_that_pulls() -> None:
    pulling = nodes("a", "a", "h", "b", "a")
    assert first("b", [], nodes("a", "a", "b")) == "a"
    assert first("a", nodes("h"), pulling) == "h"
    assert first("b", nodes("h"), pulling) == "a"


def test_a_late_one_that_is_in_no_list_comes_last() -> None:
    assert first("late", [], nodes("a", "b")) == "b"
    assert first("late", [], []) == ""
