"""Open-loop load on a cloud's API: so many requests a second, whatever becomes of the earlier ones, each written down.

    with open_load.running(cloud, url, label="kill", mix=(Kind.GET, Kind.KEYED)) as load:
        load.wait(1.0)                       # a quiet time before the trouble
        cloud.controllers[0].kill()
        load.wait(5.0)
    figures = load.figures(Kind.GET)         # failed, slow, longest
    load.settle()                            # repeats starts that got no answer, with their keys, as a client does
    load.assert_exactly_once()               # by etcd's own word

A request has a connection of its own, so that nothing is repeated behind our back by a client's connection pool. The
load runs in a thread on the lab's host `load`.
"""

import asyncio
import collections
import itertools
import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, NamedTuple

import aiohttp

from tests.support import lab_cloud

CLIENT_S = 10.0  # a client's own patience, as that of the CI plugins


class Kind(StrEnum):
    GET = "GET"
    KEYED = "POST with key"
    KEYLESS = "POST without key"


MIXED = (Kind.GET, Kind.GET, Kind.KEYED, Kind.GET, Kind.GET, Kind.GET, Kind.KEYLESS, Kind.GET)


class Shot(NamedTuple):
    """One request. `at_s` counts from the load's begin; `status` 0: no answer, `said` tells why."""

    kind: Kind
    name: str
    at_s: float
    took_s: float
    status: int
    said: Any

    @property
    def ok(self) -> bool:
        return self.status == 200 and isinstance(self.said, dict) and self.said.get("status") == "OK"


class Figures(NamedTuple):
    """`stall_s`: the longest time without a success."""

    sent: int
    failed: int
    slow: int  # over 0.3 s
    very_slow: int  # over 1.5 s
    longest_s: float
    stall_s: float


@dataclass
class Load:
    """Requests to `url`, one every 1/`rate` s, of the kinds in `mix` by turns."""

    cloud: lab_cloud.Cloud
    url: str
    label: str
    mix: Sequence[Kind]
    rate: float
    shots: list[Shot] = field(default_factory=list)
    patience_s: float = CLIENT_S
    fault_at_s: float = 0.0
    fault_has_come_s: float = 0.0  # when it had come for certain
    _ending: threading.Event = field(default_factory=threading.Event)
    _begun: float = field(default_factory=time.monotonic)

    # ---- while it runs ---------------------------------------------------------------------------------------------

    def wait(self, seconds: float) -> None:
        """Let the load run on."""
        self._ending.wait(seconds)

    @property
    def now_s(self) -> float:
        return time.monotonic() - self._begun

    def end(self) -> None:
        self._ending.set()

    def shoot(self) -> None:
        """Everything, in the thread of the host `load`."""
        asyncio.run(self._shoot())

    async def _shoot(self) -> None:
        self._begun = time.monotonic()
        timeout = aiohttp.ClientTimeout(total=self.patience_s)
        connector = aiohttp.TCPConnector(force_close=True, limit=0)
        async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session, asyncio.TaskGroup() as group:
            for number, kind in enumerate(itertools.cycle(self.mix)):
                await asyncio.sleep(max(0.0, number / self.rate - self.now_s))
                if self._ending.is_set():
                    return
                group.create_task(self._one(session, kind, f"{self.label}-{number}"))

    async def _one(self, session: aiohttp.ClientSession, kind: Kind, name: str) -> None:
        at_s = self.now_s
        method, path, body, headers = self._request(kind, name)
        status, said = 0, ""
        try:
            async with session.request(method, self.url + path, data=body, headers=headers) as reply:
                text = await reply.text()
                status = reply.status
                said = json.loads(text) if text.startswith("{") else text[:200]
        except (aiohttp.ClientError, OSError, TimeoutError, ValueError) as error:
            said = repr(error)
        self.shots.append(Shot(kind, name, at_s, self.now_s - at_s, status, said))

    def _request(self, kind: Kind, name: str) -> tuple[str, str, bytes | None, dict[str, str]]:
        if kind is Kind.GET:
            return "GET", ("/api/v1/node", "/api/v1/status")[len(self.shots) % 2], None, {}
        headers = {"Idempotency-Key": name} if kind is Kind.KEYED else {}
        return "POST", "/api/v1/vm", json.dumps({"vmid": self.cloud.template, "name": name}).encode(), headers

    # ---- afterwards ------------------------------------------------------------------------------------------------

    def of(self, kind: Kind) -> list[Shot]:
        return [shot for shot in self.shots if shot.kind is kind]

    def failed(self, kind: Kind) -> list[Shot]:
        return [shot for shot in self.of(kind) if not shot.ok]

    def figures(self, kind: Kind) -> Figures:
        shots = self.of(kind)
        done = sorted([0.0, *(shot.at_s + shot.took_s for shot in shots if shot.ok)])
        return Figures(
            sent=len(shots),
            failed=len(self.failed(kind)),
            slow=sum(shot.took_s > 0.3 for shot in shots),
            very_slow=sum(shot.took_s > 1.5 for shot in shots),
            longest_s=max(shot.took_s for shot in shots),
            stall_s=max((later - earlier for earlier, later in itertools.pairwise(done)), default=0.0),
        )

    def resumed_s(self, kind: Kind) -> float:
        """How long after the fault's begin the longest time without a success of `kind` ended."""
        done = sorted(shot.at_s + shot.took_s for shot in self.of(kind) if shot.ok)
        pairs = [(earlier, later) for earlier, later in itertools.pairwise(done) if later > self.fault_at_s]
        return max(pairs, key=lambda pair: pair[1] - pair[0])[1] - self.fault_at_s

    def noise_s(self) -> float:
        """The slowest request that the fault had no part in: what this machine adds by itself, being busy."""
        calm = [shot for shot in self.shots if not -1 < shot.at_s - self.fault_at_s < 3]
        calm += [shot for shot in self.shots if shot.at_s + shot.took_s < self.fault_at_s]
        return max((shot.took_s for shot in calm), default=0.0)

    def in_flight_at_fault(self, shot: Shot) -> bool:
        """Whether it may have been on its way when the fault began (1 s of grace for what came before its notice)."""
        return shot.at_s < max(self.fault_at_s, self.fault_has_come_s) + 1

    def settle(self) -> None:
        """Repeat each start with a key that got no answer, with its key, until one comes: it succeeds."""
        for shot in self.failed(Kind.KEYED):
            body = {"vmid": self.cloud.template, "name": shot.name}

            def again(shot: Shot = shot, body: dict[str, str] = body) -> lab_cloud.Answer | None:
                answer = self.cloud.ask(
                    f"{self.url}/api/v1/vm", "POST", body, headers={"Idempotency-Key": shot.name}, timeout_s=CLIENT_S
                )
                return answer if answer.status == 200 else None

            answer = self.cloud.until(again, 60, f"the repeat of {shot}")
            assert answer is not None
            assert answer.body["status"] == "OK", answer
            self.shots[self.shots.index(shot)] = shot._replace(status=answer.status, said=answer.body)

    def assert_exactly_once(self) -> None:
        """Every start with a key is one instance, every one without is at most one and exactly one when it was
        answered OK; each instance becomes one VM, whose guest was started once, with one claim."""
        answered = {shot.name: shot.said["body"] for shot in self.shots if shot.kind is not Kind.GET and shot.ok}
        sent = {shot.name for shot in self.shots if shot.kind is not Kind.GET}
        made = collections.defaultdict[str, list[str]](list)
        for instance in self.cloud.etcd_values("/covey/instance/").values():
            if instance.get("name") in sent:
                made[instance["name"]].append(instance["id"])
        assert {name: ids for name, ids in made.items() if len(ids) > 1} == {}
        assert {name: ids for name, ids in answered.items() if made[name] != ids} == {}
        ids = [id for each in made.values() for id in each]
        try:
            self.cloud.until(lambda: not self._unsettled(ids), 60, "every instance is Started and holds one claim")
        except lab_cloud.NotReady as error:
            doubtful = self._unsettled(ids)
            raise AssertionError(f"{error}; {len(doubtful)} of {len(ids)} not: {doubtful[:3]}") from None
        starts = self.cloud.guest_starts()
        assert {id: starts[id] for id in ids if starts[id] != 1} == {}

    def _unsettled(self, ids: Sequence[str]) -> list[str]:
        """A placement that was withdrawn leaves a claim for a while, until its node says that nothing is there."""
        instances = self.cloud.etcd_values("/covey/instance/")
        claims = collections.Counter(
            claim["instance"]
            for ledger in self.cloud.etcd_values("/covey/ledger/").values()
            for claim in ledger.get("claims", ())
        )
        stands = [(id, instances.get(f"/covey/instance/{id}", {}), claims[id]) for id in ids]
        return [
            f"{id} {noun.get('state')} epoch {noun.get('epoch')} on {noun.get('node')} with {held} claims: "
            f"{noun.get('message', '')}"
            for id, noun, held in stands
            if noun.get("state") != "Started" or held != 1
        ]


@contextmanager
def running(
    cloud: lab_cloud.Cloud,
    url: str,
    *,
    label: str,
    mix: Sequence[Kind] = (Kind.GET,),
    rate: float = 40.0,
    patience_s: float = CLIENT_S,
) -> Iterator[Load]:
    """The load runs while the context is open; its end waits for the last answers."""
    load = Load(cloud, url, label, mix, rate, patience_s=patience_s)
    finished: Callable[[], None] = cloud.lab["load"].calling(load.shoot)
    try:
        yield load
    finally:
        load.end()
        finished()
