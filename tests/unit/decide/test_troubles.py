"""Each trouble of the cloud is one sentence with its remedy, and what is well is none."""

from typing import Any

import pytest

from covey.decide import troubles

Kind = troubles.Kind
GIB = 1 << 30
MEMBER = {"answers": True, "knows_leader": True, "quota_bytes": 8 * GIB, "size_bytes": GIB}
REGISTRY = troubles.Registry(url="http://r1", answers=True, total_bytes=500 * GIB, free_bytes=100 * GIB)


def member(name: str, **changes: Any) -> troubles.Member:
    return troubles.Member(**{"name": name, "address": f"{name}:2379", **MEMBER, **changes})


def health(**changes: Any) -> troubles.Health:
    values = {"etcd": [member("m1", leads=True), member("m2"), member("m3")], "registries": [REGISTRY]}
    return troubles.Health(**{**values, **changes})


def only(**changes: Any) -> troubles.Trouble:
    """The one trouble of a cloud that is well but for these changes."""
    (found,) = troubles.judge(health(**changes))
    assert found.text
    assert found.remedy
    assert "\n" not in found.text + found.remedy
    return found


def node(name: str = "mac-1", **changes: Any) -> troubles.Node:
    return troubles.Node(id=f"id-{name}", name=name, **changes)


def test_a_cloud_that_is_well_has_none() -> None:
    assert troubles.judge(health(queue=troubles.Queue(waiting=3, instance="i", waits_s=5))) == []
    assert troubles.judge(health(etcd=[])) == [], "a store in memory has no members"
    assert troubles.judge(health(etcd=[member("m1", leads=True)])) == [], "one member is a choice"


DEAD = {"answers": False, "knows_leader": False}


@pytest.mark.parametrize(
    ("members", "says"),
    [
        ([member("m1"), member("m2", **DEAD), member("m3")], "2 of 3 are well: one more lost, and nothing is served"),
        ([member(f"m{n}", **(DEAD if n == 2 else {})) for n in range(1, 6)], "4 of 5 are well: 1 more may be lost"),
        ([member("m1"), member("m2", **DEAD), member("m4", learner=True)], "there is no majority"),
    ],
)
def test_a_dead_member_and_what_may_still_happen(members: list[troubles.Member], says: str) -> None:
    found = only(etcd=members)
    assert (found.kind, found.about) == (Kind.ETCD_MEMBER, "m2")
    assert found.text.startswith("etcd member m2 (m2:2379) does not answer")
    assert says in found.text
    assert "covey etcd replace m2" in found.remedy


@pytest.mark.parametrize(
    ("change", "kind", "says", "remedy"),
    [
        ({"knows_leader": False}, Kind.ETCD_MEMBER, "knows of no leader", "majority"),
        ({"raft_behind": 5000}, Kind.ETCD_LAG, "5,000 entries behind", "catches up"),
        ({"size_bytes": 7 * GIB}, Kind.ETCD_SPACE, "fills 88% of its quota", "covey etcd defrag"),
        ({"troubles": ["etcdserver: corrupt cluster"]}, Kind.ETCD_MEMBER, "corrupt cluster", "log"),
    ],
)
def test_a_member_that_answers_and_is_not_well(change: dict[str, Any], kind: Kind, says: str, remedy: str) -> None:
    found = only(etcd=[member("m1", leads=True), member("m2", **change), member("m3")])
    assert (found.kind, found.about) == (kind, "m2")
    assert says in found.text
    assert remedy in found.remedy


def test_a_quota_that_is_not_known_is_not_judged() -> None:
    assert troubles.judge(health(etcd=[member("m1", quota_bytes=0, size_bytes=99 * GIB)])) == []


@pytest.mark.parametrize(
    ("name", "remedy"), [("NOSPACE", "disarm"), ("CORRUPT", "covey etcd replace"), ("OTHER", "disarm")]
)
def test_alarms(name: str, remedy: str) -> None:
    found = only(alarms=[name, name])
    assert found.kind == Kind.ETCD_ALARM
    assert remedy in found.remedy


def test_a_red_controller_says_so_first_and_its_lag_is_not_told_beside() -> None:
    found = only(why="the store does not answer", copy=troubles.Copy(lag_s=9))
    assert found.kind == Kind.CONTROLLER_RED
    assert "the store does not answer" in found.text
    assert "knew last" in found.text


def test_unsure_writes_and_lag_only_when_they_last() -> None:
    assert troubles.judge(health(unsure=troubles.Unsure(open=4, oldest_s=0.5), copy=troubles.Copy(lag_s=0.4))) == []
    assert "4 writes is open, for 7 s" in only(unsure=troubles.Unsure(open=4, oldest_s=7)).text
    assert "1.5 s behind" in only(copy=troubles.Copy(lag_s=1.5)).text
    assert "1 key of the store" in only(copy=troubles.Copy(broken=1, example="/covey/node/x")).text


def test_registries() -> None:
    assert "knows of no registry" in only(registries=[]).text
    dead = only(registries=[REGISTRY, troubles.Registry(url="http://r2", trouble="cannot connect")])
    assert (dead.kind, dead.about) == (Kind.REGISTRY, "http://r2")
    assert "http://r2 does not answer (cannot connect)" in dead.text
    full = only(registries=[troubles.Registry(url="http://r1", answers=True, total_bytes=GIB, trouble="disk is full")])
    assert full.kind == Kind.REGISTRY_SPACE
    assert "disk is full (0 B of 1 GiB free)" in full.text
    little = troubles.Registry(url="http://r1", answers=True, total_bytes=500 * GIB, free_bytes=10 * GIB)
    assert "little room is left" in only(registries=[little]).text
    large = troubles.Registry(url="http://r1", answers=True, total_bytes=10_000 * GIB, free_bytes=100 * GIB)
    assert troubles.judge(health(registries=[large])) == [], "100 GiB are room, whatever share of a large disk"


def test_one_node_is_told_in_full_and_many_are_counted() -> None:
    one = only(ailing=[node(offline=True, silent_s=300, vms=2, trouble="old word")])
    assert one.text == "node mac-1 is offline for 5 min; 2 VMs there are shown as not communicating"
    many = only(ailing=[node(f"mac-{n}", offline=True) for n in range(7)])
    assert many.text == "7 nodes (mac-0, mac-1, mac-2, mac-3, mac-4, …) are offline"
    held = only(ailing=[node(held=True, trouble="held")])
    assert (held.kind, "covey node release mac-1" in held.remedy) == (Kind.NODE_HELD, True)
    sick = only(ailing=[node(trouble="no /dev/kvm")])
    assert sick.text == "node mac-1 takes nothing new: no /dev/kvm"
    cramped = only(ailing=[node(disk_bytes=500 * GIB, free_disk_bytes=GIB)])
    assert cramped.text == "node mac-1 is short of disk space, 1 GiB free"


def test_an_instance_that_waits_too_long_and_why() -> None:
    found = only(queue=troubles.Queue(waiting=3, instance="i-1", waits_s=50, why="Waiting: no node is there"))
    assert found.text == "instance i-1 has waited for 50 s, and 2 others too: no node is there"
    assert "covey vm explain i-1" in found.remedy


def test_backups() -> None:
    assert "no room" in only(backup=troubles.Backup(trouble="no room")).text
    late = only(backup=troubles.Backup(at="x", age_s=5 * 3600, interval_s=3600))
    assert late.text == "the last backup is 5 h old, although one is due every 60 min"
    assert troubles.judge(health(backup=troubles.Backup(at="x", age_s=7000, interval_s=3600))) == []


def test_controllers_of_several_versions() -> None:
    two = [troubles.Controller(id="a", version="0.1.0"), troubles.Controller(id="b", version="0.2.0")]
    assert "0.1.0 and 0.2.0" in only(controllers=two).text
    assert troubles.judge(health(controllers=two[1:])) == []


def test_a_certificate_is_told_three_weeks_before_it_expires() -> None:
    late = only(certificates=[troubles.Certificate(name="etcd at m1:2379", expires="2026-01-01", left_s=5 * 86400)])
    assert (late.kind, late.text) == (Kind.CERTIFICATE, "the certificate of etcd at m1:2379 expires in 5 days")
    gone = only(certificates=[troubles.Certificate(name="SERVER_CERT /x", expires="2026-01-01", left_s=-5)])
    assert gone.text == "the certificate of SERVER_CERT /x has expired (2026-01-01)"
    assert troubles.judge(health(certificates=[troubles.Certificate(name="x", left_s=30 * 86400)])) == []
