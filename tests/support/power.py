"""A disk whose power can fail at any step of a story, and the stories' notes of what was acknowledged until then.

    volume = Volume(folder, "xfs")                       # a file system on a loop device, mounted at volume.folder
    told = play(story, 7, volume)                        # in a child, whose power fails at the seventh step
    volume.restart()                                     # what was not flushed is gone
    play(check, 0, volume)                               # to its end

A step is a failpoint, or the moment in which the story was answered. There the file system is shut down without
flushing anything (FS_IOC_SHUTDOWN, which `xfs_io -x -c shutdown` does as well), and the child ends by SIGKILL within
the very call. Children are forked: the first step of a story is reached a few milliseconds after its beginning.

Mounts need a namespace of their own, which ends with its processes, however these end: `within()` are the words.
"""

import asyncio
import contextlib
import fcntl
import os
import signal
import struct
import subprocess
import threading
import time
import traceback
from collections.abc import Awaitable, Callable, Iterator, Sequence
from pathlib import Path

from covey import failpoint

_SHUTDOWN = 0x8004587D  # FS_IOC_SHUTDOWN, _IOR('X', 125, __u32) of linux/fs.h
_NO_FLUSH = 2  # …_FLAGS_NOLOGFLUSH: not even the log
_MAKERS = {
    "xfs": ("mkfs.xfs", "-q", "-K"),
    "ext4": ("mkfs.ext4", "-q", "-F", "-E", "nodiscard"),
}
_SIZE_BYTES = 400 << 20  # of a sparse file; XFS has a minimum of 300 MB
_ALARM_S = 60
_PATIENCE_S = 30.0

KINDS = tuple(_MAKERS)


def within() -> Sequence[str]:
    """The words before a command whose mounts and children end with it."""
    namespaces = ("unshare", "--mount", "--propagation", "private", "--pid", "--fork", "--kill-child")
    return ("setpriv", "--pdeathsig", "KILL", *namespaces)


class Volume:
    """A new file system, mounted at `folder`/mount. Its device is a file in memory, gone with the namespace."""

    def __init__(self, folder: Path, kind: str) -> None:
        _run("mount", "-t", "tmpfs", "none", str(folder))
        self._image, self.folder = folder / "image", folder / "mount"
        self.folder.mkdir()
        with self._image.open("wb") as stream:
            stream.truncate(_SIZE_BYTES)
        _run(*_MAKERS[kind], str(self._image))
        self._mount()

    def _mount(self) -> None:
        _patiently("mount", "-o", "loop", str(self._image), str(self.folder))

    def fail(self) -> None:
        """From here on nothing reaches the disk."""
        handle = os.open(self.folder, os.O_RDONLY)
        fcntl.ioctl(handle, _SHUTDOWN, struct.pack("I", _NO_FLUSH))

    def restart(self) -> None:
        _patiently("umount", str(self.folder))
        self._mount()


def _run(*words: str) -> None:
    path = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
    done = subprocess.run(words, env={**os.environ, "PATH": path}, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"


def _patiently(*words: str) -> None:
    """Something else on the machine may look at a device for a moment."""
    deadline = time.monotonic() + _PATIENCE_S
    while True:
        try:
            return _run(*words)
        except AssertionError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)


class Run:
    """One run of a story, told line by line to whoever plays it. At step `stop_at` the power fails; 0: never."""

    def __init__(self, pipe: int, stop_at: int, volume: Volume) -> None:
        self._pipe = pipe
        self._stop_at = stop_at
        self._volume = volume
        self._counting = False
        self._steps = 0
        self._happens: dict[str, Callable[[], None]] = {}
        self._lock = threading.Lock()

    def begin(self) -> None:
        """Steps count from here."""
        self._counting = True

    def at(self, name: str, happens: Callable[[], None]) -> None:
        """The next time that step `name` is reached, first this `happens`."""
        self._happens[name] = happens

    def reach(self, name: str) -> None:
        if not self._counting:
            return
        if happens := self._happens.pop(name, None):
            happens()
        with self._lock:
            self._steps += 1
            self._tell("step", name)
            if self._steps == self._stop_at:
                self._volume.fail()
                os.kill(os.getpid(), signal.SIGKILL)

    def may(self, what: str, value: object) -> None:
        """`value` is on its way to be what `what` is."""
        self._tell("may", what, value)

    def answered(self, **known: object) -> None:
        """All of this was acknowledged."""
        for what, value in known.items():
            self._tell("is", what, value)
        self.reach("answered")

    @contextlib.contextmanager
    def change(self, what: str, value: object) -> Iterator[None]:
        """A request inside, after which `what` is `value`."""
        self.may(what, value)
        yield
        self.answered(**{what: value})

    def wrong(self, text: str) -> None:
        self._tell("wrong", text)

    def _tell(self, *words: object) -> None:
        os.write(self._pipe, ("\t".join(str(word) for word in words) + "\n").encode())


class Told:
    """What a run told. `allowed`: for each thing the last value acknowledged, and those that were on their way."""

    def __init__(self, lines: Sequence[str], status: int, stop_at: int) -> None:
        self.steps: list[str] = []
        self.wrong: list[str] = []
        self.allowed: dict[str, list[str]] = {}
        for line in lines:
            word, what, *value = line.split("\t")
            if word == "step":
                self.steps.append(what)
            elif word == "wrong":
                self.wrong.append(what)
            elif word == "is":
                self.allowed[what] = value
            else:
                self.allowed.setdefault(what, ["None"]).extend(value)
        self.stopped = 0 < stop_at == len(self.steps)  # by the power; otherwise it went to its end
        if status != 0 and not self.stopped and not self.wrong:
            self.wrong.append(f"it ended with {os.waitstatus_to_exitcode(status)}")


def play(story: Callable[[Run], Awaitable[None]], stop_at: int, volume: Volume) -> Told:
    """`story` in a forked child."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        _be_the_child(story, Run(writing, stop_at, volume))
    os.close(writing)
    with os.fdopen(reading) as stream:
        lines = stream.read().splitlines()
    _, status = os.waitpid(child, 0)
    return Told(lines, status, stop_at)


def _be_the_child(story: Callable[[Run], Awaitable[None]], run: Run) -> None:
    code = 1
    try:
        signal.alarm(_ALARM_S)
        failpoint.watch(run.reach)
        asyncio.run(_story(story, run))
        code = 0
    except BaseException as error:
        frames = traceback.extract_tb(error.__traceback__)
        run.wrong(f"{error!r} in {frames[-1].name}, line {frames[-1].lineno} of {frames[-1].filename}")
    finally:
        os._exit(code)


async def _story(story: Callable[[Run], Awaitable[None]], run: Run) -> None:
    await story(run)
