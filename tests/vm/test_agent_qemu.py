"""The whole way on a real guest: controller, registry, the agent as a program, QEMU. Scripts, and kill -9 at each step.

Instances are pinned to the test's own node: the nodes of earlier tests may still seem alive.
"""

import base64
import json
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from covey import world
from covey.agent import qemu
from tests.cluster import conftest as cluster
from tests.support import guest

BOOT_S = 200.0


class Node:
    """A node of the test's own; its agent can be killed and started again."""

    def __init__(self, cloud: cluster.Cloud, host: guest.Host) -> None:
        self._cloud = cloud
        self.host = host
        self._folder = host.root / "agent"
        self._agent: cluster.Program | None = None

    def start(self, failpoints: str = "") -> None:
        command = ("agent", "--hypervisor", "qemu", "--data-dir", self.host.root, "--node-ip", "127.0.0.1")
        self._agent = cluster.Program(
            *command, "--controller", self._cloud.controller, COVEY_FAILPOINTS=failpoints, COVEY_LOG_JSON="true"
        )
        self._agent.wait_until_said('"joined"')

    def wait_until_killed(self) -> None:
        assert self._agent is not None
        assert self._agent.process.wait(BOOT_S) == -signal.SIGKILL
        self._agent.end()

    def end(self) -> int:
        agent, self._agent = self._agent, None
        return 0 if agent is None else agent.end()

    @property
    def id(self) -> str:
        return str(json.loads((self._folder / "node.json").read_text())["node"])

    def run(self, template: str, script: str = "", **more: object) -> str:
        """Start an instance here; its id."""
        monitored = {"script_monitoring": True, "script_timeout": 60} if script else {}
        text = {"startup_script": base64.b64encode(script.encode()).decode()} if script else {}
        return self._cloud.start(template, node_id=self.id, **{**monitored, **text, **more})

    def ended_up(self, id: str, *states: str) -> dict[str, Any]:
        """The instance once it is in one of `states`."""
        try:
            cluster.eventually(lambda: self._cloud.state(id) in states, BOOT_S)
        except pytest.fail.Exception as error:
            said = "\n".join([] if self._agent is None else self._agent.err[-20:])
            pytest.fail(f"{error}\n{self._cloud.ask('GET', f'/api/v1/vm?id={id}')}\n{said}")
        body: dict[str, Any] = self._cloud.ask("GET", f"/api/v1/vm?id={id}")["body"]
        return body

    def terminate(self, id: str) -> None:
        """End it, and see that nothing is left: no process, no directory, no record."""
        assert self._cloud.ask("DELETE", "/api/v1/vm", {"id": id})["status"] == "OK"
        self.ended_up(id, "Terminated")
        assert self.host.processes() == []
        assert [path.name for path in (self._folder / "vms").iterdir() if path.name.startswith(id)] == []
        cluster.eventually(lambda: not list((self._folder / "records").iterdir()), 90)


@pytest.fixture(scope="module")
def cloud(tmp_path_factory: pytest.TempPathFactory) -> Iterator[cluster.Cloud]:
    with cluster.running_cloud(tmp_path_factory.mktemp("cloud")) as running:
        yield running


@pytest.fixture(scope="module")
def template(cloud: cluster.Cloud) -> str:
    """The demo template, pushed; its id."""
    folder = guest.template()
    boot = ("--kernel", folder / "vmlinuz", "--initrd", folder / "initrd", "--config", folder / "config.json")
    pushed = cloud.covey("template", "push", "demo", "--tag", "v1", folder / "base.qcow2", *boot, "--json")
    assert pushed.code == 0, pushed
    return str(pushed.json["template"])


@pytest.fixture
def node(cloud: cluster.Cloud) -> Iterator[Node]:
    with guest.host() as host:
        made = Node(cloud, host)
        try:
            yield made
        finally:
            made.end()
            driver = qemu.Qemu(qemu.Config(root=host.root / "agent" / "vms"), world.System())
            driver.lower_fence()
            driver.close()


# ---- start scripts (safety S26) ------------------------------------------------------------------------------------


def test_a_script_that_fails_makes_an_error_with_its_return_code(node: Node, template: str) -> None:
    node.start()
    id = node.run(template, "echo to stdout\necho to stderr >&2\nexit 3")
    body = node.ended_up(id, "Error", "Started")
    assert body["instance_state"] == "Error"
    told = body["startup_script"]
    assert (told["return_code"], told["stdout"], told["stderr"]) == (3, "to stdout\n", "to stderr\n")
    assert told.get("did_timeout", False) is False
    node.terminate(id)


def test_a_script_that_hangs_is_ended_with_minus_one(node: Node, template: str) -> None:
    node.start()
    id = node.run(template, "echo begun\nsleep 1000 & wait", script_timeout=2, script_fail_handler=1)
    body = node.ended_up(id, "Error", "Started")
    assert body["instance_state"] == "Error"
    assert body["startup_script"]["return_code"] == -1
    assert body["startup_script"]["did_timeout"] is True
    assert len(node.host.processes()) == 1, "fail handler 1 keeps the VM"
    node.terminate(id)


def test_a_background_child_that_holds_stdout_holds_nothing_up_and_20_mb_are_cut(
    node: Node, cloud: cluster.Cloud, template: str
) -> None:
    node.start()
    text = "sleep 1000 &\nyes abcdefg | head -c 20000000\necho the last line"
    id = node.run(template, text, script_timeout=250)
    body = node.ended_up(id, "Started", "Error")
    assert body["instance_state"] == "Started", body
    assert body["vminfo"]["uuid"] and body["vminfo"]["host_ip"] == "127.0.0.1"
    told = body["startup_script"]
    assert told["return_code"] == 0
    assert len(told["stdout"]) <= 64 * 1024 and told["stdout"].endswith("the last line\n")
    whole = cloud.covey("vm", "logs", id, "--all", "--stream", "stdout")
    assert whole.code == 0, whole.err
    kept, written = 16 << 20, 20_000_000 + len("the last line\n")
    assert len(whole.out) == kept
    assert whole.out.endswith("abcdefg\nthe last line\n")
    assert set(whole.out.splitlines()[1:-1]) == {"abcdefg"}
    assert f"{written - kept} bytes of stdout are left out" in whole.err
    node.end()
    without = cloud.covey("vm", "logs", id, "--all", "--stream", "stdout")
    assert (without.code, without.out) == (0, told["stdout"])
    assert "the last 64 KiB are shown" in without.err
    node.start()
    again = cloud.covey("vm", "logs", id, "--all", "--stream", "stdout")
    assert again.out == whole.out, "the next agent on this host reads the same files"
    node.terminate(id)


def test_fail_handler_2_deletes_the_vm_and_frees_its_slot(node: Node, cloud: cluster.Cloud, template: str) -> None:
    node.start()
    id = node.run(template, "exit 1", script_fail_handler=2)
    node.ended_up(id, "Error")
    cluster.eventually(lambda: node.host.processes() == [], 90)

    def free() -> bool:
        (found,) = [one for one in cloud.ask("GET", "/api/v1/node")["body"] if one["node_id"] == node.id]
        return bool(found["vm_count"] == 0)

    cluster.eventually(free, 90)
    node.terminate(id)


# ---- the agent dies ------------------------------------------------------------------------------------------------

_BEFORE_LAUNCH = ("agent.image.layer", "agent.image.whole", "agent.pulled", "agent.prepared")
_NOT_USED = ("agent.granted", "agent.launched", "qemu.forking")
_FORKED = ("qemu.forked", "agent.started", "qemu.job", "agent.answered", "agent.booted")


@pytest.mark.parametrize("step", [*_BEFORE_LAUNCH, *_NOT_USED, *_FORKED])
def test_kill_9_of_the_agent_at_each_step_of_a_start(node: Node, template: str, step: str) -> None:
    """Safety S4, S5: exactly one VM, adopted or failed, never two."""
    node.start(f"{step}=kill")
    id = node.run(template, "touch /started-once && echo once")
    node.wait_until_killed()
    assert len(node.host.processes()) == (step in _FORKED)
    before = node.host.processes()
    node.start()
    body = node.ended_up(id, "Started", "Error")
    if step in _NOT_USED:
        assert body["instance_state"] == "Error" and node.host.processes() == []
    else:
        assert body["instance_state"] == "Started", body
        assert len(node.host.processes()) == 1
    if step in _FORKED:
        assert node.host.processes() == before, "adopted: the same process"
    node.terminate(id)


def test_a_vm_does_not_notice_that_its_agent_was_killed_or_ended(node: Node, template: str) -> None:
    node.start()
    id = node.run(template)
    node.ended_up(id, "Started")
    before = node.host.processes()
    assert node.end() == 0, "SIGTERM: exit 0"
    node.start("agent.destroying=kill")
    assert node.ended_up(id, "Started", "Error")["instance_state"] == "Started"
    assert node.host.processes() == before
    assert node._cloud.ask("DELETE", "/api/v1/vm", {"id": id})["status"] == "OK"
    node.wait_until_killed()
    node.start()
    node.terminate(id)


def test_a_node_without_qemu_says_so_and_does_not_join(cloud: cluster.Cloud, tmp_path: Path) -> None:
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("setpriv", "sh"):
        (tools / name).symlink_to(shutil.which(name) or "")
    command = ("agent", "--hypervisor", "qemu", "--data-dir", tmp_path / "node", "--controller", cloud.controller)
    ran = cluster.covey(*command, PATH=str(tools))
    assert ran.code == 1
    assert "qemu" in ran.err.lower() and "install" in ran.err.lower(), ran.err
