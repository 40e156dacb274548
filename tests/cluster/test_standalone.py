"""The all-in-one service, as real processes: whole clouds that are started, used, hurt and stopped."""

import json
import signal
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.cluster import conftest
from tests.support import etcd

eventually = conftest.eventually


@pytest.fixture(scope="module")
def cloud(tmp_path_factory: pytest.TempPathFactory) -> Iterator[conftest.Cloud]:
    """`covey up --nodes 5`, shared by tests that leave it as they found it."""
    folder = tmp_path_factory.mktemp("up")
    environ = {"COVEY_INSTANCE_TIME_OUT": "1s", "ANKA_LOG_DIR": str(folder / "data" / "logs")}
    with conftest.running_cloud(folder / "data", "up", "--nodes", 5, **environ) as one:
        eventually(lambda: len(_active(one)) == 5)
        yield one


def logged(cloud: conftest.Cloud, program: str) -> list[dict[str, Any]]:
    """The lines of one program's log file."""
    return [json.loads(line) for line in (cloud.data / "logs" / f"covey-{program}.log").read_text().splitlines()]


@pytest.fixture(scope="module")
def template(cloud: conftest.Cloud, tmp_path_factory: pytest.TempPathFactory) -> str:
    return cloud.push(tmp_path_factory.mktemp("disk"))


def _active(cloud: conftest.Cloud) -> list[str]:
    return [node["node_id"] for node in cloud.ask("GET", "/api/v1/node")["body"] if node["state"] == "Active"]


# ---- the main path -------------------------------------------------------------------------------------------------


def test_start_list_terminate(cloud: conftest.Cloud, template: str) -> None:
    id = cloud.start(template, tag="v1", external_id="job", name="one")
    eventually(lambda: cloud.state(id) == "Started")
    (shown,) = [one for one in cloud.ask("GET", "/api/v1/vm")["body"] if one["instance_id"] == id]
    assert (shown["external_id"], shown["name"], shown["vm"]["external_id"]) == ("job", "one", "job")
    assert shown["vm"]["vminfo"]["host_ip"]
    assert cloud.ask("DELETE", "/api/v1/vm", {"id": id}) == {"status": "OK", "message": ""}
    eventually(lambda: cloud.state(id) == "Not found")


def test_the_same_by_commands(cloud: conftest.Cloud, template: str) -> None:
    ran = cloud.covey("vm", "start", "small", "--tag", "v1", "--count", 10, "--wait", 60, "--json")
    assert ran.code == 0, ran
    ids = ran.json["instances"]
    assert [one["instance_state"] for one in ran.json["vms"]] == ["Started"] * 10
    listed = {one["instance_id"]: one for one in cloud.covey("vm", "list", "--json").json}
    assert set(ids) <= set(listed)
    assert {listed[id]["node_id"] for id in ids} <= set(_active(cloud))
    assert cloud.covey("vm", "show", ids[0]).code == 0
    assert "Started" in cloud.covey("status").out
    assert cloud.covey("vm", "terminate", *ids).code == 0
    eventually(lambda: cloud.ask("GET", "/api/v1/vm")["body"] == [])


def test_logs_are_read_from_the_node(cloud: conftest.Cloud, template: str, tmp_path: Path) -> None:
    """Safety S26: more than the cloud keeps, of a monitored script and of one that nobody monitors."""
    lines = "".join(f"echo {number:06} {'x' * 90}\n" for number in range(2000))
    (tmp_path / "script").write_text(f"{lines}echo trouble >&2\n")
    written = lines.replace("echo ", "")
    for monitor in (("--monitor",), ()):
        ran = cloud.covey("vm", "start", "small", "--script", tmp_path / "script", *monitor, "--wait", 60, "--json")
        assert ran.code == 0, ran
        (id,) = ran.json["instances"]
        followed = cloud.covey("vm", "logs", id, "--follow")
        assert (followed.code, followed.out) == (0, written)
        assert followed.err.startswith("trouble\n")
        assert cloud.covey("vm", "logs", id, "--all", "--stream", "stderr").out == ""
        assert cloud.covey("vm", "logs", id, "--all", "--json").json == {"stdout": written, "stderr": "trouble\n"}
        last = cloud.covey("vm", "logs", id, "--stream", "stdout")
        assert (last.code, last.out) == (0, written[-64 * 1024 :])
        assert cloud.covey("vm", "terminate", id).code == 0
    eventually(lambda: cloud.ask("GET", "/api/v1/vm")["body"] == [])


def test_log_files(cloud: conftest.Cloud) -> None:
    said = {program: logged(cloud, program) for program in ("controller", "registry", "agent")}
    assert sum(line["event"] == "joined" for line in said["agent"]) >= 5
    assert [line["level"] for line in said["controller"] if line["event"] == "the controller listens"][:1] == ["info"]
    assert said["registry"]


def test_drain_and_back(cloud: conftest.Cloud, template: str) -> None:
    node = _active(cloud)[0]
    assert cloud.covey("node", "drain", node).code == 0
    assert cloud.covey("node", "show", node, "--json").json["state"] == "Drain Mode"
    assert cloud.covey("node", "drain", node, "--off").code == 0
    eventually(lambda: node in _active(cloud))


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (("vm", "start", "nope"), "there is no template nope"),
        (("vm", "start", "small", "--tag", "v9"), "No such tag v9"),
        (("vm", "start", "small", "--count", 0), "count"),
        (("vm", "start", "small", "--count", 1_000_000), "count"),
        (("vm", "show", "nope"), "there is no instance nope"),
        (("vm", "terminate", "nope"), "nope"),
        (("node", "show", "nope"), "there is no node nope"),
        (("template", "show", "nope"), "there is no template nope"),
        (("template", "pull", "small", "/nowhere", "--tag", "v9"), "No such tag v9"),
        (("template", "push", "small", "--tag", "v2", "/no/such/file"), "/no/such/file"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(
    cloud: conftest.Cloud, template: str, argv: tuple[object, ...], said: str
) -> None:
    before = cloud.ask("GET", "/api/v1/vm")["body"], cloud.ask("GET", "/api/v1/registry/vm")["body"]
    ran = cloud.covey(*argv)
    assert (ran.code, ran.out) == (1, ""), ran
    assert said in ran.err
    assert ran.err.count("\n") == 1
    assert (cloud.ask("GET", "/api/v1/vm")["body"], cloud.ask("GET", "/api/v1/registry/vm")["body"]) == before


# ---- hurt ----------------------------------------------------------------------------------------------------------


def test_killed_parts_come_back_with_everything(tmp_path: Path) -> None:
    with conftest.running_cloud(tmp_path / "data", "up", "--nodes", 2, COVEY_INSTANCE_TIME_OUT="1s") as cloud:
        template = cloud.push(tmp_path)
        id = cloud.start(template)
        eventually(lambda: cloud.state(id) == "Started")
        before = cloud.ask("GET", f"/api/v1/vm?id={id}")["body"]
        for name in ("controller", "etcd", "registry", "nodes"):
            _kill_and_wait(cloud, name)
            second = eventually(lambda: _started_again(cloud, template))
            _wait_until_started(cloud, second)
            after = cloud.ask("GET", f"/api/v1/vm?id={id}")["body"]
            assert (after["instance_state"], after["vminfo"]["uuid"]) == ("Started", before["vminfo"]["uuid"]), name
        assert len(_active(cloud)) == 2


def _kill_and_wait(cloud: conftest.Cloud, name: str) -> None:
    pid = cloud.child(name)
    conftest.kill(pid)
    eventually(lambda: cloud.child(name) not in (0, pid))
    assert cloud.program.said(f"{name} was killed (SIGKILL); it is started again in")


def _wait_until_started(cloud: conftest.Cloud, id: str) -> None:
    eventually(lambda: cloud.state(id) == "Started")


def _started_again(cloud: conftest.Cloud, template: str) -> str:
    """A start; "" while a part that it needs is still coming back."""
    answer = cloud.ask("POST", "/api/v1/vm", {"vmid": template})
    return str(answer["body"][0]) if answer["status"] == "OK" else ""


def test_a_killed_supervisor_leaves_no_process(tmp_path: Path) -> None:
    cloud = conftest.start_cloud(tmp_path / "data", "up", "--nodes", 1)
    pids = list(conftest.children(cloud.program.pid))
    assert len(pids) == 4  # etcd, registry, controller, nodes
    assert cloud.end(signal.SIGKILL) == -signal.SIGKILL
    eventually(lambda: not any(conftest.alive(pid) for pid in pids))


def test_etcd_runs_as_the_rules_want(cloud: conftest.Cloud) -> None:
    """Pre-vote, compaction of old revisions only, an 8 GiB quota, fsync on (safety S28)."""
    command = conftest.children(cloud.program.pid)[cloud.child("etcd")].split()
    assert "--pre-vote=true" in command
    assert "--auto-compaction-mode=periodic" in command
    assert "--auto-compaction-retention=1800s" in command
    assert f"--quota-backend-bytes={8 * 1024**3}" in command
    assert not any("unsafe" in word for word in command)


# ---- start and stop ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_it_in_order(tmp_path: Path, number: int) -> None:
    cloud = conftest.start_cloud(tmp_path / "data")
    pids = list(conftest.children(cloud.program.pid))
    assert cloud.end(number) == 0
    assert not any(conftest.alive(pid) for pid in pids)
    ends = [line for line in cloud.program.err if "has stopped" in line]
    assert ["controller" in line for line in ends] == [True, False]  # then the registry; etcd logs to its own file


def test_a_restart_finds_ports_and_data_again(tmp_path: Path) -> None:
    with conftest.running_cloud(tmp_path / "data") as first:
        id = first.start(first.push(tmp_path))
    with conftest.running_cloud(tmp_path / "data") as second:
        assert (second.controller, second.registry, second.etcd) == (first.controller, first.registry, first.etcd)
        assert second.state(id) == "Scheduling"
        assert second.covey("template", "list", "--json").json[0]["name"] == "small"


def test_a_taken_port_is_one_clear_line(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        ran = conftest.covey("standalone", "--data-dir", tmp_path, "--listen-addr", f"127.0.0.1:{port}")
        assert (ran.code, ran.out) == (1, "")
        assert ran.err == (
            f"covey: 127.0.0.1:{port} is taken by another program: stop that, or choose another with --listen-addr\n"
        )
        for program in ("controller", "registry"):
            ran = conftest.covey(
                program,
                "--listen-addr",
                f"127.0.0.1:{port}",
                COVEY_ALLOW_EMPTY_REGISTRY="true",
                COVEY_DATA_DIR=str(tmp_path),
            )
            assert ran.code == 1
            assert str(port) in ran.err.splitlines()[-1]
            assert "Traceback" not in ran.err


def test_one_service_per_data_directory(tmp_path: Path) -> None:
    with conftest.running_cloud(tmp_path / "data"):
        ran = conftest.covey("standalone", "--data-dir", tmp_path / "data", "--listen-addr", "127.0.0.1:0")
        assert (ran.code, ran.out) == (1, "")
        assert "another `covey standalone` runs on" in ran.err


def test_without_etcd_the_remedy_is_named(tmp_path: Path) -> None:
    ran = conftest.covey("standalone", "--data-dir", tmp_path, COVEY_ETCD_BINARY="/no/such/etcd")
    assert (ran.code, ran.err) == (1, "covey: COVEY_ETCD_BINARY: /no/such/etcd is not a program that can be run\n")
    ran = conftest.covey("standalone", "--data-dir", tmp_path, COVEY_ETCD_BINARY="", PATH=str(tmp_path))
    assert ran.code == 1
    assert "etcd is not installed" in ran.err


@pytest.mark.parametrize(
    ("variable", "value"), [("ANKA_ENABLE_AUTH", "true"), ("COVEY_USE_HTTPS", "true"), ("COVEY_LISTEN_ADDR", ":0")]
)
def test_what_cannot_be_honoured_stops_the_start(tmp_path: Path, variable: str, value: str) -> None:
    ran = conftest.covey("standalone", "--data-dir", tmp_path, **{variable: value})
    assert (ran.code, ran.out) == (1, "")
    assert variable.partition("_")[2] in ran.err
    assert ran.err.count("\n") == 1


def test_a_controller_waits_for_etcd_and_says_so(tmp_path: Path) -> None:
    port, peer = etcd.free_port(), etcd.free_port()
    program = conftest.Program(
        "controller",
        "--listen-addr",
        "127.0.0.1:0",
        "--etcd-endpoints",
        f"127.0.0.1:{port}",
        "--allow-empty-registry",
        COVEY_LOG_JSON="true",
    )
    try:
        line = program.wait_until_said("etcd has not answered yet")
        assert f"127.0.0.1:{port}" in line
        base = f"http://127.0.0.1:{_port_of(program)}"
        status, answer = conftest.ask(base + "/readyz")
        assert (status, answer["status"]) == (503, "FAIL")
        assert "etcd" in answer["message"]
        assert conftest.ask(base + "/livez")[0] == 200
        with conftest.etcd_at(tmp_path, port, peer):
            eventually(lambda: conftest.ask(base + "/readyz")[0] == 200)
            assert len([line for line in program.err if "etcd has not answered yet" in line]) == 1
            assert program.end() == 0
    finally:
        if program.process.poll() is None:
            program.end(signal.SIGKILL)


def _port_of(program: conftest.Program) -> int:
    return int(json.loads(program.wait_until_said("the controller listens"))["port"])


# ---- nodes ---------------------------------------------------------------------------------------------------------


def test_join_use_leave(tmp_path: Path) -> None:
    node = tmp_path / "node"
    with conftest.running_cloud(tmp_path / "data", COVEY_INSTANCE_TIME_OUT="1s") as cloud:
        template = cloud.push(tmp_path)
        ran = conftest.covey("join", cloud.controller, "--hypervisor", "synthetic", "--data-dir", node)
        try:
            assert ran.code == 0, ran
            lines = ran.out.splitlines()
            assert lines[0] == f"Testing connection to the controller...: Ok ({cloud.controller})"
            assert lines[1] == f"Testing connection to the registry...: Ok ({cloud.registry})"
            (active,) = eventually(lambda: _active(cloud))
            assert active in lines[2]
            again = conftest.covey("join", cloud.controller, "--hypervisor", "synthetic", "--data-dir", node)
            assert again.code == 0, again  # its agent is started again, as the same node
            assert active in again.out
            id = cloud.start(template)
            eventually(lambda: cloud.state(id) == "Started")
            refused = conftest.covey("leave", "--data-dir", node)
            assert refused.code == 1, refused
            assert cloud.covey("vm", "terminate", id).code == 0
            eventually(lambda: cloud.state(id) == "Not found")
        finally:
            left = conftest.covey("leave", "--data-dir", node, "--force")
        assert left.code == 0, left
        assert "The agent has stopped" in left.out
        assert cloud.ask("GET", "/api/v1/node")["body"] == []
        assert conftest.covey("leave", "--data-dir", node).code == 1


def test_join_says_which_server_does_not_answer(tmp_path: Path) -> None:
    url = f"http://127.0.0.1:{etcd.free_port()}"
    ran = conftest.covey("join", url, "--hypervisor", "synthetic", "--data-dir", tmp_path)
    assert ran.code == 1
    assert ran.out.startswith("Testing connection to the controller...: Failed")
    assert "no controller can be reached" in ran.err
    assert list(tmp_path.iterdir()) == []
