"""The leak check: what a test started has ended with it.

After each test no asyncio task, no process and no heap of open files may be left that was not there before. Things
that fixtures of a wider scope hold are there before the test's own fixtures, so they are not counted. Everything gets
a moment to end by itself first: the check looks for leaks, it does not race.

Processes are found by parentage and by a mark in their environment, so that a daemon that detached itself is found
too. A test runner that is killed takes nothing with it by this module; that is the starters' duty (PR_SET_PDEATHSIG).
"""

import asyncio
import gc
import os
import time
import uuid
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import hypothesis
import pytest

# A commit is tested alike each time; `--hypothesis-profile=default` looks further.
hypothesis.settings.register_profile("covey", derandomize=True, deadline=None)
hypothesis.settings.load_profile("covey")

MARK = "COVEY_TEST_RUN"
GRACE_S = float(os.environ.get("COVEY_TEST_GRACE_S", "20"))
FDS_SLACK = 24  # libraries open a few of their own at first use (epoll, eventfd, wake-up pipes)
OWN_HELPERS = (b"resource_tracker", b"forkserver")  # of Python's multiprocessing; they end with the runner

os.environ[MARK] = uuid.uuid4().hex  # one per runner: pytest-xdist's workers each import this module
_ENTRY = f"{MARK}={os.environ[MARK]}".encode()


@pytest.fixture(autouse=True)
def no_leaks(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fails the test at its end when it left processes or files behind; asks the loop about tasks if it has one."""
    if request.node.get_closest_marker("asyncio") is not None:
        request.getfixturevalue("no_task_left")
    processes_before = processes()
    fds_before = _count_fds()
    yield
    left = processes_left(processes_before)
    if left:
        pytest.fail("processes were left behind: " + "; ".join(f"{pid} {_command(pid)}" for pid in sorted(left)))
    fds = _count_fds()
    if fds > fds_before + FDS_SLACK:
        gc.collect()
        if (fds := _count_fds()) > fds_before + FDS_SLACK:
            pytest.fail(f"{fds - fds_before} files were left open")


@pytest.fixture
async def no_task_left() -> AsyncIterator[None]:
    """Fails an asynchronous test that leaves a task running (the loop would cancel it silently)."""
    before = asyncio.all_tasks()
    yield
    left = asyncio.all_tasks() - before - {asyncio.current_task()}
    if left:
        _done, left = await asyncio.wait(left, timeout=GRACE_S)
    if left:
        pytest.fail("tasks were left running: " + "; ".join(sorted(repr(task.get_coro()) for task in left)))


def processes_left(before: set[int]) -> set[int]:
    """Processes that are new and stay for the whole grace."""
    deadline = time.monotonic() + GRACE_S
    while (left := processes() - before) and time.monotonic() < deadline:
        time.sleep(0.02)
    return left


def processes() -> set[int]:
    """Living processes that are ours: children of this runner, and whatever carries its mark. Not the runner."""
    own = os.getpid()
    found = set()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != own and _is_ours(entry, own):
            found.add(int(entry.name))
    return found


def _is_ours(process: Path, own: int) -> bool:
    try:
        state, parent = process.joinpath("stat").read_text().rpartition(")")[2].split()[:2]
        if state in "ZX":
            return False  # ended; whoever started it has not asked yet
        if any(word in process.joinpath("cmdline").read_bytes() for word in OWN_HELPERS):
            return False
        return int(parent) == own or _ENTRY in process.joinpath("environ").read_bytes().split(b"\0")
    except (OSError, ValueError):  # it ended while we looked, or it is another user's
        return False


def _count_fds() -> int:
    """Open files, but for the locks by which tests keep a port until the runner ends (tests.support.etcd.free_port)."""
    count = 0
    for entry in Path("/proc/self/fd").iterdir():
        try:
            count += "covey-test-ports" not in str(entry.readlink())
        except OSError:  # closed while we looked; it was iterdir's own
            continue
    return count


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()[:200]
    except OSError:
        return "(ended)"
