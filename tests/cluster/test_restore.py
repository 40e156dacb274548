"""etcd is restored from a backup by plain etcdctl, with the same names, while a cloud runs (safety S18, S19).

In the backup one instance waits that runs by the time of the restore, one runs that has ended by then, and one is not
there yet. Whatever the store has forgotten: each guest starts once, none is ended by mistake, and a terminate that was
accepted stays one.
"""

import collections
from pathlib import Path

import pytest

from tests.cluster import conftest, fleet

eventually = conftest.eventually
SOON_S = 120.0


def starts(cloud: fleet.Fleet) -> collections.Counter[str]:
    """How often each instance's guest ever started, on all nodes."""
    return collections.Counter(id for node in cloud.nodes.values() for id in node.starts())


def wait_until_found_out(cloud: fleet.Fleet) -> None:
    """The controllers know that the store was restored, and serve again."""
    eventually(lambda: cloud.events("restored", "store"))
    cloud.wait_until_ready()


def start_unlaunched(cloud: fleet.Fleet, backup: Path) -> str:
    """An instance that is accepted, and of which no node knows when the backup is made."""
    for node in cloud.nodes.values():
        node.freeze()
    (id,) = cloud.start()
    cloud.etcd.save(backup)
    return id


def fill_all_but(cloud: fleet.Fleet, node: fleet.Node) -> None:
    """What is started next is placed on this one, which has least to do."""
    others = [id for other in cloud.nodes.values() if other is not node for id in cloud.start(2, node_id=other.id)]
    cloud.wait_until_all(others, "Started")


@pytest.mark.timeout(480)
@pytest.mark.parametrize("restarted", [False, True], ids=["controllers stay", "controllers restart"])
def test_nothing_is_doubled_lost_or_killed_by_a_restore(tmp_path: Path, restarted: bool) -> None:
    with fleet.running(tmp_path, controllers=2) as cloud:
        nodes = [cloud.node("alpha"), cloud.node("beta")]
        kept, ended = cloud.start(2)
        cloud.wait_until_all([kept, ended], "Started")
        late = start_unlaunched(cloud, tmp_path / "backup")
        for node in nodes:
            node.thaw()
        cloud.wait_until(late, "Started")
        (newest,) = cloud.start()
        cloud.wait_until(newest, "Started")
        cloud.terminate(ended)
        cloud.wait_until(ended, "Terminated", "")
        assert starts(cloud) == {kept: 1, ended: 1, late: 1, newest: 1}

        if restarted:
            for controller in cloud.controllers:
                controller.kill()
        cloud.etcd.restore(tmp_path / "backup")
        if restarted:
            for controller in cloud.controllers:
                controller.start()
        wait_until_found_out(cloud)

        (after,) = cloud.start()  # accepted at once; it runs as soon as a node has told what it has
        cloud.wait_until_all([kept, late, newest, after], "Started", SOON_S)
        eventually(lambda: cloud.state(ended) in ("Terminated", ""), SOON_S)
        eventually(lambda: cloud.keys("settled"), SOON_S)
        assert starts(cloud) == {kept: 1, ended: 1, late: 1, newest: 1, after: 1}
        assert {id for node in nodes for id in node.vms()} == {kept, late, newest, after}
        assert cloud.events("adopted", newest)[0]["why"] == "the store was restored, and its node has this VM"
        assert all(cloud.events("node-adopted", node.id) for node in nodes)
        assert cloud.events("restored", "store")
        cloud.clear()


@pytest.mark.timeout(480)
@pytest.mark.parametrize("born_on", ["alpha", "beta"])
def test_a_node_that_was_cut_off_until_the_store_had_overtaken_it(tmp_path: Path, born_on: str) -> None:
    """In the backup the instance is placed on the node that is cut off, or on the other one, whose answer from before
    the restore says that it shall begin, and which asks for the launch before anybody has noticed."""
    with fleet.running(tmp_path, controllers=2) as cloud:
        alpha, beta = cloud.node("alpha"), cloud.node("beta")
        fill_all_but(cloud, cloud.nodes[born_on])
        late = start_unlaunched(cloud, tmp_path / "backup")
        restored_to = cloud.revision()
        beta.thaw()
        cloud.wait_until(late, "Started")
        assert late in beta.starts()
        beta.freeze()
        seen = cloud.revision()
        assert restored_to < seen
        cloud.etcd.restore(tmp_path / "backup")
        alpha.thaw()
        wait_until_found_out(cloud)

        others = []
        while cloud.revision() <= seen + 20:  # what is asked for after the restore runs on who has told what it has
            others += cloud.start()
            cloud.wait_until(others[-1], "Started", timeout_s=SOON_S)
            cloud.terminate(others[-1])
        name = cloud.shown(beta)["node_name"]
        why = f"until node {name} has reported what runs there: the store was restored; `covey node release {name}`"
        eventually(lambda: why in cloud.instance(late)["message"])
        assert late not in alpha.starts()

        beta.thaw()
        cloud.wait_until(late, "Started", timeout_s=SOON_S)
        assert cloud.instance(late)["node_id"] == beta.id
        assert starts(cloud)[late] == 1
        assert late in beta.vms()
        assert cloud.events("node-adopted", beta.id)


@pytest.mark.timeout(480)
def test_an_operator_gives_up_a_node_that_was_lost_with_the_store(tmp_path: Path) -> None:
    with fleet.running(tmp_path, controllers=1) as cloud:
        alpha, beta = cloud.node("alpha"), cloud.node("beta")
        late = start_unlaunched(cloud, tmp_path / "backup")
        beta.thaw()
        cloud.wait_until(late, "Started")
        beta.kill()  # and its host with it
        cloud.etcd.restore(tmp_path / "backup")
        alpha.thaw()
        wait_until_found_out(cloud)
        eventually(lambda: cloud.events("node-adopted", alpha.id), SOON_S)
        name = cloud.shown(beta)["node_name"]
        eventually(lambda: f"`covey node release {name}`" in cloud.instance(late)["message"])
        assert alpha.starts() == []
        ran = conftest.covey("node", "release", name, COVEY_CONTROLLER=cloud.urls[0])
        assert ran.code == 0, ran
        cloud.wait_until(late, "Started", timeout_s=SOON_S)
        assert alpha.starts() == [late]
        (event,) = cloud.events("released", beta.id)
        assert "API client" in event["who"]
