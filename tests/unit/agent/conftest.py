"""A controller that misbehaves on request, and nodes on it: in this process, or as the real program."""

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest

from covey import world
from covey.agent import agent, host, parts, synthetic
from covey.client import http
from tests.unit.agent import fake


class Clock(world.System):
    """The real world, whose clock a test may push forward, as if the machine had slept."""

    def __init__(self) -> None:
        self.ahead_ns = 0

    def boot_ns(self) -> int:
        return super().boot_ns() + self.ahead_ns


class Node:
    """One agent in this process over synthetic VMs."""

    def __init__(self, url: str, data: Path | None, knobs: synthetic.Knobs) -> None:
        self.clock = Clock()
        self.driver = synthetic.Synthetic(self.clock, knobs, root=None if data is None else data / "vms")
        self.images = synthetic.Images(knobs.pull_s)
        self.endpoints = http.Endpoints([url], timeout_s=5)
        config = agent.Config(data_dir=str(data or ""), limits=parts.Limits(boot_s=2.0, quick_s=0.1, told_at_once=2))
        self.place = host.Place()
        self.agent = agent.Agent(config, self.clock, self.driver, self.images, self.endpoints, place=self._where)
        self.driver._wake = self.agent.wake
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        self._task = asyncio.create_task(self.agent.run())

    async def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
            self._task = None
        await self.endpoints.close()

    async def _where(self) -> host.Place:
        return self.place

    async def phases(self) -> dict[tuple[str, int], str]:
        return {(vm.instance, vm.epoch): str(vm.phase) for vm in await self.driver.list()}


MakeNode = Callable[..., Node]


@pytest.fixture
async def cloud() -> AsyncIterator[fake.Controller]:
    controller = fake.Controller()
    await controller.start()
    yield controller
    await controller.stop()


@pytest.fixture
async def make_node(cloud: fake.Controller, tmp_path: Path) -> AsyncIterator[MakeNode]:
    """Nodes that end with the test. Made twice on one directory: the same node after a crash or a restart."""
    made: list[Node] = []

    def make(data: Path | None = tmp_path / "node", **knobs: object) -> Node:
        node = Node(cloud.url, data, synthetic.Knobs(**knobs))  # type: ignore[arg-type]
        made.append(node)
        return node

    yield make
    for node in made:
        await node.stop()


class Program:
    """`covey agent` as a process of its own on synthetic VMs."""

    def __init__(self, url: str, data: Path, failpoints: str = "") -> None:
        self.folder = data / "agent" / "node-001"
        command = [sys.executable, "-m", "covey", "agent", "--hypervisor", "synthetic", "--nodes", "1"]
        command += ["--data-dir", str(data), "--controller", url]
        environ = {name: value for name, value in os.environ.items() if not name.startswith(("COVEY_", "ANKA_"))}
        environ |= {"COVEY_SYNTHETIC_PULL": "1ms", "COVEY_FAILPOINTS": failpoints}
        environ |= {name: os.environ[name] for name in ("COVEY_TEST_RUN",) if name in os.environ}
        self.process = subprocess.Popen(command, env=environ, preexec_fn=_die_with_parent)

    def starts(self) -> list[str]:
        """One line per guest that ever started on this node."""
        journal = self.folder / "vms" / "journal.log"
        lines = journal.read_text().splitlines() if journal.exists() else []
        return [" ".join(line.split()[:2]) for line in lines if line.split()[2] == "start"]

    @property
    def stopped(self) -> bool:
        """By SIGSTOP."""
        return Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"

    async def ended(self, limit_s: float = 60.0) -> int:
        await fake.until(lambda: self.process.poll() is not None, "the agent's process ended", limit_s)
        return self.process.returncode

    def kill(self, number: int = signal.SIGKILL) -> None:
        if self.process.poll() is None:
            self.process.send_signal(number)

    def close(self) -> None:
        self.kill(signal.SIGCONT)
        self.kill()
        self.process.wait(60)


def _die_with_parent() -> None:
    """PR_SET_PDEATHSIG (prctl(2)): the kernel ends the process when the test runner ends."""
    import ctypes

    ctypes.CDLL(None).prctl(1, signal.SIGKILL)


MakeProgram = Callable[..., Program]


@pytest.fixture
def make_program(cloud: fake.Controller, tmp_path: Path) -> Iterator[MakeProgram]:
    made: list[Program] = []

    def make(failpoints: str = "") -> Program:
        for one in made:
            one.close()
        made.append(Program(cloud.url, tmp_path / "program", failpoints))
        return made[-1]

    yield make
    for one in made:
        one.close()
