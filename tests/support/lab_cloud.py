"""A cloud of real programs in a lab of hosts: etcd members, controllers, a registry, synthetic nodes; a client.

    with lab_cloud.running(controllers=3, nodes=4, more=("lb",)) as cloud:      # all are ready
        cloud.controllers[0].kill()                       # kill -9; .start() brings it back with its data
        cloud.lab.isolate("c2")
        answer = cloud.ask(cloud.controllers[1].url + "/api/v1/vm")
        cloud.leader().stop()

Hosts are e1…eN, c1…cN, r1, n1 (all synthetic nodes in one process) and `load`, from where questions are asked. Each
program has its standard port, because each host has its own network. Nothing here imports covey: the programs run as
`python -m covey …` with settings in their environment.
"""

import base64
import collections
import concurrent.futures
import contextlib
import http.client
import json
import os
import shutil
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from tests.support import etcd, netlab

T = TypeVar("T")

ROOT = Path(__file__).resolve().parents[2]
COVEY = (sys.executable, "-m", "covey")
PATIENCE_S = 60.0


class NotReady(Exception):
    """Something did not come about in time; the text holds the end of a log."""


class Answer(NamedTuple):
    """HTTP status (0: no answer came, `body` says why) and the decoded body."""

    status: int
    body: Any


@dataclass
class Program:
    """A program of a host, which may be killed, frozen and started again."""

    name: str
    host: netlab.Host
    argv: Sequence[str]
    env: Mapping[str, str]
    log_path: Path
    url: str = ""
    process: netlab.Process | None = None

    def start(self) -> None:
        """Returns at once."""
        assert self.process is None or not self.process.running, f"{self.name} runs already"
        self.process = self.host.spawn(self.argv, env=self.env, log=self.log_path)

    @property
    def pid(self) -> int:
        return self._running().pid

    @property
    def running(self) -> bool:
        return self.process is not None and self.process.running

    def kill(self) -> None:
        self._running().kill()

    def stop(self) -> None:
        """SIGSTOP."""
        self._running().stop()

    def cont(self) -> None:
        self._running().cont()

    def term(self) -> None:
        self._running().term()

    def wait(self, timeout_s: float = 30) -> int:
        return self._running().wait(timeout_s)

    def log(self) -> str:
        return self.log_path.read_text(errors="replace") if self.log_path.exists() else ""

    def _running(self) -> netlab.Process:
        assert self.process is not None, f"{self.name} was never started"
        return self.process


@dataclass
class Cloud:
    """The programs by kind; `ask` and `until` speak from the host `load`."""

    lab: netlab.Lab
    directory: Path
    members: list[Program] = field(default_factory=list)
    controllers: list[Program] = field(default_factory=list)
    registries: list[Program] = field(default_factory=list)
    agents: list[Program] = field(default_factory=list)
    others: list[Program] = field(default_factory=list)
    template: str = ""

    # ---- programs, each started at once ----------------------------------------------------------------------------

    def program(self, name: str, host: str, argv: Sequence[str], url: str = "", **env: str) -> Program:
        """Any program, with a log of its own; not started."""
        environ = netlab.environment(COVEY_CONFIG=os.devnull, PYTHONPATH=str(ROOT), **env)
        return Program(name, self.lab[host], argv, environ, self.directory / f"{name}.log", url)

    def start_other(self, name: str, host: str, argv: Sequence[str], url: str = "", **env: str) -> Program:
        program = self.program(name, host, argv, url, **env)
        self.others.append(program)
        program.start()
        return program

    def start_etcd(self, hosts: Sequence[str]) -> None:
        """One member on each host, with fsync, on a disk."""
        everybody = ",".join(f"{name}=http://{self.lab[name].ip}:2380" for name in hosts)
        for name in hosts:
            ip = self.lab[name].ip
            options = {
                "name": name,
                "data-dir": str(self.directory / name),
                "listen-client-urls": f"http://{ip}:2379,http://127.0.0.1:2379",
                "advertise-client-urls": f"http://{ip}:2379",
                "listen-peer-urls": f"http://{ip}:2380",
                "initial-advertise-peer-urls": f"http://{ip}:2380",
                "initial-cluster": everybody,
                "heartbeat-interval": "100",
                "election-timeout": "1000",
                "logger": "zap",
                "log-level": "warn",
            }
            flags = [f"--{option}={value}" for option, value in options.items()]
            self.members.append(self.program(name, name, [etcd.binary(), *flags, "--pre-vote"], f"http://{ip}:2379"))
            self.members[-1].start()

    def start_registry(self, host: str, **env: str) -> Program:
        url = f"http://{self.lab[host].ip}:8089"
        data = {"COVEY_DATA_DIR": str(self.directory / host), "COVEY_LISTEN_ADDR": "0.0.0.0:8089"}
        settings = {**data, "COVEY_ALLOW_ANONYMOUS": "true", **env}
        self.registries.append(self.program(host, host, [*COVEY, "registry"], url, **settings))
        self.registries[-1].start()
        return self.registries[-1]

    def start_controller(self, host: str, **env: str) -> Program:
        settings = {
            "COVEY_LISTEN_ADDR": "0.0.0.0:8090",
            "COVEY_ALLOW_ANONYMOUS": "true",
            "COVEY_ETCD_ENDPOINTS": ",".join(member.url for member in self.members),
            "COVEY_ANKA_REGISTRY": ",".join(registry.url for registry in self.registries),
            "COVEY_INSTANCE_TIME_OUT": "30s",
            **env,
        }
        url = f"http://{self.lab[host].ip}:8090"
        self.controllers.append(self.program(host, host, [*COVEY, "controller"], url, **settings))
        self.controllers[-1].start()
        return self.controllers[-1]

    def start_nodes(self, host: str, count: int, urls: Sequence[str] = (), **env: str) -> Program:
        """`count` synthetic nodes in one process, which talk to `urls` (every controller unless given)."""
        settings = {
            "COVEY_HYPERVISOR": "synthetic",
            "COVEY_NODES": str(count),
            "COVEY_CONTROLLER": ",".join(urls or [controller.url for controller in self.controllers]),
            "COVEY_DATA_DIR": str(self.directory / host),
            **env,
        }
        self.agents.append(self.program(f"{host}-nodes", host, [*COVEY, "agent"], "", **settings))
        self.agents[-1].start()
        return self.agents[-1]

    def start_agent(self, host: str, urls: Sequence[str] = ()) -> Program:
        """One node that really pulls; only its VMs are pretended. `urls` as for `start_nodes`."""
        settings = {
            "COVEY_HYPERVISOR": "synthetic",
            "COVEY_CONTROLLER": ",".join(urls or [controller.url for controller in self.controllers]),
            "COVEY_DATA_DIR": str(self.directory / host),
            "COVEY_NODE_NAME": host,
            "COVEY_MAX_VMS": "2000",
        }
        self.agents.append(self.program(f"{host}-agent", host, [*COVEY, "agent"], "", **settings))
        self.agents[-1].start()
        return self.agents[-1]

    @property
    def programs(self) -> list[Program]:
        return [*self.members, *self.registries, *self.controllers, *self.agents, *self.others]

    # ---- questions -------------------------------------------------------------------------------------------------

    def ask(
        self,
        url: str,
        method: str = "GET",
        body: object = None,
        *,
        timeout_s: float = 30,
        headers: Mapping[str, str] | None = None,
        source: str = "load",
    ) -> Answer:
        """One call from the host `source`. Never raises: no answer is status 0."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(url, data=data, method=method, headers=dict(headers or {}))  # noqa: S310
        return self.lab[source].call(lambda: _answer(request, timeout_s))

    def until(self, question: Callable[[], T], timeout_s: float = PATIENCE_S, what: str = "") -> T:
        """Ask until the answer is true; it. Raises NotReady."""
        deadline = time.monotonic() + timeout_s
        while not (answer := question()):
            if time.monotonic() > deadline:
                raise NotReady(f"not within {timeout_s:.0f} s: {what or question} (last answer: {answer!r})")
            time.sleep(0.03)
        return answer

    def is_ready(self, url: str) -> bool:
        return self.ask(f"{url}/readyz", timeout_s=2).status == 200

    def wait_ready(self, *programs: Program, timeout_s: float = PATIENCE_S) -> None:
        """Until each is green on /readyz (etcd: /health)."""
        for program in programs:
            path = "/health" if program in self.members else "/readyz"

            def look(program: Program = program, path: str = path) -> bool:
                if not program.running:
                    raise NotReady(f"{program.name} has ended:\n{program.log()[-3000:]}")
                return self.ask(program.url + path, timeout_s=2).status == 200

            try:
                self.until(look, timeout_s)
            except NotReady as error:
                raise NotReady(f"{program.name} is not ready: {error}\n{program.log()[-3000:]}") from None

    def wait_all_ready(self) -> None:
        self.wait_ready(*(program for program in [*self.members, *self.controllers, *self.registries]))

    def leader(self) -> Program:
        """The member that leads, by its own word and a majority's; waits for an election. One that was cut off is
        taken for the leader until the others have noticed."""

        def look() -> Program | None:
            with concurrent.futures.ThreadPoolExecutor(len(self.members)) as pool:
                said = list(pool.map(self._leading, self.members))
            for member, own_word in zip(self.members, said, strict=True):
                if own_word == member.name and said.count(own_word) > len(self.members) // 2:
                    return member
            return None

        found = self.until(look, what="a leader")
        assert found is not None
        return found

    def _leading(self, member: Program) -> str:
        """Whom `member` takes for the leader; asked on its own host, so that cuts do not matter."""
        answer = self.ask("http://127.0.0.1:2379/v3/maintenance/status", "POST", {}, timeout_s=1, source=member.name)
        leader = str(answer.body.get("leader", "")) if answer.status == 200 else ""
        return self._names().get(leader, "")

    def _names(self) -> dict[str, str]:
        """Member id → name, which never changes."""
        if not self._known_names:
            for member in self.members:
                listed = self.ask(f"{member.url}/v3/cluster/member/list", "POST", {}, timeout_s=2)
                if listed.status == 200:
                    self._known_names.update((each["ID"], each["name"]) for each in listed.body["members"])
                    break
        return self._known_names

    _known_names: dict[str, str] = field(default_factory=dict)

    # ---- what the cloud holds --------------------------------------------------------------------------------------

    def push_template(self, name: str = "small", tag: str = "v1") -> str:
        """Push a template of a few bytes; its id."""
        disk = self.directory / f"{name}.img"
        disk.write_bytes(b"a small disk")
        argv = [
            *COVEY,
            "template",
            "push",
            name,
            "--tag",
            tag,
            str(disk),
            "--json",
            "--registry",
            self.registries[0].url,
        ]
        pushed = self.lab["load"].run(argv, COVEY_CONFIG=os.devnull, PYTHONPATH=str(ROOT))
        self.template = str(json.loads(pushed.stdout)["template"])
        return self.template

    def wait_nodes(self, count: int, timeout_s: float = PATIENCE_S) -> None:
        """Until so many nodes are Active."""

        def look() -> bool:
            answer = self.ask(self.controllers[0].url + "/api/v1/node")
            return answer.status == 200 and sum(node["state"] == "Active" for node in answer.body["body"]) >= count

        self.until(look, timeout_s, f"{count} nodes are Active")

    def state(self, id: str, url: str = "") -> str:
        """An instance's state as one controller shows it, or why it shows none."""
        answer = self.ask(f"{url or self.controllers[0].url}/api/v1/vm?id={id}")
        shown = answer.status == 200 and answer.body["status"] == "OK"
        return str(answer.body["body"]["instance_state"] if shown else answer.body)

    def guest_starts(self) -> collections.Counter[str]:
        """Ground truth: how often each instance's guest was started, by the journals of the synthetic nodes."""
        journals = self.directory.glob("n*/**/journal.log")
        lines = (line.split() for journal in journals for line in journal.read_text().splitlines())
        return collections.Counter(instance for instance, _epoch, what, _ns in lines if what == "start")

    def etcd_values(self, prefix: str) -> dict[str, Any]:
        """Ground truth: key → value below `prefix`, read from etcd itself by a quorum."""
        end = prefix[:-1] + chr(ord(prefix[-1]) + 1)
        ask = {"key": base64.b64encode(prefix.encode()).decode(), "range_end": base64.b64encode(end.encode()).decode()}
        for member in self.members:
            answer = self.ask(f"{member.url}/v3/kv/range", "POST", ask, timeout_s=3)
            if answer.status == 200:
                return {
                    base64.b64decode(kv["key"]).decode(): json.loads(base64.b64decode(kv.get("value", "")) or b"null")
                    for kv in answer.body.get("kvs", ())
                }
        raise NotReady("no member of etcd answers")


def _answer(request: urllib.request.Request, timeout_s: float) -> Answer:
    try:
        with urllib.request.urlopen(request, timeout=timeout_s) as reply:  # noqa: S310 (our own server)
            return Answer(reply.status, _decoded(reply.read()))
    except urllib.error.HTTPError as error:
        with error:
            return Answer(error.code, _decoded(error.read()))
    except (OSError, http.client.HTTPException) as error:
        return Answer(0, repr(error))


def _decoded(raw: bytes) -> Any:
    try:
        return json.loads(raw)
    except ValueError:
        return raw.decode("utf-8", "replace")


def names(members: int = 3, controllers: int = 3, more: Sequence[str] = ()) -> list[str]:
    """The hosts of such a cloud."""
    etcds = [f"e{number}" for number in range(1, members + 1)]
    return [*etcds, *(f"c{number}" for number in range(1, controllers + 1)), "r1", "n1", "load", *more]


@contextlib.contextmanager
def running(
    *,
    members: int = 3,
    controllers: int = 3,
    nodes: int = 0,
    more: Sequence[str] = (),
    tap: bool = False,
    env: Mapping[str, str] | None = None,
    through: Sequence[str] = (),
) -> Iterator[Cloud]:
    """A cloud that is ready, with a template and its nodes joined; data on a disk, gone at the end. `env` is for the
    controllers, `more` are further hosts, `through` the URLs that nodes use instead of the controllers'."""
    directory = Path(tempfile.mkdtemp(prefix="covey-lab-", dir="/var/tmp"))
    try:
        with netlab.Lab(names(members, controllers, more), tap=tap) as lab:
            cloud = Cloud(lab, directory)
            cloud.start_etcd([f"e{number}" for number in range(1, members + 1)])
            cloud.start_registry("r1")
            for number in range(1, controllers + 1):
                cloud.start_controller(f"c{number}", **(env or {}))
            cloud.wait_all_ready()
            cloud.push_template()
            if nodes:
                cloud.start_nodes("n1", nodes, through)
            if nodes and not through:
                cloud.wait_nodes(nodes)
            yield cloud
    finally:
        shutil.rmtree(directory, ignore_errors=True)
