"""One command on every host, at every start: members begin rightly, whatever lies on their disks (safety S28)."""

import contextlib
import time
from pathlib import Path

import pytest

from tests.operate import early, hosts
from tests.support import certificates

eventually = hosts.eventually
pytestmark = pytest.mark.timeout(480)


def test_members_that_start_one_after_the_other_begin_one_cluster_and_go_on_after_a_restart() -> None:
    with hosts.some(3) as cluster:
        first, second, third = cluster.hosts
        cluster.start(first)
        first.running.wait_until_said("waiting for n2 at")
        cluster.start(second)
        second.running.wait_until_said("waiting for n3 at")
        time.sleep(1)  # nobody begins anything alone
        assert not first.data.exists()
        cluster.start(third)
        cluster.wait_until_well()
        said = third.running.wait_until_said("n3:")
        assert "begins the new cluster of n1, n2, n3" in said, said
        rows = cluster.rows(at=first)  # told of one member, it finds the others
        assert {row["address"] for row in rows.values()} == {host.endpoint for host in cluster.hosts}
        assert {row["quota_bytes"] for row in rows.values()} == {8 << 30}
        cluster.put("/x", "1")

        for host in cluster.hosts:
            host.end()
        cluster.start(first)
        first.running.wait_until_said("goes on with")
        cluster.start(second, third)
        cluster.wait_until_well()
        assert cluster.get("/x", third) == "1"


def test_a_member_that_lost_its_disk_says_the_command_and_joins_anew_when_told() -> None:
    with hosts.some(3) as cluster:
        cluster.start()
        cluster.wait_until_well()
        cluster.put("/x", "1")
        lost = cluster.hosts[1]
        before = cluster.rows()["n2"]["id"]
        lost.kill()
        lost.wipe()
        cluster.start(lost)
        line = lost.refusal()
        assert "counts on data of n2" in line and "--rejoin" in line

        cluster.start(lost, more=("--rejoin",))
        lost.running.wait_until_said("n2 has caught up and votes now")
        cluster.wait_until_well()
        assert cluster.rows()["n2"]["id"] != before
        assert cluster.get("/x", lost) == "1"
        assert lost.running.end() == 0  # etcd's parent passes the signal on
        lost.program = None
        cluster.start(lost)
        cluster.wait_until_well()


def test_a_member_that_lost_its_disk_begins_no_second_cluster_while_the_others_are_down() -> None:
    with hosts.some(3) as cluster:
        cluster.start()
        cluster.wait_until_well()
        cluster.put("/x", "1")
        for host in cluster.hosts:
            host.kill()
        lost, *others = cluster.hosts
        lost.wipe()
        cluster.start(lost)
        lost.running.wait_until_said("waiting for n2 at")
        cluster.start(*others)
        assert "counts on data of n1" in lost.refusal()
        cluster.wait_until_well_without(lost)
        assert cluster.get("/x", others[0]) == "1"


def test_what_a_member_tells_before_it_has_read_its_own_log_is_never_mistaken() -> None:
    """However long that takes: others list this one as they did before it ever ran, and cannot prove it."""
    with hosts.some(3) as cluster:
        cluster.start()
        cluster.wait_until_well()
        cluster.put("/x", "1")
        lost, *others = cluster.hosts
        young = [early.of(host.peer_port) for host in others]
        for host in cluster.hosts:
            host.kill()
        lost.wipe()
        with contextlib.ExitStack() as stack:
            for told in young:
                stack.enter_context(told.answering())
            cluster.start(lost)
            said = lost.running.wait_until_said("cannot tell yet whether n1 has ever run")
            assert "has just begun" in said, said
            enough = [told.asked + 15 for told in young]
            eventually(lambda: all(map(int.__gt__, (told.asked for told in young), enough)), hosts.PATIENCE_S)
            assert lost.running.process.poll() is None
            assert not lost.data.exists(), "it began a log of its own"
        cluster.start(*others)
        assert "counts on data of n1" in lost.refusal()


def test_one_that_is_killed_as_the_cluster_begins_has_its_part_in_it_all_the_same() -> None:
    with hosts.some(3) as cluster:
        victim = cluster.hosts[2]
        cluster.start()
        eventually(lambda: (victim.data / "member" / "covey-agreed").exists(), hosts.PATIENCE_S)
        victim.kill()
        cluster.start(victim)
        cluster.wait_until_well()
        cluster.put("/x", "1")
        assert cluster.get("/x", victim) == "1"
        victim.end()
        cluster.start(victim)
        victim.running.wait_until_said("goes on with")
        assert not (victim.data / "member" / "covey-agreed").exists(), "the data tells from now on"
        cluster.wait_until_well()


def test_data_of_another_cluster_is_told_and_left_alone() -> None:
    with hosts.some(3) as cluster, hosts.some(1) as old:
        stale = cluster.hosts[2]
        old.hosts[0].folder, old.hosts[0].name = stale.folder, "n3"
        old.start()
        old.wait_until_well()
        old.hosts[0].end()
        cluster.start(*cluster.hosts[:2])
        cluster.hosts[0].running.wait_until_said("waiting for")
        cluster.hosts[1].running.wait_until_said("waiting for")
        aside = stale.data.rename(stale.folder / "aside")
        cluster.start(stale)
        cluster.wait_until_well()
        stale.end()
        stale.data.rename(stale.folder / "right")
        aside.rename(stale.data)
        cluster.start(stale)
        line = stale.refusal()
        assert "holds data of cluster" in line and f"mv {stale.data} {stale.data}.old" in line


def test_what_does_not_fit_is_one_sentence() -> None:
    with hosts.some(3) as cluster:
        one, two, _ = cluster.hosts
        cluster.start(one)
        one.running.wait_until_said("waiting for")
        other = ",".join(f"{host.name}={host.peer_url}" for host in cluster.hosts[:2]) + ",n9=http://127.0.0.1:1"
        ran = cluster.covey(*two.argv(other)[1:])
        assert ran.code == 1
        assert "other --members or another --token" in ran.err and len(ran.err.splitlines()) == 1
        ran = cluster.covey(*two.argv(f"n2={two.peer_url},n3=http://127.0.0.1:1")[1:])
        assert ran.code == 1 and "names 2, and no cluster answers there" in ran.err
        ran = cluster.covey(*two.argv("n7=http://127.0.0.1:1")[1:])
        assert ran.code == 1 and "--name n2 is not among --members n7" in ran.err
        ran = cluster.covey(*two.argv(cluster.members)[1:], "--unsafe-no-fsync")
        assert ran.code == 1 and "--unsafe-no-fsync is set by this command itself" in ran.err


def test_a_member_alone_and_what_would_be_run() -> None:
    with hosts.some(1) as cluster:
        (host,) = cluster.hosts
        argv = host.argv(cluster.members)
        ran = cluster.covey("bootstrap", "--print", *argv[2:])
        assert ran.code == 0
        for flag in (
            *("--initial-cluster-state=new", "--pre-vote=true", "--auto-compaction-retention=1800s"),
            *("--auto-compaction-mode=periodic", f"--quota-backend-bytes={8 << 30}"),
        ):
            assert flag in ran.out.split(), ran.out
        assert "no-fsync" not in ran.out
        cluster.start()
        cluster.wait_until_well()


def test_five_members_that_show_certificates_to_each_other(tmp_path: Path) -> None:
    with hosts.some(5) as cluster:
        files, others = certificates.make(tmp_path / "tls"), certificates.make(tmp_path / "others")
        for host in cluster.hosts:
            host.peer_tls = files
        *most, last = cluster.hosts
        cluster.start(*most)
        most[0].running.wait_until_said("waiting for n5 at https://")
        last.peer_tls = others  # it believes another authority
        cluster.start(last)
        assert "is not believed" in last.refusal()
        last.peer_tls = files
        cluster.start(last)
        cluster.wait_until_well()
        rows = cluster.rows(at=last)
        assert len(rows) == 5 and {row["behind"] for row in rows.values()} <= set(range(100))
