"""How a member of etcd begins, case by case."""

import pytest

from covey.decide import bootstrap
from covey.decide.bootstrap import Agree, Disk, Heard, Listed, Me, Rejoin, Run, Wait

MEMBERS = {"n1": "http://h1:2380", "n2": "http://h2:2380", "n3": "http://h3:2380"}
CLUSTER = 99
ME = Me("n1", MEMBERS["n1"], MEMBERS, "/data", CLUSTER, frozenset({1, 2, 3}))


def listed(number: int, *, started: bool = True, name: str = "", id: int = 0, learner: bool = False) -> Listed:
    clients = (f"http://h{number}:2379",) if started else ()
    named = name or f"n{number}"
    return Listed(id or number, named if started or not id else "", (f"http://h{number}:2380",), clients, learner)


def heard(*members: Listed, cluster: int = CLUSTER, url: str = MEMBERS["n2"], doubt: str = "") -> Heard:
    return Heard(url, cluster, members, doubt)


WELL = (listed(2), listed(3))


AGREED = ME._replace(agreed=True)
NOBODY: dict[str, bool] = {}
UNSTARTED = tuple(listed(number, started=False) for number in (1, 2, 3))


def test_a_new_cluster_begins_when_all_wait_and_know_it_and_not_before() -> None:
    decided = bootstrap.decide(ME, None, [], {"n2": False})
    assert isinstance(decided, Wait) and "waiting for n3 at http://h3:2380" in decided.why
    assert bootstrap.decide(ME, None, [], {"n2": True, "n3": False}) == Agree()
    assert bootstrap.decide(AGREED, None, [], {"n2": True, "n3": False}) == Wait("")
    assert bootstrap.decide(AGREED, None, [], {"n2": True, "n3": True}) == Run("new", MEMBERS)


def test_who_has_agreed_begins_the_same_cluster_however_little_the_others_can_tell() -> None:
    young = heard(*UNSTARTED, doubt="it has no leader")
    assert bootstrap.decide(AGREED, None, [young], {"n3": True}) == Run("new", MEMBERS)
    assert bootstrap.decide(AGREED, None, [heard(doubt="it has just begun")], NOBODY) == Run("new", MEMBERS)
    other = bootstrap.decide(AGREED, None, [heard(cluster=5, doubt="it has no leader")], NOBODY)
    assert isinstance(other, Wait), "not the cluster that was agreed on"


@pytest.mark.parametrize("members", [(), UNSTARTED, WELL, (listed(1), *WELL)])
def test_nothing_follows_without_data_from_a_list_that_is_not_proved(members: tuple[Listed, ...]) -> None:
    decided = bootstrap.decide(ME, None, [heard(*members, doubt="it has no leader")], NOBODY)
    assert isinstance(decided, Wait) and "whether n1 has ever run (it has no leader)" in decided.why


def test_one_proved_list_is_enough() -> None:
    young = heard(*UNSTARTED, doubt="it has just begun")
    sure = heard(listed(1), *WELL, url=MEMBERS["n3"])
    assert isinstance(bootstrap.decide(ME, None, [young, sure], NOBODY), Rejoin)
    assert isinstance(bootstrap.decide(AGREED, None, [young, sure], NOBODY), Rejoin), "it has run after all"


def test_a_proved_list_says_who_never_ran() -> None:
    others = [heard(listed(1, started=False), *WELL)]
    assert bootstrap.decide(ME, None, others, NOBODY) == Run("new", MEMBERS)


def test_data_is_not_given_up_because_of_a_list_that_is_not_proved() -> None:
    unsure = heard(listed(1, id=77), *WELL, doubt="it has no leader")
    assert bootstrap.decide(ME, Disk(CLUSTER, 1), [unsure], NOBODY) == Run("existing", MEMBERS)


def test_an_even_number_joins_and_does_not_begin() -> None:
    two = ME._replace(members={name: MEMBERS[name] for name in ("n1", "n2")})
    decided = bootstrap.decide(two, None, [], {"n2": True})
    assert isinstance(decided, bootstrap.Refuse) and "names 2, and no cluster answers" in decided.why
    entered = listed(1, started=False, id=77, learner=True)
    assert bootstrap.decide(two, None, [heard(entered, listed(2))], NOBODY) == Run("existing", two.members, True)


def test_data_goes_on_whether_others_answer_or_not() -> None:
    assert bootstrap.decide(ME, Disk(CLUSTER, 1), [], {"n2": False, "n3": False}) == Run("existing", MEMBERS)
    assert bootstrap.decide(ME, Disk(CLUSTER, 1), [heard(listed(1), *WELL)], NOBODY) == Run("existing", MEMBERS)


def test_a_lost_disk_is_rejoined_and_never_begun_as_new() -> None:
    decided = bootstrap.decide(ME, None, [heard(listed(1), *WELL)], NOBODY)
    assert isinstance(decided, Rejoin) and decided.id == 1 and "--rejoin" in decided.why


@pytest.mark.parametrize("learner", [True, False])
def test_a_newcomer_joins_what_exists(learner: bool) -> None:
    entered = listed(1, started=False, id=77, learner=learner)
    assert bootstrap.decide(ME, None, [heard(entered, *WELL)], NOBODY) == Run("existing", MEMBERS, learner)


def test_a_learner_that_restarts_is_still_one() -> None:
    mine = listed(1, id=77, learner=True)
    assert bootstrap.decide(ME, Disk(CLUSTER, 77), [heard(mine, *WELL)], NOBODY) == Run("existing", MEMBERS, True)


def test_others_keep_the_names_that_the_cluster_knows() -> None:
    renamed = listed(2, name="old-name")
    decided = bootstrap.decide(ME, None, [heard(listed(1, started=False, id=77), renamed, listed(3))], NOBODY)
    assert isinstance(decided, Run)
    assert decided.cluster == {"n1": MEMBERS["n1"], "old-name": MEMBERS["n2"], "n3": MEMBERS["n3"]}


@pytest.mark.parametrize(
    ("disk", "others", "why"),
    [
        (Disk(5, 1), [heard(listed(1), *WELL)], "data of cluster 5, but http://h2:2380 belongs to cluster 63"),
        (Disk(CLUSTER, 1), [heard(listed(1, id=77), *WELL)], "data of member 1, which was removed from the cluster"),
        (None, [heard(*WELL)], "has no member n1 at http://h1:2380: enter it first (covey etcd add n1 --peer-url"),
        (None, [heard(Listed(1, "n1", ("http://old:2380",), ("http://old:2379",)), *WELL)], "has n1 at http://old"),
        (None, [heard(listed(1, name="n7"), *WELL)], "has n7 at http://h1:2380, not n1"),
        (None, [heard(*WELL), heard(*WELL, cluster=5, url=MEMBERS["n3"])], "one of them has the data"),
    ],
)  # fmt: skip
def test_what_needs_the_operator_is_one_sentence(disk: Disk | None, others: list[Heard], why: str) -> None:
    decided = bootstrap.decide(ME, disk, others, NOBODY)
    assert isinstance(decided, bootstrap.Refuse) and why in decided.why, decided
