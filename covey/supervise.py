"""Programs run as children: started in order, started again when they die, stopped in the opposite order.

* A child ends with its parent, however that ends: on Linux the kernel kills it (PR_SET_PDEATHSIG), so that kill -9 of
  the supervisor leaves no process behind.
* A child is its own session: Ctrl-C reaches the supervisor alone, which then stops the children in the right order.
* A child that dies is started again after a pause that doubles from 0.2 s to 10 s and starts anew once it has lived
  for 30 s. One line says so.
"""

import asyncio
import contextlib
import ctypes
import os
import signal
import sys
import time
from asyncio import subprocess
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from covey import errors

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_PAUSE_S, _LONGEST_PAUSE_S = 0.2, 10.0
_SETTLED_S = 30.0
_SILENCE_S = 5.0  # of a start before something is said
_LOG_LIMIT_BYTES = 16 * 1024 * 1024

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Program:
    """What to run. `ready` asks once whether it does its work; `log` takes its output (None: the supervisor's own)."""

    name: str
    argv: tuple[str, ...]
    env: Mapping[str, str]
    ready: Callable[[], Awaitable[bool]]
    log: Path | None = None
    start_s: float = 60.0
    stop_s: float = 15.0
    files: tuple[int, ...] = ()  # open files that it inherits, under the same numbers


class Child:
    """One running program. `start` once, `stop` once; in between it is kept alive."""

    def __init__(self, program: Program, say: Say) -> None:
        self.program = program
        self._say = say
        self._process: subprocess.Process | None = None
        self._keeper: asyncio.Task[None] | None = None
        self._started = 0.0

    @property
    def pid(self) -> int:
        return 0 if self._process is None else self._process.pid

    async def start(self) -> None:
        """Run it and wait until it is ready. Raises SettingError when it ends, or is not ready in time."""
        process = await self._spawn()
        deadline = time.monotonic() + self.program.start_s
        said_at = time.monotonic() + _SILENCE_S
        while not await self.program.ready() or process.returncode is not None:
            if process.returncode is not None:  # somebody else may have answered in its place
                raise errors.SettingError(f"{self.program.name} {_how(process.returncode)} at its start{self._tail()}")
            if time.monotonic() > deadline:
                raise errors.SettingError(
                    f"{self.program.name} was not ready within {self.program.start_s:.0f} s{self._tail()}"
                )
            if time.monotonic() > said_at:
                said_at = deadline + 1
                self._say(f"{self.program.name} is not ready yet; waiting up to {self.program.start_s:.0f} s for it")
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(process.wait(), 0.05)
        self._keeper = asyncio.create_task(self._keep(process))

    async def stop(self) -> None:
        """Ask it to end (SIGTERM), insist after `stop_s` (SIGKILL), wait until it has."""
        if self._keeper is not None:
            self._keeper.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._keeper
        process = self._process
        if process is None or process.returncode is not None:
            return
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
        try:
            await asyncio.wait_for(process.wait(), self.program.stop_s)
        except TimeoutError:
            self._say(f"{self.program.name} did not stop within {self.program.stop_s:.0f} s and is killed")
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()

    async def _keep(self, process: subprocess.Process) -> None:
        pause_s = _PAUSE_S
        while True:
            code = await process.wait()
            if time.monotonic() - self._started > _SETTLED_S:
                pause_s = _PAUSE_S
            self._say(f"{self.program.name} {_how(code)}; it is started again in {pause_s:.1f} s")
            await asyncio.sleep(pause_s)
            pause_s = min(pause_s * 2, _LONGEST_PAUSE_S)
            try:
                process = await self._spawn()
            except OSError as error:  # the next round says how long it waits
                self._say(f"{self.program.name} cannot be started: {error}")

    async def _spawn(self) -> subprocess.Process:
        output = None if self.program.log is None else _open_log(self.program.log)
        try:
            self._process = await subprocess.create_subprocess_exec(
                *self.program.argv,
                env=dict(self.program.env),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
                pass_fds=self.program.files,
                preexec_fn=_die_with_parent(os.getpid()),
            )
        finally:
            if output is not None:
                os.close(output)
        self._started = time.monotonic()
        return self._process

    def _tail(self) -> str:
        """Where to look, and the last line that says anything."""
        if self.program.log is None:
            return ""
        lines = self.program.log.read_text("utf-8", "replace").strip().splitlines()
        return f" (see {self.program.log}{': ' + lines[-1][:300] if lines else ''})"


def _how(code: int) -> str:
    if code < 0:
        return f"was killed ({signal.Signals(-code).name})"
    return f"ended with exit code {code}"


def _open_log(path: Path) -> int:
    """Append to the log; an overlong one is kept once as .old."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and path.stat().st_size > _LOG_LIMIT_BYTES:
        path.replace(path.with_suffix(path.suffix + ".old"))
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o640)


def _die_with_parent(parent: int) -> Callable[[], None] | None:
    """Run in the child between fork and exec: ask the kernel to kill it when the parent ends."""
    if sys.platform != "linux":
        return None
    libc = ctypes.CDLL(None, use_errno=True)  # loaded before the fork

    def ask() -> None:
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent:  # it ended between fork and prctl
            os._exit(1)

    return ask
