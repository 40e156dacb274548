"""How a member of etcd begins, case by case."""

import pytest

from covey.decide import bootstrap
from covey.decide.bootstrap import Disk, Heard, Listed, Me, Rejoin, Run, Wait

MEMBERS = {"n1": "http://h1:2380", "n2": "http://h2:2380", "n3": "http://h3:2380"}
CLUSTER = 99
ME = Me("n1", MEMBERS["n1"], MEMBERS, "/data", CLUSTER, frozenset({1, 2, 3}))


def listed(number: int, *, started: bool = True, name: str = "", id: int = 0, learner: bool = False) -> Listed:
    clients = (f"http://h{number}:2379",) if started else ()
    named = name or f"n{number}"
    return Listed(id or number, named if started or not id else "", (f"http://h{number}:2380",), clients, learner)


def heard(*members: Listed, cluster: int = CLUSTER, url: str = MEMBERS["n2"]) -> Heard:
    return Heard(url, cluster, members)


WELL = (listed(2), listed(3))


def test_a_new_cluster_begins_when_all_wait_and_not_before() -> None:
    decided = bootstrap.decide(ME, None, [], {"n2"})
    assert isinstance(decided, Wait) and "waiting for n3 at http://h3:2380" in decided.why
    assert bootstrap.decide(ME, None, [], {"n2", "n3"}) == Run("new", MEMBERS)


def test_who_comes_later_begins_the_same_cluster() -> None:
    others = [heard(listed(1, started=False), listed(2, started=False), listed(3, started=False))]
    assert bootstrap.decide(ME, None, others, {"n3"}) == Run("new", MEMBERS)


def test_data_goes_on_whether_others_answer_or_not() -> None:
    assert bootstrap.decide(ME, Disk(CLUSTER, 1), [], {"n2", "n3"}) == Run("existing", MEMBERS)
    assert bootstrap.decide(ME, Disk(CLUSTER, 1), [heard(listed(1), *WELL)], ()) == Run("existing", MEMBERS)


def test_a_lost_disk_is_rejoined_and_never_begun_as_new() -> None:
    decided = bootstrap.decide(ME, None, [heard(listed(1), *WELL)], ())
    assert isinstance(decided, Rejoin) and decided.id == 1 and "--rejoin" in decided.why


@pytest.mark.parametrize("learner", [True, False])
def test_a_newcomer_joins_what_exists(learner: bool) -> None:
    entered = listed(1, started=False, id=77, learner=learner)
    assert bootstrap.decide(ME, None, [heard(entered, *WELL)], ()) == Run("existing", MEMBERS, learner)


def test_a_learner_that_restarts_is_still_one() -> None:
    mine = listed(1, id=77, learner=True)
    assert bootstrap.decide(ME, Disk(CLUSTER, 77), [heard(mine, *WELL)], ()) == Run("existing", MEMBERS, True)


def test_others_keep_the_names_that_the_cluster_knows() -> None:
    renamed = listed(2, name="old-name")
    decided = bootstrap.decide(ME, None, [heard(listed(1, started=False, id=77), renamed, listed(3))], ())
    assert isinstance(decided, Run)
    assert decided.cluster == {"n1": MEMBERS["n1"], "old-name": MEMBERS["n2"], "n3": MEMBERS["n3"]}


@pytest.mark.parametrize(
    ("disk", "others", "why"),
    [
        (Disk(5, 1), [heard(listed(1), *WELL)], "data of cluster 5, but http://h2:2380 belongs to cluster 63"),
        (Disk(CLUSTER, 1), [heard(listed(1, id=77), *WELL)], "data of member 1, which was removed from the cluster"),
        (None, [heard(*WELL)], "has no member n1 at http://h1:2380: enter it first (covey etcd replace"),
        (None, [heard(Listed(1, "n1", ("http://old:2380",), ("http://old:2379",)), *WELL)], "has n1 at http://old"),
        (None, [heard(listed(1, name="n7"), *WELL)], "has n7 at http://h1:2380, not n1"),
        (None, [heard(*WELL), heard(*WELL, cluster=5, url=MEMBERS["n3"])], "one of them has the data"),
    ],
)  # fmt: skip
def test_what_needs_the_operator_is_one_sentence(disk: Disk | None, others: list[Heard], why: str) -> None:
    decided = bootstrap.decide(ME, disk, others, ())
    assert isinstance(decided, bootstrap.Refuse) and why in decided.why, decided
