"""The judgement of a storm finds every kind of wrong that it is there for, in histories that are short enough to read.

Each history is told as a client would: (from, to, what, …) in seconds; `to` None when no answer came.
"""

from typing import Any

import pytest

from tests.storm import model, nodes, verdict
from tests.support import history

VM, JOB = "vm-1", "job-1"
STARTED, TERMINATED = "Started", "Terminated"


def call(called: float, returned: float | None, what: str, request: dict[str, Any], answer: Any) -> history.Call:
    known = None if returned is None else round(returned * 1e9)
    return history.Call("client", "c1", what, round(called * 1e9), known, request, answer)


def start(called: float, returned: float | None, *ids: str, count: int = 1, name: str = JOB) -> history.Call:
    answer = {"ids": list(ids)} if returned is not None else {"why": "no answer"}
    return call(called, returned, "start", {"external_id": name, "count": count}, answer)


def show(called: float, returned: float, state: str, id: str = VM) -> history.Call:
    return call(called, returned, "show", {"id": id}, {"state": state})


def listed(called: float, returned: float, name: str = JOB, **states: str) -> history.Call:
    vms = {id.replace("_", "-"): [state, name] for id, state in states.items()}
    return call(called, returned, "list", {}, {"vms": vms, "errors": {}})


def end(called: float, returned: float | None, id: str = VM) -> history.Call:
    return call(called, returned, "terminate", {"id": id}, {})


def misread(*calls: history.Call) -> bool:
    """Whether no order explains what was seen of VM."""
    told = model.histories(calls, model.requests(calls).values())
    return bool(model.judge(told[VM]))


GOOD = (
    start(0, 1, VM),
    show(2, 3, "Scheduling"),
    show(4, 5, "Pulling"),
    listed(6, 7, vm_1=STARTED),
    end(8, 9),
    show(10, 11, "Terminating"),
    listed(12, 13, vm_1=TERMINATED),
    listed(14, 15),
    show(16, 17, "absent"),
)


def test_a_life_as_it_should_be() -> None:
    assert not misread(*GOOD)


@pytest.mark.parametrize(
    ("wrong", "calls"),
    [
        ("a replica that is behind does not know it yet", [start(0, 1, VM), show(2, 3, "absent")]),
        ("it is missing from a list behind its start", [start(0, 1, VM), listed(2, 3), show(4, 5, STARTED)]),
        ("it vanished for ever", [start(0, 1, VM), show(2, 3, STARTED), listed(4, 5)]),
        ("a list shows an older state", [start(0, 1, VM), show(2, 3, STARTED), listed(4, 5, vm_1="Pulling")]),
        ("it is Started after its terminate", [start(0, 1, VM), end(2, 3), show(4, 5, STARTED)]),
        ("nobody terminated it", [start(0, 1, VM), show(2, 3, STARTED), show(4, 5, "Terminating")]),
        ("it failed by itself", [start(0, 1, VM), show(2, 3, STARTED), show(4, 5, "Error")]),
        ("it came back", [start(0, 1, VM), end(2, 3), show(4, 5, "absent"), listed(6, 7, vm_1=TERMINATED)]),
        ("a terminate finds nothing", [start(0, 1, VM), call(2, 3, "terminate", {"id": VM}, {"state": "absent"})]),
    ],
)  # fmt: skip
def test_what_clients_must_never_see(wrong: str, calls: list[history.Call]) -> None:
    assert misread(*calls), wrong


def test_what_is_under_way_may_be_seen_or_not() -> None:
    assert not misread(start(0, 9, VM), listed(1, 2), listed(3, 4, vm_1="Scheduling"))
    assert not misread(start(0, 1, VM), end(2, None), show(3, 4, STARTED), show(5, 6, "Terminating"))
    assert not misread(start(0, 1, VM), end(2, None), show(3, 4, STARTED), show(5, 6, STARTED))


def test_a_start_that_was_given_up_may_be_ended_by_the_cloud() -> None:
    ended = (listed(2, 3, vm_1="Pulling"), listed(4, 5, vm_1="Terminating"), listed(6, 7, vm_1=TERMINATED))
    assert not misread(start(0, None), *ended)
    assert misread(start(0, None), start(0.5, 1, VM), *ended), "but not when a repeat was answered with it"


def test_a_named_start_that_comes_late_is_a_new_one_only_after_the_end_of_the_first() -> None:
    """Recognised by external id and name as long as the instance is of use; a key is recognised for a day."""

    def named(called: float, returned: float | None, *ids: str) -> history.Call:
        request = {"external_id": JOB, "count": 1, "kind": "name"}
        return call(called, returned, "start", request, {"ids": list(ids)} if returned else {"why": "hung up"})

    late = listed(9, 10, vm_1=TERMINATED, vm_2="Pulling")
    assert not trouble(named(0, None), named(1, 2, VM), end(3, 4), late)
    assert trouble(named(0, None), named(1, 2, VM), late), "the first was still of use"
    assert trouble(named(1, 2, VM), end(3, 4), late), "nothing was under way any more"
    assert trouble(start(0, None), start(1, 2, VM), end(3, 4), late), "a key is not forgotten"


def trouble(*calls: history.Call) -> str:
    (request,) = model.requests(calls).values()
    return request.trouble()


def test_a_request_has_as_many_instances_as_it_asked_for() -> None:
    assert not trouble(start(0, 1, "a", "b", count=2))
    assert trouble(start(0, 1, "a", "b"))
    assert not trouble(start(0, None), start(2, 3, "a")), "a repeat that was answered"
    assert trouble(start(0, None), start(2, 3, "a"), listed(4, 5, b="Pulling")), (
        "and the first attempt came through too"
    )
    assert trouble(start(0, 1, "a"), start(2, 3, "b")), "a repeat that was answered with another one"
    assert not trouble(start(0, None, count=2), listed(4, 5)), "unknown: none"
    assert not trouble(start(0, None, count=2), listed(4, 5, a="Pulling", b="Pulling")), "or all"
    assert trouble(start(0, None, count=2), listed(4, 5, a="Pulling")), "but never a part"


# ---- what nodes ran ------------------------------------------------------------------------------------------------


def entry(what: str, at_s: float, *, node: str = "n1", epoch: int = 1, id: str = VM) -> nodes.Entry:
    return nodes.Entry(node, id, epoch, what, round(at_s * 1e9))


def closed(*entries: nodes.Entry, calls: tuple[history.Call, ...] = GOOD, **more: Any) -> verdict.Verdict:
    ran = nodes.Ran(list(entries), more.pop("bodies", []), more.pop("orders", {VM: "client: terminate request"}))
    told: dict[str, Any] = {"stuck": {}, "left": {}, "errors": {}, "nodes": {"c1": [["n1", "Active", 0, 10]]}, **more}
    return verdict.close(calls, ran, told)


def wrong(books: verdict.Verdict) -> list[str]:
    return [name for name in ("lost", "doubled", "leaked", "killed", "misread") if getattr(books, name)]


RAN = (entry("start", 5), entry("destroy", 9))


def test_books_that_are_right() -> None:
    books = closed(*RAN)
    assert (books.wrong, books.instances, books.creates, books.ends) == ([], 1, 1, 1)


def test_two_guests_of_one_instance_are_found() -> None:
    again = (entry("start", 6, node="n2", epoch=2), entry("destroy", 9, node="n2", epoch=2))
    assert wrong(closed(*RAN, *again)) == ["doubled"]


def test_a_guest_that_ended_before_anybody_asked_is_found() -> None:
    assert wrong(closed(entry("start", 5), entry("destroy", 7.9))) == ["killed"]
    assert wrong(closed(*RAN, orders={})) == ["killed"], "who asked for it must be on record"
    assert wrong(closed(entry("start", 5), entry("stop", 7), entry("destroy", 9))) == ["killed"]


def test_what_is_left_behind_is_found() -> None:
    assert wrong(closed(RAN[0])) == ["leaked"], "never destroyed"
    assert wrong(closed(*RAN, bodies=[("n1", f"{VM}.1")])) == ["leaked"], "its files are still there"
    assert wrong(closed(*RAN, nodes={"c1": [["n1", "Active", 1, 10]]})) == ["leaked"], "its slot is still held"
    stranger = (entry("start", 5, id="vm-2"), entry("destroy", 9, id="vm-2"))
    assert "leaked" in wrong(closed(*RAN, *stranger)), "a guest that nobody had asked for"


def test_what_never_came_to_be_is_found() -> None:
    accepted = (start(0, 1, VM), show(2, 3, "Scheduling"))
    assert wrong(closed(calls=accepted, stuck={VM: "Scheduling"}))[0] == "lost"
    assert closed(calls=accepted).creates != closed(calls=accepted).ends
    failed = (start(0, 1, VM), show(2, 3, "Error"), end(4, 5), show(6, 7, "absent"))
    assert wrong(closed(calls=failed, errors={VM: "no node took it"})) == ["lost"]
    why = "launched for an earlier life of this agent, which did not start it"
    assert wrong(closed(calls=failed, errors={VM: why})) == [], "an agent that died with a launch in its hand"
