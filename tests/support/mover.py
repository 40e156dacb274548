"""A client of a registry that can be killed: pushes and pulls in a process of their own, begun within milliseconds.

    async with mover.ready() as movers:
        run = await movers.begin("pull", url, template, folder)     # one process
        run.kill()
        assert await run.ended() != 0

One Python with everything imported forks a child per run. All of them end with the test runner.
"""

import asyncio
import contextlib
import ctypes
import json
import os
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path

from covey import model, world
from covey.client import http, registry, remembered, templates

RANGE_BYTES = 512 << 10
SYNC_BYTES = 64 << 10
_WAIT_S = 60.0
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


class Run:
    """One push or pull under way."""

    def __init__(self, pid: int, lines: asyncio.StreamReader) -> None:
        self.pid = pid
        self._lines = lines

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)

    async def ended(self) -> int:
        """Wait for its end: 0 when it was done, less when it was killed."""
        return int(await asyncio.wait_for(self._lines.readline(), _WAIT_S))


class Movers:
    """Begins runs, one after the other."""

    def __init__(self, child: asyncio.subprocess.Process) -> None:
        self._child = child

    async def begin(self, verb: str, *words: object) -> Run:
        assert self._child.stdin is not None and self._child.stdout is not None
        self._child.stdin.write(json.dumps([verb, *map(str, words)]).encode() + b"\n")
        return Run(int(await asyncio.wait_for(self._child.stdout.readline(), _WAIT_S)), self._child.stdout)


@contextlib.asynccontextmanager
async def ready() -> AsyncIterator[Movers]:
    child = await asyncio.create_subprocess_exec(
        *("setpriv", "--pdeathsig", "KILL", sys.executable, "-m", "tests.support.mover"),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    try:
        yield Movers(child)
    finally:
        child.kill()
        await child.communicate()


async def _move(verb: str, url: str, template: str, folder: str, *files: str) -> None:
    """`push` sends the files with its notes in the folder, `pull` brings them there."""
    async with http.Endpoints(url.split(",")) as endpoints:
        notes = remembered.Notes(Path(folder), world.System()) if verb == "push" else None
        talk = registry.Registry(endpoints, notes=notes, range_bytes=RANGE_BYTES, sync_bytes=SYNC_BYTES)
        if verb == "pull":
            await templates.pull_template(talk, template, Path(folder))
        else:
            layers = [Path(file) for file in files]
            await templates.push_template(talk, template, "v1", layers, arch=model.Arch.AMD64, notes=notes)


def _main() -> None:
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
            asyncio.run(_move(*json.loads(line)))
            os._exit(0)
        print(pid, flush=True)  # noqa: T201
        _, status = os.waitpid(pid, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)  # noqa: T201


if __name__ == "__main__":
    _main()
