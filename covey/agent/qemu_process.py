"""QEMU as processes of this host: the fork, finding them again, and ending them.

A VM's process is nobody's child: it must outlive the agent. It is known by its command line alone, which carries
``-name covey-<instance id>`` for people and an inert object with cloud and directory for us, so that a VM is found
also when its directory is gone. A process id is only ever used through a pidfd whose command line was read *after* it
was opened: a recycled id is somebody else.
"""

import asyncio
import contextlib
import json
import os
import select
import signal
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

from covey import errors, model
from covey.agent import qemu_machine


class Found(model.Noun, frozen=True, kw_only=True):
    """A QEMU process of ours."""

    pid: int
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
    """Every QEMU process on this host that Covey started, whoever's it is."""
    for entry in os.listdir("/proc"):
        if entry.isdecimal() and (found := _look(int(entry))) is not None:
            yield found


def _look(pid: int) -> Found | None:
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return None
    if len(words) < 3 or words[1] != b"-name" or not words[2].startswith(b"covey-"):
        return None
    for word in words:
        if word.startswith(b'{"qom-type": "secret", "id": "%s"' % qemu_machine.MARK.encode()):
            cloud, _, directory = str(json.loads(word)["data"]).partition(" ")
            return Found(pid=pid, cloud=cloud, directory=directory)
    return None


def open_process(directory: Path) -> int | None:
    """A pidfd of the VM of `directory`, None when it does not run. To be closed."""
    for found in find():
        if found.directory != str(directory):
            continue
        try:
            pidfd = os.pidfd_open(found.pid)
        except ProcessLookupError:
            continue
        if _look(found.pid) == found and not ended(pidfd):
            return pidfd
        os.close(pidfd)
    return None


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
