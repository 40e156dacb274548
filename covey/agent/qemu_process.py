"""QEMU as processes of this host: the fork, finding them again, and ending them.

A VM's process is nobody's child: it must outlive the agent. Its command line carries ``-name covey-<instance id>`` for
people and an inert object with cloud and directory for us, so that a VM is found also when its directory is gone. But
anybody may write what they like on their command line, a QEMU that its guest took over included: it is believed only of
a process that runs as the VM's own user. And a process that holds the VM's lock is the VM's, whatever it says.

A process id is only ever used through a pidfd, and looked at again *after* that was opened: a recycled id is somebody
else.
"""

import asyncio
import contextlib
import os
import select
import signal
import subprocess
from collections.abc import Callable, Container, Iterator, Sequence
from pathlib import Path

import msgspec

from covey import errors, model
from covey.agent import qemu_machine


class Found(model.Noun, frozen=True, kw_only=True):
    """A QEMU process of ours, by its own word. `user`: whom it runs as, by the kernel's."""

    pid: int
    user: int
    cloud: str
    directory: str


def fork(
    words: Sequence[str], *, directory: Path, log: Path, keep: Sequence[int], user: int | None, groups: Sequence[int]
) -> int:
    """Start QEMU in `directory` as `user` (None: ourselves) with the open files `keep`. Its pidfd."""
    try:
        with log.open("ab") as output:
            process = subprocess.Popen(
                words,
                cwd=directory,
                user=user,
                group=user,
                extra_groups=None if user is None else list(groups),
                pass_fds=keep,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
                env={"PATH": os.environ.get("PATH", ""), "LC_ALL": "C"},
            )
    except OSError as fault:
        raise errors.HypervisorError(f"QEMU could not be started: {fault}") from fault
    pidfd = os.pidfd_open(process.pid)
    process.returncode = 0  # it outlives us, which Popen would complain of; its end is read from the pidfd
    return pidfd


def find() -> Iterator[Found]:
    """Every process on this host that says it is a QEMU started by Covey, whoever's it is."""
    for pid in _all():
        if (found := _look(pid)) is not None:
            yield found


def _all() -> Iterator[int]:
    yield from (int(entry) for entry in os.listdir("/proc") if entry.isdecimal())


def _look(pid: int) -> Found | None:
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        if len(words) < 3 or words[1] != b"-name" or not words[2].startswith(b"covey-"):
            return None
        user = _user(pid)
    except (OSError, StopIteration):
        return None
    for word in words:
        try:
            mark = msgspec.json.decode(word, type=_Mark)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            continue
        if mark.id == qemu_machine.MARK:
            cloud, _, directory = mark.data.partition(" ")
            return Found(pid=pid, user=user, cloud=cloud, directory=directory)
    return None


class _Mark(msgspec.Struct):
    """The inert object (`qemu_machine.command`)."""

    id: str
    data: str


def _user(pid: int) -> int:
    """Whom a process runs as. The owner of its directory in /proc would not do: that is root's for some."""
    lines = Path(f"/proc/{pid}/status").read_bytes().splitlines()
    return int(next(line for line in lines if line.startswith(b"Uid:")).split()[2])


def open_process(directory: Path, users: Container[int]) -> int | None:
    """A pidfd of the VM of `directory`, which runs as one of `users`; None when it does not run. To be closed."""

    def marked(pid: int) -> bool:
        found = _look(pid)
        return found is not None and found.directory == str(directory) and found.user in users

    pidfd = _open(marked)
    return _open(lambda pid: _holds(pid, directory / "vm.lock", users)) if pidfd is None else pidfd


def _open(wanted: Callable[[int], bool]) -> int | None:
    for pid in filter(wanted, _all()):
        try:
            pidfd = os.pidfd_open(pid)
        except ProcessLookupError:
            continue
        if wanted(pid) and not ended(pidfd):
            return pidfd
        os.close(pidfd)
    return None


def _holds(pid: int, lock: Path, users: Container[int]) -> bool:
    """Whether a process has this file open, which is root's: inherited from the agent, and from nobody else."""
    try:
        if pid == os.getpid() or _user(pid) not in users:
            return False
        file = lock.stat()
        opened = [os.stat(f"/proc/{pid}/fd/{name}") for name in os.listdir(f"/proc/{pid}/fd")]
    except (OSError, StopIteration):
        return False
    return any(os.path.samestat(file, one) for one in opened)


def ended(pidfd: int) -> bool:
    """Whether the process has ended; if it was our child it is reaped."""
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    if not poll.poll(0):
        return False
    with contextlib.suppress(ChildProcessError):
        os.waitid(os.P_PIDFD, pidfd, os.WEXITED | os.WNOHANG)
    return True


async def wait_until_ended(pidfd: int, timeout_s: float | None) -> bool:
    """Wait for the end of any process, child or not. False when it did not come in time (None: any)."""
    loop = asyncio.get_running_loop()
    own = os.dup(pidfd)  # the loop watches a descriptor once, and others may watch the same process
    gone = asyncio.Event()
    loop.add_reader(own, gone.set)
    try:
        async with asyncio.timeout(timeout_s):
            await gone.wait()
    except TimeoutError:
        return ended(pidfd)
    finally:
        loop.remove_reader(own)
        os.close(own)
    return ended(pidfd)


async def kill(pidfd: int, timeout_s: float) -> None:
    """SIGKILL, also for a stopped process, and wait for the end."""
    with contextlib.suppress(ProcessLookupError):
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
    if not await wait_until_ended(pidfd, timeout_s):
        raise errors.HypervisorError(
            f"QEMU did not end within {timeout_s:.0f} s of SIGKILL; the host's storage may hang"
        )
