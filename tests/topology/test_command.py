"""`make topology` says how to reach the cloud, the cloud survives what it suggests, and all of it ends."""

import os
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request

import pytest

from tests import conftest as leaks
from tests.support import lab_cloud, netlab


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/api/v1/node", timeout=10) as answer:  # noqa: S310 (our own server)
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False


@pytest.mark.parametrize("kind", ["haproxy", "nginx", "keepalived", "nodeside"])
def test_a_topology_comes_up_and_goes_away(kind: str) -> None:
    before = leaks.processes()
    command = [sys.executable, "-u", "-m", "scripts.topology", kind, "--nodes", "2"]
    running = subprocess.Popen(command, cwd=lab_cloud.ROOT, env=netlab.environment(), stdout=subprocess.PIPE, text=True)
    with running:
        assert running.stdout is not None
        said = ""
        for line in running.stdout:
            said += line
            if line.startswith("Ready."):
                break
        found = re.search(r"COVEY_CONTROLLER=(\S+) COVEY_REGISTRY=(\S+)", said)
        doomed = re.search(r"kill -9 (\d+) +# controller", said)
        assert found, said
        assert doomed, said
        urls = found[1].split(",")
        try:
            assert all(_answers(url) for url in urls)
            _kill(int(doomed[1]))
            assert any(_answers(url) for url in urls)
            assert "c1 has ended" in running.stdout.readline()
        finally:
            running.send_signal(signal.SIGINT)
            said = _rest(running)
        assert "Everything is taken down" in said
    assert running.returncode == 0
    assert leaks.processes_left(before) == set()


def _rest(running: "subprocess.Popen[str]") -> str:
    """What it says until it ends; it is killed when it does not."""
    try:
        return running.communicate(timeout=60)[0]
    except subprocess.TimeoutExpired:
        running.kill()
        return running.communicate()[0]


def _kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
    time.sleep(0.1)
