"""Real programs as a user runs them: the `covey` command, HTTP, files and signals. Nothing here imports covey."""

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import pytest

from tests.support import etcd, ran

T = TypeVar("T")
Ran = ran.Ran
COVEY = (sys.executable, "-m", "covey")
ENDS_WITH_US = ("setpriv", "--pdeathsig", "KILL", "--")  # also when the test runner is killed
PATIENCE_S = 90.0


def eventually(question: Callable[[], T], timeout_s: float = PATIENCE_S) -> T:
    """Ask until the answer is true; it. Faults of a server that is away count as no."""
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            answer, why = question(), ""
        except (OSError, ValueError) as error:
            answer, why = None, repr(error)
        if answer:
            return answer
        if time.monotonic() > deadline:
            pytest.fail(f"not within {timeout_s:.0f} s: last answer {answer!r} {why}")
        time.sleep(0.05)


def environment(**more: str) -> dict[str, str]:
    """What a program sees: nothing of ours that was set around the tests."""
    clean = {n: v for n, v in os.environ.items() if not n.startswith(("COVEY_", "ANKA_")) or n == "COVEY_TEST_RUN"}
    return {**clean, "COVEY_CONFIG": os.devnull, "COVEY_ETCD_BINARY": etcd.binary(), **more}


def covey(*argv: object, **env: str) -> Ran:
    """Run a command to its end."""
    words = [str(word) for word in argv]
    done = subprocess.run(
        [*COVEY, *words], env=environment(**env), capture_output=True, text=True, timeout=200, check=False
    )
    return Ran(done.returncode, done.stdout, done.stderr)


class Program:
    """One program in the foreground; its two streams are gathered line by line. `within`: words before its command;
    `covey`: another version's command."""

    def __init__(self, *argv: object, within: Sequence[str] = (), covey: Sequence[str] = COVEY, **env: str) -> None:
        self.process = subprocess.Popen(
            [*ENDS_WITH_US, *within, *covey, *(str(word) for word in argv)],
            env=environment(**env),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self.out: list[str] = []
        self.err: list[str] = []
        self._readers = [
            threading.Thread(target=_gather, args=(stream, lines))
            for stream, lines in ((self.process.stdout, self.out), (self.process.stderr, self.err))
        ]
        for reader in self._readers:
            reader.start()

    @property
    def pid(self) -> int:
        return self.process.pid

    def said(self, text: str) -> str | None:
        """The first line of either stream that contains `text`."""
        return next((line for line in [*self.out, *self.err] if text in line), None)

    def wait_until_said(self, text: str) -> str:
        def look() -> str | None:
            line = self.said(text)
            if line is None and self.process.poll() is not None:
                pytest.fail(f"ended with {self.process.returncode} without saying {text!r}: {self.out} {self.err}")
            return line

        return eventually(look) or ""

    def end(self, number: int = signal.SIGTERM, timeout_s: float = PATIENCE_S) -> int:
        """Send a signal and wait; the exit code."""
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(number)
        code = self.process.wait(timeout_s)
        for reader in self._readers:
            reader.join()
        for stream in (self.process.stdout, self.process.stderr):
            if stream is not None:
                stream.close()
        return code


def _gather(stream: Any, lines: list[str]) -> None:
    for line in stream:
        lines.append(line.rstrip("\n"))  # noqa: PERF401 (one by one: others look meanwhile)


@dataclasses.dataclass
class Cloud:
    """A running `covey standalone` or `covey up`."""

    program: Program
    controller: str
    registry: str
    etcd: str
    data: Path

    def ask(self, method: str, path: str, body: object = None) -> Any:
        """One call of the controller's API: the whole envelope."""
        return ask(self.controller + path, method, body)[1]

    def covey(self, *argv: object) -> Ran:
        return covey(*argv, COVEY_CONTROLLER=self.controller, COVEY_REGISTRY=self.registry)

    def child(self, name: str) -> int:
        """The process id of one of its programs; 0 while there is none."""
        command = "agent" if name == "nodes" else name
        for pid, line in children(self.program.pid).items():
            if f"covey {command}" in line or (name == "etcd" and "--data-dir=" in line):
                return pid
        return 0

    def push(self, folder: Path, tag: str = "v1", content: bytes = b"a small disk") -> str:
        """Push a template; its id."""
        (folder / "disk").write_bytes(content)
        ran = self.covey("template", "push", "small", "--tag", tag, folder / "disk", "--json")
        assert ran.code == 0, ran
        return str(ran.json["template"])

    def start(self, template: str, **more: object) -> str:
        """Start one instance; its id."""
        answer = self.ask("POST", "/api/v1/vm", {"vmid": template, **more})
        assert answer["status"] == "OK", answer
        (id,) = answer["body"]
        return str(id)

    def state(self, id: str) -> str:
        answer = self.ask("GET", f"/api/v1/vm?id={id}")
        return str(answer["body"]["instance_state"]) if answer["status"] == "OK" else str(answer["message"])

    def end(self, number: int = signal.SIGTERM) -> int:
        return self.program.end(number)


def ask(
    url: str, method: str = "GET", body: object = None, headers: Mapping[str, str] | None = None
) -> tuple[int, Any]:
    """HTTP status and decoded body; also of errors."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data=data, headers=dict(headers or {}), method=method)  # noqa: S310 (ours)
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:  # noqa: S310
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.load(error)


def children(parent: int) -> dict[int, str]:
    """Process id → command line of the children of `parent`."""
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                if int((entry / "stat").read_text().rpartition(")")[2].split()[1]) == parent:
                    line = (entry / "cmdline").read_bytes().replace(b"\0", b" ")
                    found[int(entry.name)] = line.decode("utf-8", "replace")
    return found


def alive(pid: int) -> bool:
    """Whether the process runs (a zombie does not)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def start_cloud(data: Path, *argv: object, **env: str) -> Cloud:
    """Start a cloud on free ports and wait until it says what to do next."""
    command = argv or ("standalone",)
    places = ("--listen-addr", "127.0.0.1:0", "--registry-listen-address", "127.0.0.1:0", "--data-dir", data)
    program = Program(*command, *places, **env)
    try:
        program.wait_until_said("Next:")
    except BaseException:
        program.end(signal.SIGKILL)
        raise
    where = {
        name: (program.said(f"{name} listens on") or "").split()[-1] for name in ("controller", "registry", "etcd")
    }
    return Cloud(program=program, data=data, **where)


@contextlib.contextmanager
def running_cloud(data: Path, *argv: object, **env: str) -> Iterator[Cloud]:
    cloud = start_cloud(data, *argv, **env)
    try:
        yield cloud
    finally:
        if cloud.program.process.stdout and not cloud.program.process.stdout.closed:
            cloud.end()


def kill(pid: int) -> None:
    """kill -9."""
    os.kill(pid, signal.SIGKILL)


@contextlib.contextmanager
def etcd_at(folder: Path, port: int, peer: int) -> Iterator[None]:
    """One etcd member on ports that were chosen before."""
    client_url, peer_url = f"http://127.0.0.1:{port}", f"http://127.0.0.1:{peer}"
    options = {
        "name": "one",
        "data-dir": str(folder / "etcd"),
        "listen-client-urls": client_url,
        "advertise-client-urls": client_url,
        "listen-peer-urls": peer_url,
        "initial-advertise-peer-urls": peer_url,
        "initial-cluster": f"one={peer_url}",
    }
    with (folder / "etcd.log").open("wb") as log:
        member = subprocess.Popen(
            [*ENDS_WITH_US, etcd.binary(), *(f"--{name}={value}" for name, value in options.items())],
            stdout=log,
            stderr=log,
        )
    try:
        yield
    finally:
        member.kill()
        member.wait()
