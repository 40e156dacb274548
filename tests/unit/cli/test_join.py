"""What `covey join` looks at first, and that a join which fails leaves everything as it was."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from covey.cli import background
from tests.support import nouns
from tests.unit.cli import conftest


@pytest.fixture
def dead() -> str:
    """A URL where nothing listens."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return f"http://127.0.0.1:{server.getsockname()[1]}"


def join(covey: conftest.Covey, data: Path, *urls: str) -> conftest.Ran:
    return covey("join", ",".join(urls), "--hypervisor", "synthetic", "--data-dir", data)


def test_no_controller_answers(covey: conftest.Covey, dead: str, tmp_path: Path) -> None:
    other = f"{dead}/other"
    ran = join(covey, tmp_path / "node", dead, other)
    assert ran.code == 1
    assert ran.out.splitlines() == [
        f"Testing connection to the controller...: Failed ({url}: cannot connect (Connection refused))"
        for url in (dead, other)
    ]
    assert "no controller can be reached from here" in ran.err
    assert list(tmp_path.iterdir()) == []


def test_each_controller_and_each_registry_is_tested(
    covey: conftest.Covey, cloud: conftest.Cloud, dead: str, tmp_path: Path
) -> None:
    """One dead controller does not stop the join; no registry does."""
    cloud.ok("GET", "/readyz", "ready")
    cloud.ok("GET", "/api/v1/status", {"status": "Running", "registry_address": dead})
    ran = join(covey, tmp_path / "node", dead, cloud.url)
    assert ran.out.splitlines() == [
        f"Testing connection to the controller...: Failed ({dead}: cannot connect (Connection refused))",
        f"Testing connection to the controller...: Ok ({cloud.url})",
        f"Testing connection to the registry...: Failed ({dead}: cannot connect (Connection refused))",
    ]
    assert "warning: 1 of 2 controllers cannot be reached now" in ran.err
    assert f"this host cannot reach the registry {dead}" in ran.err
    assert (ran.code, list(tmp_path.iterdir())) == (1, [])


def test_a_refused_join_leaves_nothing_and_says_why(
    covey: conftest.Covey, cloud: conftest.Cloud, tmp_path: Path
) -> None:
    """The agent's own process learns of it, and ends."""
    cloud.ok("GET", "/readyz", "ready")
    cloud.ok("GET", "/api/v1/status", {"status": "Running", "registry_address": ""})
    cloud.fail("POST", "/agent/v1/join", "the agent belongs to another cloud")
    ran = join(covey, tmp_path / "node", cloud.url)
    assert ran.code == 1
    assert "the cloud refuses this node: this node may not join: the agent belongs to another cloud" in ran.err
    assert list(tmp_path.iterdir()) == []


def test_a_failing_join_keeps_the_settings_before_it(
    covey: conftest.Covey, cloud: conftest.Cloud, tmp_path: Path
) -> None:
    background.save(tmp_path, {"COVEY_CONTROLLER": "http://before"})
    (background.folder(tmp_path) / "images").mkdir()
    cloud.ok("GET", "/readyz", "ready")
    cloud.ok("GET", "/api/v1/status", {"status": "Running", "registry_address": ""})
    cloud.fail("POST", "/agent/v1/join", "the agent belongs to another cloud")
    assert join(covey, tmp_path, cloud.url).code == 1
    assert sorted(os.listdir(background.folder(tmp_path))) == ["agent.env", "images"]
    assert background.saved(tmp_path) == {"COVEY_CONTROLLER": "http://before"}


def test_a_node_whose_operator_fails_to_join_another_cloud_stays_in_its_own(
    cloud: conftest.Cloud, tmp_path: Path
) -> None:
    """Its agent was stopped for that, and runs again with the settings before."""
    cloud.ok("GET", "/readyz", "ready")
    cloud.ok("GET", "/api/v1/status", {"status": "Running", "registry_address": ""})
    cloud.answers["POST", "/agent/v1/join"] = [
        (200, {"status": "OK", "message": "", "body": msgspec.to_builtins(nouns.joined())}),
        (200, {"status": "FAIL", "message": "the agent belongs to another cloud", "body": None}),
        (503, {"status": "FAIL", "message": "later", "body": None}),
    ]
    try:
        ran = join_as("one", cloud, tmp_path)
        assert ran.returncode == 0, ran
        first, settings = background.running_pid(tmp_path), background.saved(tmp_path)
        ran = join_as("two", cloud, tmp_path)
        assert (ran.returncode, "another cloud" in ran.stderr) == (1, True), ran
        assert background.running_pid(tmp_path) not in (0, first)
        assert background.saved(tmp_path) == settings
        assert not background.take_explicit(tmp_path)
    finally:
        background.stop(tmp_path)


def join_as(name: str, cloud: conftest.Cloud, data: Path) -> subprocess.CompletedProcess[str]:
    """In a process of its own: the agent outlives it."""
    words = ("join", cloud.url, "--hypervisor", "synthetic", "--data-dir", str(data), "--node-name", name)
    return subprocess.run(
        [sys.executable, "-m", "covey", *words], capture_output=True, text=True, timeout=60, check=False
    )


def test_an_agent_that_runs_by_itself_is_left_alone(
    covey: conftest.Covey, cloud: conftest.Cloud, tmp_path: Path
) -> None:
    with background.running_agent(tmp_path):
        ran = join(covey, tmp_path, cloud.url)
    assert ran.code == 1
    assert f"an agent runs here already (process {os.getpid()})" in ran.err


# ---- commands with several controllers -----------------------------------------------------------------------------


def test_a_command_goes_to_a_controller_that_answers(
    covey: conftest.Covey, cloud: conftest.Cloud, dead: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    cloud.ok("GET", "/api/v1/vm", [])
    monkeypatch.setenv("COVEY_CONTROLLER", f"{dead},{cloud.url}")
    for _ in range(4):  # each prefers another one
        assert covey("vm", "list").code == 0


def test_a_command_names_every_controller_that_it_tried(
    covey: conftest.Covey, dead: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = f"{dead}/b"
    monkeypatch.setenv("COVEY_CONTROLLER", f"{dead},{other}")
    ran = covey("vm", "list")
    assert (ran.code, ran.err.count("\n")) == (1, 1)
    assert f"{dead}: cannot connect (Connection refused)" in ran.err
    assert f"{other}: cannot connect (Connection refused)" in ran.err
