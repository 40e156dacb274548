"""Members are replaced and removed by one command each."""

import threading

import pytest

from tests.operate import hosts
from tests.support import ran

pytestmark = pytest.mark.timeout(480)


def waiting(cluster: hosts.Cluster, *words: object) -> tuple[threading.Thread, list[ran.Ran]]:
    """`covey etcd replace` or `add`, which wait for the newcomer, in the background."""
    done: list[ran.Ran] = []
    thread = threading.Thread(target=lambda: done.append(cluster.covey(*words)))
    thread.start()
    return thread, done


def replacing(cluster: hosts.Cluster, *words: object) -> tuple[threading.Thread, list[ran.Ran]]:
    return waiting(cluster, "replace", *words)


def add(cluster: hosts.Cluster, newcomer: hosts.Host) -> str:
    """Grow by one; what the command says."""
    thread, done = waiting(cluster, "add", newcomer.name, "--peer-url", newcomer.peer_url)
    hosts.eventually(lambda: any(row["role"] == "not started" for row in cluster.rows().values()), hosts.PATIENCE_S)
    cluster.hosts.append(newcomer)
    cluster.start(newcomer)
    thread.join(hosts.PATIENCE_S)
    assert done and done[0].code == 0, done
    cluster.wait_until_well()
    return done[0].out


def test_one_member_grows_to_three_and_goes_back_to_one() -> None:
    with hosts.some(1) as cluster:
        (first,) = cluster.hosts
        cluster.start()
        cluster.wait_until_well()
        cluster.put("/x", "1")
        second, third = cluster.host("n2"), cluster.host("n3")

        everyone = ",".join(f"{host.name}={host.peer_url}" for host in (first, second, third))
        ran = cluster.covey(*second.argv(everyone)[1:])
        assert ran.code == 1 and f"enter it first (covey etcd add n2 --peer-url {second.peer_url}" in ran.err, ran

        ran = cluster.covey("add", "n2", "--peer-url", second.peer_url, "--wait", "1s")  # broken off
        assert ran.code == 1 and "the new member has no vote after 1 s: it has not started" in ran.err, ran
        cluster.put("/x", "2")  # one without a vote stops nobody
        ran = cluster.covey("add", "n3", "--peer-url", third.peer_url)
        assert ran.code == 1 and "members are added one at a time" in ran.err, ran
        said = add(cluster, second)
        assert f"--name n2 --members n1={first.peer_url},n2={second.peer_url}" in said, said
        assert "2 survive no more losses than 1" in said, said
        said = add(cluster, third)
        assert "3 members vote now" in said, said
        ran = cluster.covey("add", "n3", "--peer-url", third.peer_url)  # repeated
        assert ran.code == 0 and "3 members vote now" in ran.out, ran
        for host in (first, third):
            assert cluster.get("/x", host) == "2"

        first.kill()  # three survive the loss of one, the first one too
        cluster.wait_until_well_without(first)
        cluster.ctl("put", "/x", "3", at=third)
        ran = cluster.covey("add", "n4", "--peer-url", "http://127.0.0.1:1", at=second)
        assert ran.code == 1 and "n1 is not well: one more member would" in ran.err, ran
        cluster.start(first)  # with the list of three
        cluster.wait_until_well()

        for host in (first, second):
            ran = cluster.covey("remove", host.name, at=third)
            assert ran.code == 0, ran
            cluster.hosts.remove(host)
            assert host.running.process.wait(hosts.PATIENCE_S) == 0, "etcd ends by itself where it is no member"
            host.end()
            cluster.wait_until_well()
        cluster.put("/x", "4")
        assert cluster.get("/x", third) == "4"


def test_a_machine_that_is_lost_is_replaced_at_a_new_address_and_clients_learn_it() -> None:
    with hosts.some(3) as cluster:
        cluster.start()
        cluster.wait_until_well()
        cluster.put("/x", "1")
        lost = cluster.hosts[1]
        lost.kill()
        newcomer = cluster.host("n2")
        thread, done = replacing(cluster, "n2", "--peer-url", newcomer.peer_url)
        cluster.hosts[1] = newcomer
        hosts.eventually(lambda: any(row["role"] == "not started" for row in cluster.rows().values()), hosts.PATIENCE_S)
        cluster.start(newcomer)
        thread.join(hosts.PATIENCE_S)
        assert done and done[0].code == 0, done
        assert f"Run there: covey etcd bootstrap --name n2 --members n1={cluster.hosts[0].peer_url}" in done[0].out
        cluster.wait_until_well()
        assert cluster.get("/x", newcomer) == "1"
        assert cluster.rows(at=cluster.hosts[0])["n2"]["address"] == newcomer.endpoint
        # The data of the lost one is of no use any more, and says so.
        stale = hosts.Host("n2", lost.folder, lost.client_port, lost.peer_port)
        argv = stale.argv(cluster.members.replace(newcomer.peer_url, lost.peer_url))
        ran = cluster.covey(*argv[1:])
        assert ran.code == 1 and "which was removed from the cluster" in ran.err, ran


def test_a_machine_that_works_stays_until_the_new_one_votes() -> None:
    with hosts.some(3) as cluster:
        cluster.start()
        cluster.wait_until_well()
        old = next(host for host in cluster.hosts if cluster.rows()[host.name]["role"] == "leader")
        newcomer = cluster.host("n9")
        thread, done = replacing(cluster, old.name, "--peer-url", newcomer.peer_url, "--name", "n9")
        hosts.eventually(lambda: any(row["role"] == "not started" for row in cluster.rows().values()), hosts.PATIENCE_S)
        cluster.hosts[cluster.hosts.index(old)] = newcomer
        cluster.start(newcomer)
        thread.join(hosts.PATIENCE_S)
        assert done and done[0].code == 0, done
        cluster.wait_until_well()
        old.kill()


def test_a_member_is_not_removed_where_the_others_could_not_go_on() -> None:
    with hosts.some(3) as cluster:
        cluster.start()
        cluster.wait_until_well()
        cluster.hosts[2].kill()
        ran = cluster.covey("remove", "n1")
        assert ran.code == 1 and "n1 stays: of the 2 others only 1 are well" in ran.err, ran
        ran = cluster.covey("defrag", "n1")
        assert ran.code == 1 and "too few members are well" in ran.err, ran
        ran = cluster.covey("remove", "n7")
        assert ran.code == 1 and "etcd has no member 'n7'; its members are n1, n2, n3" in ran.err
        ran = cluster.covey("replace", "n7", "--peer-url", "http://127.0.0.1:1")
        assert ran.code == 1 and "no member 'n7'" in ran.err, ran
        ran = cluster.covey("status")
        assert ran.code == 1 and f"! etcd member n3 at {cluster.hosts[2].endpoint} does not answer" in ran.out
        ran = cluster.covey("remove", "n3")
        assert ran.code == 0, ran
        assert sorted(cluster.rows()) == ["n1", "n2"]
