"""The restore drill: the store is put back from a backup that is many instances old, while everything runs on.

    start some · back up · start many more, some end · end every member, lose its disk · restore · count what is there

Users ask all the while. What must come out of it is asserted here; what it took is told.
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from tests.cluster import clients
from tests.operate import cloud as clouds
from tests.operate import hosts

eventually = hosts.eventually
BATCH = 20  # instances in one request
PATIENCE_S = 180.0


class Terms(NamedTuple):
    """So many instances are in the backup and so many are started after it, spread over `minutes`; so many of the
    former have ended since."""

    kept: int
    since: int
    ended: int
    minutes: float = 0.0


class Found(NamedTuple):
    """Seconds are counted from the end of the first etcd member. `behind_s`: the backup's age at that moment."""

    ran: int
    unknown: int
    behind_s: float
    down_s: float
    served_s: float
    accounted_s: float
    settled_s: float
    lost_starts: int

    def told(self) -> str:
        return (
            f"backup {self.behind_s:.0f} s old, {self.ran} VMs ran, {self.unknown} of them unknown to it; etcd was"
            f" down for {self.down_s:.1f} s, requests were answered after {self.served_s:.1f} s, every VM was accounted"
            f" for after {self.accounted_s:.1f} s, all was settled after {self.settled_s:.1f} s;"
            f" {self.lost_starts} starts that no node had heard of were lost"
        )


def run(cloud: clouds.Cloud, folder: Path, terms: Terms) -> Found:
    """Asserts that no VM was destroyed or begun twice, and that each is an instance again."""
    kept = _start(cloud, terms.kept)
    cloud.wait_until_started(kept, PATIENCE_S)
    with clients.asking(cloud.urls, cloud.template, start_each=20) as load:
        ran = cloud.store.covey("backup", folder / "backup.db")
        assert ran.code == 0, ran
        backed_up_at = time.monotonic()
        since = _start(cloud, terms.since, spread_s=terms.minutes * 60)
        cloud.wait_until_started(since, PATIENCE_S)
        ended = kept[: terms.ended]
        cloud.terminate(*ended)
        eventually(lambda: not set(ended) & set(cloud.vms()), PATIENCE_S)
        standing = {*kept[terms.ended :], *since}
        assert standing <= set(cloud.vms())
        assert load.failures == []

        lost_at = time.monotonic()
        for host in cloud.store.hosts:
            host.end()
        ran_then = set(cloud.vms())
        unknown = len(ran_then - set(kept))
        accepted = set(load.started)
        restore(cloud.store, folder / "backup.db")
        down_s = time.monotonic() - lost_at
        served_s = _seconds(lost_at, lambda: bool(cloud.states()))
        accounted_s = _seconds(lost_at, lambda: _accounted(cloud, standing))
        settled_s = _seconds(lost_at, lambda: bool(cloud.keys("settled")))
        hosts.eventually(lambda: len(load.started) > len(accepted) + 5)  # new ones start again
    lost = _prove(cloud, load, accepted, standing, set(ended))
    behind_s = lost_at - backed_up_at
    return Found(len(ran_then), unknown, behind_s, down_s, served_s, accounted_s, settled_s, lost)


def _start(cloud: clouds.Cloud, count: int, spread_s: float = 0.0) -> list[str]:
    """So many instances, evenly over a time."""
    begun, ids = time.monotonic(), list[str]()
    while len(ids) < count:
        ids += cloud.start(min(BATCH, count - len(ids)))
        time.sleep(max(0.0, begun + spread_s * len(ids) / count - time.monotonic()))
    return ids


def restore(store: hosts.Cluster, backup: Path) -> None:
    """On every host, all stopped, with the token that the first one printed."""
    token: tuple[str, ...] = ()
    for host in store.hosts:
        host.wipe()
        words = ("--name", host.name, "--members", store.members, "--data-dir", host.data, *token)
        ran = store.covey("restore", backup, *words)
        assert ran.code == 0, ran
        if not token:
            token = ("--token", ran.out.split("--token ")[1].split()[0])
    store.start()
    store.wait_until_well()


def _prove(cloud: clouds.Cloud, load: clients.Load, accepted: set[str], standing: set[str], ended: set[str]) -> int:
    """How many starts the restore has lost: those that were accepted after the backup, and no node had heard of."""
    later = set(load.started) - accepted
    states = cloud.states()
    lost = {id for id in accepted if id not in states}
    cloud.wait_until_started([*(later & states.keys()), *(accepted - lost)], PATIENCE_S)
    assert cloud.events("restored", "store")
    states, vms, starts = cloud.states(), set(cloud.vms()), cloud.journal("start")
    assert {id for id in ended if states.get(id) not in (None, "Terminated")} == set()
    assert standing <= vms, "a VM was destroyed"
    assert {id for id in vms if states.get(id) != "Started"} == set(), "a VM that no instance accounts for"
    assert {id: starts[id] for id in lost if id in vms or starts[id]} == {}, "lost although a node had it"
    assert {id: starts[id] for id in vms if starts[id] != 1} == {}
    assert not {id for id, times in cloud.journal("destroy").items() if times and id not in ended}
    return len(lost)


def _accounted(cloud: clouds.Cloud, standing: set[str]) -> bool:
    states = cloud.states()
    return all(states.get(id) == "Started" for id in standing)


def _seconds(since: float, question: Callable[[], bool]) -> float:
    eventually(question, PATIENCE_S)
    return time.monotonic() - since
