"""The clients of the storm: an open loop of starts, each followed by looks and a terminate; one process, one seed.

    python -m tests.storm.load CONFIG.json

Requests begin at their appointed times whether or not earlier ones were answered. Some clients go through the balancer,
others from controller to controller. A start carries an Idempotency-Key, or a name that is recognised, or neither; the
first two kinds are repeated until they are answered, a blind one never. Some clients hang up at once, as one does whose
own time is short, so answers get lost also when nothing is broken. When the file `settle` appears in the folder
the loop has ended and faults are healed: then everything accepted must come to stand, everything is terminated, and
what is left is told in `end.json`.
"""

import asyncio
import contextlib
import itertools
import json
import random
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp

from tests.support import history

_CALL_S = 10.0
_HASTY = 0.15  # the share of clients that hang up on their start while it is carried out
_MOST_STORIES = 1500
_COUNTS = (1, 1, 1, 1, 1, 1, 1, 2, 2, 3)
_KINDS = ("key", "key", "key", "name", "blind")
_SETTLED = ("Started", "Error")


class Clients:
    """All calls go through here and are noted."""

    def __init__(self, config: dict[str, Any], folder: Path) -> None:
        self.config = config
        self.folder = folder
        self.chance = random.Random(config["seed"])
        self.urls: dict[str, str] = config["urls"]
        self.recorder = history.Recorder(folder / "history.jsonl")
        self.known: dict[str, str] = {}  # instance → external id
        self.asked_to_end: set[str] = set()
        self.over = False
        self.counts = {"asked": 0, "accepted": 0, "instances": 0, "terminated": 0, "unknown": 0, "calls": 0, "shed": 0}
        self.errors: dict[str, str] = {}  # instance → message of those that ended in Error
        self._session: aiohttp.ClientSession | None = None
        self._names = itertools.count()

    @contextlib.asynccontextmanager
    async def connected(self) -> AsyncIterator[None]:
        connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=15)
        async with aiohttp.ClientSession(connector=connector) as self._session:
            yield
        self.recorder.close()

    def other(self, *not_these: str) -> str:
        """An endpoint, if possible another one."""
        names = [name for name in self.urls if name not in not_these] or list(self.urls)
        return self.chance.choice(names)

    # ---- calls -----------------------------------------------------------------------------------------------------

    async def call(
        self,
        who: str,
        via: str,
        what: str,
        method: str,
        path: str,
        request: dict[str, Any],
        body: Any = None,
        key: str = "",
        patience_s: float = _CALL_S,
    ) -> dict[str, Any] | None:
        """One call, noted. The envelope of a definite answer (200, OK or FAIL); None: nobody knows."""
        assert self._session is not None
        headers = {"Idempotency-Key": key} if key else {}
        timeout = aiohttp.ClientTimeout(total=patience_s)
        url = self.urls[via] + path
        called = history.now_ns()
        envelope: dict[str, Any] | None = None
        why = ""
        try:
            async with self._session.request(method, url, json=body, headers=headers, timeout=timeout) as reply:
                text = await reply.text()
                if reply.status == 200:
                    envelope = json.loads(text)
                else:
                    why = f"{reply.status} {text[:120]}"
        except (aiohttp.ClientError, TimeoutError, OSError, ValueError) as error:
            why = repr(error)[:160]
        returned = None if envelope is None else history.now_ns()
        answer = {"why": why} if envelope is None else _gist(what, envelope)
        self.recorder.note(history.Call(who, via, what, called, returned, request, answer))
        self.counts["calls"] += 1
        self.counts["unknown"] += envelope is None
        return None if envelope is None else answer

    async def show(self, who: str, via: str, id: str) -> str:
        answer = await self.call(who, via, "show", "GET", f"/api/v1/vm?id={id}", {"id": id})
        if answer is not None and answer["state"] == "Error":
            self.errors.setdefault(id, answer.get("message", ""))
        return "" if answer is None else str(answer["state"])

    async def show_all(self, who: str, via: str) -> dict[str, list[str]] | None:
        answer = await self.call(who, via, "list", "GET", "/api/v1/vm", {})
        if answer is None:
            return None
        for id, message in answer.get("errors", {}).items():
            self.errors.setdefault(id, message)
        vms: dict[str, list[str]] = answer["vms"]
        return vms

    async def terminate(self, who: str, via: str, id: str) -> bool:
        self.asked_to_end.add(id)
        answer = await self.call(who, via, "terminate", "DELETE", "/api/v1/vm", {"id": id}, body={"id": id})
        return answer is not None

    # ---- one story -------------------------------------------------------------------------------------------------

    async def story(self) -> None:
        """Start, look, terminate; each step repeated by another way until it is answered, but a blind start."""
        number = next(self._names)
        chance = random.Random(f"{self.config['seed']} {number}")
        who, kind, count = f"client-{number}", chance.choice(_KINDS), chance.choice(_COUNTS)
        ids = await self._start(who, f"job-{number}", kind, count)
        if not ids:
            return
        self.counts["accepted"] += 1
        self.counts["instances"] += len(ids)
        self.known.update(dict.fromkeys(ids, f"job-{number}"))
        async with asyncio.TaskGroup() as group:
            for id in ids:
                group.create_task(self._live(who, id, chance))

    async def _start(self, who: str, external_id: str, kind: str, count: int) -> list[str]:
        body: dict[str, Any] = {"vmid": self.config["template"], "external_id": external_id, "count": count}
        if kind == "name":
            body["name"] = f"agent of {external_id}"
        key = f"key of {external_id}" if kind == "key" else ""
        request = {"external_id": external_id, "kind": kind, "count": count}
        self.counts["asked"] += 1
        via, pause_s = self.other(), 0.2
        patience_s = self.chance.uniform(0.002, 0.06) if self.chance.random() < _HASTY else _CALL_S
        while True:
            answer = await self.call(who, via, "start", "POST", "/api/v1/vm", request, body, key, patience_s)
            if answer is not None:
                return list(answer.get("ids", ()))
            if kind == "blind":
                return []
            await asyncio.sleep(pause_s)
            via, pause_s, patience_s = self.other(via), min(2 * pause_s, 3.0), _CALL_S

    async def _live(self, who: str, id: str, chance: random.Random) -> None:
        life_s = 0.0 if chance.random() < 0.08 else min(chance.expovariate(1 / 6.0), 30.0)
        if chance.random() < 0.5:
            await self.show(who, self.other(), id)
        while life_s > 0:
            nap_s = min(life_s, chance.uniform(0.5, 3.0))
            await asyncio.sleep(nap_s)
            life_s -= nap_s
            await self.show(who, self.other(), id)
        await self._end(who, id)
        if chance.random() < 0.5:
            await self.show(who, self.other(), id)

    async def _end(self, who: str, id: str) -> None:
        via, pause_s = self.other(), 0.2
        while not await self.terminate(who, via, id):
            await asyncio.sleep(pause_s)
            via, pause_s = self.other(via), min(2 * pause_s, 3.0)
        self.counts["terminated"] += 1

    # ---- the loop --------------------------------------------------------------------------------------------------

    async def work(self) -> None:
        """Stories at their appointed times; then their ends."""
        loop = asyncio.get_running_loop()
        tasks: set[asyncio.Task[None]] = set()
        looking = [
            asyncio.create_task(self._watch(f"lister-{number}", pace_s)) for number, pace_s in ((1, 1.0), (2, 1.7))
        ]
        telling = asyncio.create_task(self._tell())
        end = loop.time() + self.config["seconds"]
        due = loop.time()
        while (due := due + self.chance.expovariate(self.config["starts_s"])) < end:
            await asyncio.sleep(max(0.0, due - loop.time()))
            if len(tasks) >= _MOST_STORIES:
                self.counts["shed"] += 1
                continue
            task = asyncio.create_task(self.story())
            tasks.add(task)
            task.add_done_callback(tasks.discard)
        while not (self.folder / "settle").exists():
            await asyncio.sleep(0.1)
        await self._finish(tasks)
        self.over = True
        await asyncio.gather(*looking)
        await self._settle()
        telling.cancel()

    async def _finish(self, tasks: set[asyncio.Task[None]]) -> None:
        """Everybody's last answers; whoever has none after a minute and a half will never have one."""
        if tasks:
            done, late = await asyncio.wait(set(tasks), timeout=90)
            for task in done:
                task.result()
            for task in late:
                task.cancel()

    async def _watch(self, who: str, pace_s: float) -> None:
        """Lists now and then, in turn from everybody; ends what turned up from starts that were not answered."""
        ending: set[str] = set()
        tasks: list[asyncio.Task[None]] = []
        for via in itertools.cycle(self.urls):
            if self.over:
                break
            for id, (_state, name) in (await self.show_all(who, via) or {}).items():
                if id not in self.known and id not in ending and self._is_blind(name) and who == "lister-1":
                    ending.add(id)
                    tasks.append(asyncio.create_task(self._end(who, id)))
            await asyncio.sleep(pace_s)
        await asyncio.wait(tasks, timeout=30) if tasks else None

    def _is_blind(self, name: str) -> bool:
        """Whether nobody waits for this start's answer any more."""
        return random.Random(f"{self.config['seed']} {name.removeprefix('job-')}").choice(_KINDS) == "blind"

    async def _tell(self) -> None:
        while True:
            told = {**self.counts, "alive": len(self.known.keys() - self.asked_to_end), "errors": len(self.errors)}
            (self.folder / "progress.tmp").write_text(json.dumps(told))
            (self.folder / "progress.tmp").rename(self.folder / "progress.json")
            await asyncio.sleep(1)

    # ---- the end ---------------------------------------------------------------------------------------------------

    async def _settle(self) -> None:
        """A last crowd must come to stand with nobody's help; then all of it ends."""
        who, via = "settler", next(iter(self.urls))
        last = await self._start(who, "job-last", "key", 20)
        self.known.update(dict.fromkeys(last, "job-last"))
        self.counts["instances"] += len(last)
        stuck = await self._until_stands(who, via)
        left = await self._until_gone(who, via)
        nodes = {name: await self._nodes(who, name) for name in self.urls}
        end = {"stuck": stuck, "left": left, "nodes": nodes, "errors": self.errors, **self.counts}
        (self.folder / "end.json").write_text(json.dumps(end))

    async def _until_stands(self, who: str, via: str) -> dict[str, str]:
        """What is neither Started nor Error nor on its way out, in the end."""
        waiting: dict[str, str] = {}
        for _ in range(240):
            vms = await self.show_all(who, via)
            if vms is not None:
                waiting = {
                    id: state for id, (state, _) in vms.items() if state in ("Scheduling", "Pulling", "Terminating")
                }
                if not waiting:
                    return {}
            await asyncio.sleep(0.5)
        return waiting

    async def _until_gone(self, who: str, via: str) -> dict[str, str]:
        left: dict[str, str] = {}
        for turn in range(180):
            vms = await self.show_all(who, via)
            if vms is not None:
                left = {id: state for id, (state, _) in vms.items() if state != "Terminated"}
                if not left:
                    return {}
                if turn % 10 == 0:
                    for id in left:
                        await self.terminate(who, via, id)
            await asyncio.sleep(0.5)
        return left

    async def _nodes(self, who: str, via: str) -> list[Any]:
        answer = await self.call(who, via, "nodes", "GET", "/api/v1/node", {})
        return [] if answer is None else list(answer["nodes"])


def _gist(what: str, envelope: dict[str, Any]) -> dict[str, Any]:
    """What of an answer is worth noting."""
    body: Any = envelope.get("body")
    message = envelope.get("message", "")
    if envelope["status"] != "OK":
        return {"state": "absent"} if message == "Not found" else {"state": f"refused: {message}"}
    if what == "start":
        return {"ids": body}
    if what == "show":
        return {"state": body["instance_state"], "message": body.get("message", ""), "node": body.get("node_id", "")}
    if what == "list":
        vms = {one["instance_id"]: [one["vm"]["instance_state"], one.get("external_id", "")] for one in body}
        bad = {
            one["instance_id"]: one["vm"].get("message", "") for one in body if one["vm"]["instance_state"] == "Error"
        }
        return {"vms": vms, "errors": bad}
    if what == "nodes":
        return {"nodes": [[one["node_name"], one["state"], one["vm_count"], one["capacity"]] for one in body]}
    return {}


async def main(path: Path) -> None:
    config = json.loads(path.read_text())
    clients = Clients(config, path.parent)
    async with clients.connected():
        await clients.work()


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1])))
