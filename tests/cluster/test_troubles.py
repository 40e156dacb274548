"""Ten troubles that users of comparable build clouds reported, each kept as a test of its name.

Real processes throughout: three etcd members, three controllers, agents that are given all three. Each docstring says
what users saw, and which rule of docs/safety.md keeps it from happening here. Times that users wait for minutes are
shortened by settings; the long outage is also counted in virtual time in tests/sim/test_long_outage.py.
"""

import base64
import concurrent.futures
import contextlib
import json
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import conftest as leaks
from tests.cluster import conftest, fleet

eventually = conftest.eventually
OUTAGE_S = 40.0  # longer than a node's lease (30 s) with its margin (5 s)
OUTPUT_LIMIT = 64 << 10


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[fleet.Fleet]:
    before = leaks.processes()
    with fleet.running(tmp_path_factory.mktemp("fleet")) as one:
        yield one
    assert leaks.processes_left(before) == set()


@pytest.fixture(autouse=True)
def no_leaks() -> None:
    """Tests kill the shared programs and start them again, so leaks are looked for when all of them have ended."""


@pytest.fixture
def cloud(shared: fleet.Fleet) -> Iterator[fleet.Fleet]:
    """The shared fleet without nodes and without instances, before and after each test."""
    yield shared
    shared.heal()
    shared.terminate(*shared.states())
    shared.remove(*list(shared.nodes))
    eventually(lambda: not shared.states())


def running(*nodes: fleet.Node) -> list[str]:
    """The instances whose VMs run, once for each VM."""
    return [id for node in nodes for id, phase in node.vms().items() if phase == "running"]


# ---- 1 -------------------------------------------------------------------------------------------------------------


def test_a_second_start_of_one_instance_leaves_an_orphan(cloud: fleet.Fleet) -> None:
    """Users saw: a host hung while it was told to start a VM, the instance was started on another host, and when the
    first one came back its VM was there too: nobody listed it, and it kept its slot for ever.

    Prevented by S1 (launch is one commit: only one of two placements gets past it), S10 and S11 (a placement that is
    withdrawn keeps its claim, and its node an order, until that node says `gone`)."""
    slow = cloud.node("slow", COVEY_SYNTHETIC_PULL="20s")
    (id,) = cloud.start()
    eventually(lambda: cloud.instance(id).get("node_id") == slow.id)
    slow.freeze()
    quick = cloud.node("quick")
    cloud.wait_until(id, "Started", via=1)
    assert cloud.instance(id, via=2)["node_id"] == quick.id
    slow.thaw()
    eventually(lambda: cloud.shown(slow)["vm_count"] == 0)
    assert (running(slow, quick), slow.vms(), slow.starts()) == ([id], {}, [])
    assert cloud.state(id) == "Started"
    cloud.clear()
    assert quick.starts() == [id]


# ---- 2 -------------------------------------------------------------------------------------------------------------


def test_an_instance_goes_to_started_after_its_termination(cloud: fleet.Fleet) -> None:
    """Users saw: a job was cancelled while its VM booted; the instance was Terminating, then Started, and stayed.

    Prevented by promise I5: the row Terminating of the life-cycle knows no `booted`, and every word is applied by a
    commit that compares the instance (S3). Here the word was sent before the terminate and arrives after it."""
    node = cloud.node("alpha", COVEY_SYNTHETIC_BOOT="1s")
    (id,) = cloud.start()
    eventually(lambda: running(node) == [id])
    node.freeze()  # the guest boots meanwhile: the agent will find it booted
    cloud.terminate(id, via=1)
    said = _late_booted(cloud, node, id)
    assert said["settled"] == [0]  # taken note of, so that it is not sent again
    assert [cloud.state(id, via) for via in range(3)] == ["Terminating"] * 3
    node.thaw()
    states = set[str]()
    while states.isdisjoint({""}):
        states |= {cloud.state(id, via) for via in range(3)}
    assert states <= {"Terminating", "Terminated", ""}
    assert node.vms() == {}


def _late_booted(cloud: fleet.Fleet, node: fleet.Node, id: str) -> Any:
    """Say in the agent's name what the network has kept for a while."""
    vm = {"uuid": id, "name": "late", "status": "running", "host_ip": "127.0.0.1"}
    return _report(cloud, node, {"instance": id, "epoch": 1, "seq": 1 << 40, "event": "booted", "vm": vm})


def _report(cloud: fleet.Fleet, node: fleet.Node, *items: dict[str, Any], via: int = 2) -> Any:
    """POST /agent/v1/report with the session of a node's agent (docs/agent-protocol.md)."""
    me = node.identity()
    headers = {"Authorization": f"Covey {me['node']}.{me['counter']}.{me['secret']}"}
    body = {"seen": me["seen"], "messages": 1 << 40, "items": items}
    answer = cloud.ask("POST", "/agent/v1/report", body, via, headers)
    assert answer["status"] == "OK", answer
    return answer["body"]


# ---- 3 -------------------------------------------------------------------------------------------------------------


def test_instances_vanish_from_and_reappear_in_lists_between_replicas(cloud: fleet.Fleet) -> None:
    """Users saw: behind a balancer an instance was in one list, not in the next, and in the one after; clients took it
    for terminated and started another one.

    Prevented by promise I6 through S21: each list waits until its copy has reached a revision that was read from the
    store after the request came, whichever replica answers and however late its watch is."""
    cloud.node("alpha")
    stored: set[str] = set()
    for turn in range(60):
        if turn == 20:
            cloud.etcd.leader().stop()  # replicas whose watch hangs on it are late now
        if turn == 40:
            cloud.heal()
        (id,) = _patiently(lambda turn=turn: cloud.start(via=turn % 3))
        stored.add(id)
        for via in ((turn + 1) % 3, (turn + 2) % 3):
            listed = _patiently(lambda via=via: cloud.states(via))
            assert stored <= set(listed), f"turn {turn}: replica {via} does not list {stored - set(listed)}"
    cloud.terminate(*stored)
    gone = set[str]()
    while gone != stored:
        for via in range(3):
            listed = cloud.states(via)
            assert gone.isdisjoint(listed), f"replica {via} lists what was forgotten"
            gone = stored - set(listed)


def _patiently(ask: Any) -> Any:
    """Repeat what was refused without effect: 503 while a leader is elected."""
    return eventually(lambda: _or_none(ask))


def _or_none(ask: Any) -> Any:
    try:
        return ask()
    except AssertionError as error:
        if "FAIL" in str(error) and "lists" not in str(error):
            return None
        raise


# ---- 4 -------------------------------------------------------------------------------------------------------------


@pytest.mark.timeout(500)
def test_vms_are_lost_at_random_when_agents_balance_over_controllers_with_three_members(cloud: fleet.Fleet) -> None:
    """Users saw: agents that were given several controllers, each with an etcd member of its own, killed running VMs at
    random, beside errors like "required revision is a future revision": the next controller was a little behind, did
    not know of the VM yet, and what was not in its answer was cleaned up.

    Prevented by S22 (an agent names the newest view it saw, and is answered from one at least as new, or not at all)
    and S2 (what is missing from an answer is never an order)."""
    nodes = [cloud.node(name) for name in ("alpha", "beta")]
    kept = cloud.start(4)
    cloud.wait_until_all(kept, "Started")
    chance = random.Random(20)
    for turn in range(6):
        member, controller = chance.choice(cloud.etcd.members), cloud.controllers[turn % 3]
        member.stop()  # controllers whose watch hangs on it fall behind
        more = _patiently(lambda turn=turn: cloud.start(2, via=(turn + 1) % 3))
        _patiently(lambda more=more, turn=turn: _all_started(cloud, more, (turn + 2) % 3))
        kept += more
        controller.kill()  # its agents ask the next one, which may know of none of these
        for _ in fleet.until(1.5):
            assert set(kept) == set(running(*nodes))
        member.cont()
        controller.start()
        eventually(controller.ready)
    assert set(cloud.states().values()) == {"Started"}
    assert sorted(nodes[0].starts() + nodes[1].starts()) == sorted(kept)


def _all_started(cloud: fleet.Fleet, ids: list[str], via: int) -> bool:
    return [id for id in ids if cloud.states(via).get(id) == "Started"] == ids


# ---- 5 -------------------------------------------------------------------------------------------------------------


def test_reserved_tasks_are_not_released(cloud: fleet.Fleet) -> None:
    """Users saw: a controller or an agent died between reserving a slot for a start and starting it; the slot stayed
    reserved, and after some weeks a fleet of idle hosts took nothing.

    Prevented by S11 and promise I3: a slot is held by a claim in the node's ledger and by nothing in any process; a
    claim that no instance wants becomes an order, and goes with the node's `gone`."""
    nodes = [cloud.node(name, COVEY_SYNTHETIC_PULL="500ms", COVEY_MAX_VMS="4") for name in ("alpha", "beta")]
    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        asked = [pool.submit(_start_or_not, cloud, number % 3) for number in range(18)]
        eventually(lambda: sum(one.done() for one in asked) > 3)
        cloud.controllers[0].kill()
        nodes[0].kill()
        cloud.terminate(*cloud.states(1), via=1)
        concurrent.futures.wait(asked)
    nodes[0].start()
    cloud.controllers[0].start()
    cloud.wait_until_ready()
    eventually(lambda: not _end_all(cloud))
    eventually(lambda: [cloud.shown(node)["vm_count"] for node in nodes] == [0, 0])
    assert [node.vms() for node in nodes] == [{}, {}]
    whole = cloud.start(8)  # every slot of the fleet
    cloud.wait_until_all(whole, "Started")


def _start_or_not(cloud: fleet.Fleet, via: int) -> None:
    with contextlib.suppress(OSError, AssertionError):
        cloud.start(via=via)


def _end_all(cloud: fleet.Fleet) -> dict[str, str]:
    left = cloud.states(1)
    cloud.terminate(*left, via=1)
    return left


# ---- 6 -------------------------------------------------------------------------------------------------------------


def test_terminate_while_pulling_orphans_the_vm(cloud: fleet.Fleet) -> None:
    """Users saw: a job was cancelled while its template was pulled; the instance went, the pull went on, and at its
    end the VM was made and started, for nobody.

    Prevented by S6: the order is a tombstone on the node's disk before anything else; it cuts the pull short, and the
    start path looks for it just before the fork. `Terminated` is not shown before the node said `gone` (S11)."""
    node = cloud.node("alpha", COVEY_SYNTHETIC_PULL="5s", COVEY_SYNTHETIC_BOOT="500ms")
    ids = cloud.start(4)
    eventually(lambda: {cloud.state(id) for id in ids} == {"Pulling"})
    for number, id in enumerate(ids):
        cloud.terminate(id, via=number % 3)
        time.sleep(1.7)  # so that the last of them are about to start, or have just started
    for id in ids:
        cloud.wait_until(id, "Terminated", "")
        assert id not in node.vms()
    kept = cloud.start()[0]  # whatever the cut-short pulls would still do is done before this one has started
    cloud.wait_until(kept, "Started")
    assert set(node.vms()) == {kept}
    assert ids[0] not in node.starts()
    assert cloud.shown(node)["vm_count"] == 1


# ---- 7 -------------------------------------------------------------------------------------------------------------


def test_a_large_script_output_breaks_the_store(cloud: fleet.Fleet) -> None:
    """Users saw: a start script printed megabytes; the report did not fit into a value of etcd, was refused and sent
    again for ever, and the instance never left its state. With many of them the store ran full.

    Prevented by S26: of each stream the last 64 KiB are stored, in a key of its own, cut by the agent and again by
    the controller, whatever a node sends. (Twenty megabytes out of a real guest: tests/vm/test_agent_qemu.py.)"""
    node = cloud.node("alpha")
    lines = "".join(f"echo {number:05} {'x' * 94}\n" for number in range(2000))
    script = base64.b64encode(lines.encode()).decode()
    ids = cloud.start(5, startup_script=script, script_monitoring=True)
    cloud.wait_until_all(ids, "Started")
    big = base64.b64encode(b"y" * (11 << 20) + b"the end").decode()  # more than etcd takes, from an agent that cuts not
    said = _report(cloud, node, {"instance": ids[0], "epoch": 1, "seq": 1 << 40, "event": "failed", "stdout": big})
    assert said["settled"] == [0]
    assert [cloud.state(id, via=1) for id in ids] == ["Error"] + 4 * ["Started"]
    for id in ids:
        kept = cloud.etcd.ctl("get", f"/covey/output/{id}/stdout", "--print-value-only")
        assert 0 < len(kept) <= OUTPUT_LIMIT + 1  # and etcdctl's line end
        assert cloud.instance(id, via=1)["startup_script"]["stdout"].endswith(("x\n", "the end"))
    listed = cloud.ask("GET", "/api/v1/vm", via=2)["body"]
    assert {one["vm"]["startup_script"]["stdout"] for one in listed} == {""}  # lists stay small
    node.kill()
    node.start()  # a new session: nothing that it says counts as older than what was said in its name
    cloud.clear()
    assert cloud.shown(node)["state"] == "Active"


# ---- 8 -------------------------------------------------------------------------------------------------------------


def test_a_node_that_left_leaves_its_queue_behind(cloud: fleet.Fleet) -> None:
    """Users saw: a host was taken out of the cloud; what was queued for it waited for ever, and its queue was found in
    the store years later.

    Prevented by S12 and promise I1: what waits for a node that was removed goes to Error and says so; a node's keys go
    with it, but for the mark that tells its agent, and orders for what may still run there, which end by themselves."""
    node = cloud.node("alpha", COVEY_MAX_VMS="1")
    (runs,) = cloud.start()
    cloud.wait_until(runs, "Started")
    (waits,) = cloud.start(node_id=node.id)
    assert cloud.state(waits, via=1) == "Scheduling"
    id = node.id
    assert cloud.ask("DELETE", "/api/v1/node", {"node_id": id})["status"] == "OK"
    for instance in (waits, runs):
        cloud.wait_until(instance, "Error", via=2)
        assert "was removed" in cloud.instance(instance)["message"]
    assert cloud.ask("GET", "/api/v1/node", via=1)["body"] == []
    left = [key for key in cloud.keys("") if id in key]
    assert sorted(left) == [f"/covey/order/{id}/{runs}", f"/covey/removed/{id}"]
    leases = [_lease(cloud, key) for key in left if "/order/" in key]
    assert all(leases), "an order without a lease would stay for ever"
    cloud.terminate(waits, runs)
    eventually(lambda: not cloud.states())


def _lease(cloud: fleet.Fleet, key: str) -> int:
    found = json.loads(cloud.etcd.ctl("get", key, "-w", "json"))
    return int(found["kvs"][0].get("lease", 0))


# ---- 9 -------------------------------------------------------------------------------------------------------------


def test_a_rebooted_node_loses_its_groups_or_capacity(cloud: fleet.Fleet) -> None:
    """Users saw: after a reboot a host was back without its groups, or with the capacity it had out of the box; jobs
    of its group waited, and it took more VMs than it could run.

    Prevented by S7 and the key tree: a reboot is a new session of the same node, shown by the secret on its disk; what
    the operator configured is a key of its own that no join writes."""
    node = cloud.node("alpha")
    cloud.put(f"node/{node.id}", {**cloud.value(f"node/{node.id}"), "groups": ["ios", "fast"]})
    wanted = {"node_id": node.id, "max_vm_count": 3, "name": "mac-17", "ram_override": 7}
    assert cloud.ask("POST", "/api/v1/node/config", wanted)["status"] == "OK"
    ids = cloud.start(3)
    cloud.wait_until_all(ids, "Started")
    before, me = _configured(cloud, node), node.identity()
    assert (before["groups"], before["capacity"], before["node_name"]) == (["ios", "fast"], 3, "mac-17")
    node.reboot()
    node.start()
    eventually(lambda: node.identity()["counter"] > me["counter"])
    cloud.wait_until_active(node)
    assert node.identity()["node"] == me["node"]
    assert [_configured(cloud, node, via) for via in range(3)] == [before] * 3
    cloud.wait_until_all(ids, "Error")  # their guests ended with the host; none is booted again by itself (S4)
    cloud.clear()
    again = cloud.start(4)  # one more than its capacity
    eventually(lambda: sorted(cloud.state(id) for id in again) == ["Scheduling", "Started", "Started", "Started"])
    assert sorted(node.starts()[:3]) == sorted(ids)


def _configured(cloud: fleet.Fleet, node: fleet.Node, via: int = 0) -> dict[str, Any]:
    shown = cloud.shown(node, via)
    return {
        "groups": [group["name"] for group in shown["groups"]],
        **{name: shown[name] for name in ("capacity", "capacity_mode", "node_name", "ram_override", "vcpu_override")},
    }


# ---- 10 ------------------------------------------------------------------------------------------------------------


@pytest.mark.timeout(500)
def test_an_outage_of_the_controllers_fails_healthy_vms_on_their_return(cloud: fleet.Fleet, tmp_path: Path) -> None:
    """Users saw: the controllers were down for ten minutes; the first thing they did on their return was to compare
    stored times with the clock, find every host silent for ten minutes, and fail every healthy VM.

    Prevented by S9: no stored time is compared with a clock; a time-out counts what one controller itself has seen,
    ready all the while, and begins anew with its start. And by S1: a launched instance is never placed again, however
    long its node was silent. Here one cloud loses all controllers and another one all etcd members, for longer than a
    node's lease; ten minutes are lived through in virtual time by tests/sim/test_long_outage.py."""
    with fleet.running(tmp_path) as other:
        losses: list[tuple[fleet.Fleet, list[Any]]] = [
            (cloud, list(cloud.controllers)),
            (other, list(other.etcd.members)),
        ]
        before = [_some_vms(one) for one, _ in losses]
        for _, lost in losses:
            for part in lost:
                part.kill()
        for _ in fleet.until(OUTAGE_S):
            assert [_running(one) for one, _ in losses] == [sorted(vms) for vms in before]
        for _, lost in losses:
            for part in lost:
                part.start()
        for one, _ in losses:
            one.wait_until_ready()
        back = time.monotonic()
        for one, _ in losses:
            for node in one.nodes.values():
                one.wait_until_active(node)
        assert time.monotonic() - back < 60, "nodes are not back within seconds"
        for _ in fleet.until(5):
            assert [set(one.states().values()) for one, _ in losses] == [{"Started"}] * 2
            assert [_running(one) for one, _ in losses] == [sorted(vms) for vms in before]
        for (one, _), vms in zip(losses, before, strict=True):
            assert {id: one.instance(id, via=1)["vminfo"] for id in vms} == vms
            assert sorted(id for node in one.nodes.values() for id in node.starts()) == sorted(vms)


def _some_vms(cloud: fleet.Fleet) -> dict[str, Any]:
    """Two nodes with six VMs: instance → vminfo."""
    for name in ("alpha", "beta"):
        cloud.node(name)
    ids = cloud.start(6)
    cloud.wait_until_all(ids, "Started")
    return {id: cloud.instance(id)["vminfo"] for id in ids}


def _running(cloud: fleet.Fleet) -> list[str]:
    return sorted(running(*cloud.nodes.values()))
