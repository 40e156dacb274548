"""The lab does to packets and programs what it says, and leaves nothing behind."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import netlab

ROOT = Path(__file__).resolve().parents[2]
SWITCHES = pytest.mark.parametrize("tap", [False, True], ids=["bridge", "tap"])


class Post:
    """A datagram socket on every host: who hears whom. Sockets belong to the network they were made in."""

    def __init__(self, lab: netlab.Lab, stack: contextlib.ExitStack) -> None:
        self._lab = lab
        self._mark = 0
        self._sockets = {
            name: stack.enter_context(host.call(lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM)))
            for name, host in lab.hosts.items()
        }
        for name, each in self._sockets.items():
            each.bind((lab[name].ip, 7))
            each.settimeout(0)

    def sent(self, source: str, target: str, count: int = 1, wait_s: float = 0.3) -> int:
        """How many of `count` packets arrive. A late one of an earlier call is known by its mark, and not counted."""
        self._mark += 1
        mark = str(self._mark).encode()
        for _ in range(count):
            with contextlib.suppress(OSError):  # the cable is out
                self._sockets[source].sendto(mark, (self._lab[target].ip, 7))
        arrived, deadline = 0, time.monotonic() + wait_s
        while arrived < count and time.monotonic() < deadline:
            try:
                arrived += self._sockets[target].recv(20) == mark
            except BlockingIOError:
                time.sleep(0.002)
        return arrived

    def hears(self, source: str, target: str) -> bool:
        """Whether it gets through at all: a first packet may wait for an address."""
        deadline = time.monotonic() + 5
        while time.monotonic() < deadline:
            if self.sent(source, target):
                return True
        return False


@contextlib.contextmanager
def running(tap: bool) -> Iterator[tuple[netlab.Lab, Post]]:
    with netlab.Lab(["a", "b", "c"], tap=tap) as lab, contextlib.ExitStack() as stack:
        post = Post(lab, stack)
        for source in lab.hosts:
            for target in lab.hosts.keys() - {source}:
                assert post.hears(source, target)
        yield lab, post


@SWITCHES
def test_a_cut_is_between_two(tap: bool) -> None:
    with running(tap) as (lab, post):
        lab.cut("a", "b")
        assert (post.sent("a", "b"), post.sent("b", "a")) == (0, 0)
        assert post.sent("a", "c") == post.sent("c", "b") == 1
        lab.heal()
        assert post.hears("a", "b")
        assert post.hears("b", "a")


@SWITCHES
def test_a_one_way_cut_lets_the_answers_through(tap: bool) -> None:
    with running(tap) as (lab, post):
        lab.cut("a", "b", one_way=True)
        assert (post.sent("a", "b"), post.sent("b", "a")) == (0, 1)


@SWITCHES
def test_an_isolated_side_still_reaches_itself(tap: bool) -> None:
    with running(tap) as (lab, post):
        lab.isolate("a", "b")
        assert (post.sent("a", "b"), post.sent("a", "c"), post.sent("c", "b")) == (1, 0, 0)
        lab.heal()
        lab.isolate("a")
        assert (post.sent("a", "b"), post.sent("b", "c")) == (0, 1)


@SWITCHES
def test_loss_is_a_share(tap: bool) -> None:
    with running(tap) as (lab, post):
        lab.loss("a", "b", 50)
        assert 20 < post.sent("a", "b", count=100, wait_s=0.5) < 80
        lab.heal()
        assert post.sent("a", "b", count=100, wait_s=2) == 100


@SWITCHES
def test_a_pulled_cable_is_silent_until_healed(tap: bool) -> None:
    with running(tap) as (lab, post):
        lab.unplug("a")
        assert (post.sent("a", "b"), post.sent("b", "a"), post.sent("b", "c")) == (0, 0, 1)
        lab.heal()
        assert post.hears("a", "b")


def test_delay_and_repeats() -> None:
    with running(tap=True) as (lab, post):
        lab.slow("a", "b", delay_s=0.2)
        begun = time.monotonic()
        assert post.sent("a", "b", wait_s=5) == 1
        assert time.monotonic() - begun > 0.19
        lab.heal()
        lab.slow("a", "b", repeated=1.0)
        post.sent("a", "b")
        assert post.sent("a", "c") == 1
        assert post.sent("a", "b", count=2, wait_s=2) == 2  # of three that are on their way


def test_a_rate_is_kept() -> None:
    with running(tap=True) as (lab, post):
        lab.slow("a", "b", rate_bytes_s=1000)
        begun = time.monotonic()
        assert post.sent("a", "b", count=10, wait_s=5) == 10  # 43 bytes each on the wire
        assert time.monotonic() - begun > 0.3


def test_the_bridge_admits_that_it_knows_no_delay() -> None:
    with netlab.Lab(["a", "b"]) as lab, pytest.raises(netlab.LabError, match="tap"):
        lab.slow("a", "b", delay_s=1)


def test_signals_reach_the_program_itself(tmp_path: Path) -> None:
    log = tmp_path / "log"
    count = "import time\nwhile True: print('tick', flush=True); time.sleep(0.01)"
    with netlab.Lab(["a"]) as lab:
        process = lab["a"].spawn([sys.executable, "-u", "-c", count], log=log)

        def ticks(wait_s: float) -> int:
            before = log.stat().st_size
            deadline = time.monotonic() + wait_s
            while log.stat().st_size == before and time.monotonic() < deadline:
                time.sleep(0.01)
            return log.stat().st_size - before

        assert ticks(10)
        for _ in range(2):  # frozen and woken more than once
            process.stop()
            ticks(0.1)
            assert not ticks(0.2)
            process.cont()
            assert ticks(10)
        process.stop()
        process.kill()  # a frozen one too
        assert process.wait() == -signal.SIGKILL
        assert not process.running


def test_a_program_that_ends_is_told() -> None:
    with netlab.Lab(["a"]) as lab:
        assert lab["a"].spawn(["sh", "-c", "exit 3"]).wait(10) == 3
        with pytest.raises(netlab.LabError, match="no such host today"):
            lab["a"].run(["sh", "-c", "echo no such host today >&2; exit 1"])
        with pytest.raises(netlab.LabError, match="main thread"):
            lab["a"].call(lambda: lab["a"].spawn(["true"]))


def test_a_crashed_host_says_no_goodbye() -> None:
    """A killed program's connections are closed by its kernel; those of a machine without power are not."""
    with netlab.Lab(["a", "b"]) as lab, contextlib.ExitStack() as stack:
        echo = "import socket; s = socket.create_server(('', 7)); c, _ = s.accept(); print(c.recv(1)); c.recv(1)"
        lab["a"].run(["ip", "addr", "add", "198.18.77.99/24", "dev", "eth0"])
        server = lab["a"].spawn(["setsid", sys.executable, "-c", echo])
        peer = stack.enter_context(_connected(lab))
        lab["a"].crash()
        assert not server.running
        peer.settimeout(0.3)
        with pytest.raises(TimeoutError):
            peer.recv(1)
        assert "inet " not in lab["a"].run(["ip", "addr", "show", "dev", "eth0"]).stdout
        lab["a"].spawn([sys.executable, "-c", echo])  # boots
        stack.enter_context(_connected(lab))
        addresses = lab["a"].run(["ip", "addr", "show", "dev", "eth0"]).stdout
        assert lab["a"].ip in addresses
        assert "198.18.77.99" not in addresses


def _connected(lab: netlab.Lab) -> socket.socket:
    deadline = time.monotonic() + 20
    while True:
        try:
            peer = lab["b"].call(lambda: socket.create_connection((lab["a"].ip, 7), timeout=2))
        except OSError:
            assert time.monotonic() < deadline
            time.sleep(0.02)
            continue
        peer.send(b"x")
        return peer


RUNNER = """
import sys, time
from tests.support import netlab
lab = netlab.Lab(["a", "b"], tap=sys.argv[1] == "tap")
for host in lab.hosts.values():
    host.spawn(["sleep", "611"])
    host.run(["sh", "-c", "setsid sleep 612 >/dev/null 2>&1 &"])  # a daemon
lab["b"].spawn(["sleep", "613"]).stop()
print("up", flush=True)
time.sleep(100)
"""


@SWITCHES
def test_nothing_is_left_when_the_runner_is_killed(tap: bool) -> None:
    mark = f"NETLAB_MARK={os.getpid()}-{tap}"
    env = {**os.environ, mark.partition("=")[0]: mark.partition("=")[2], "PYTHONPATH": str(ROOT)}
    runner = subprocess.Popen(
        [sys.executable, "-c", RUNNER, "tap" if tap else "bridge"], cwd=ROOT, env=env, stdout=subprocess.PIPE
    )
    with runner:
        assert runner.stdout is not None
        assert runner.stdout.readline() == b"up\n"
        assert len(_marked(mark)) >= 8  # what it started, and itself
        runner.kill()
    deadline = time.monotonic() + 10
    while left := _marked(mark):
        assert time.monotonic() < deadline, left
        time.sleep(0.02)


def _marked(mark: str) -> list[str]:
    """Command lines of living processes that carry `mark` in their environment."""
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdigit() and mark.encode() in (entry / "environ").read_bytes().split(b"\0"):
                found.append((entry / "cmdline").read_bytes().replace(b"\0", b" ").decode())
    return found
