"""What people and CI systems do, at random: start, repeat, end, look, drain, remove.

Each client is a host of its own and speaks HTTP with the product's client: with fail-over over all controllers when it
wants something done, and to one controller of its choice when it looks, so that each answer can be judged against what
was true at that moment.
"""

import asyncio
import base64
import random
from collections.abc import Sequence
from typing import Any

from covey import errors
from covey.client import http
from tests.sim import clockwork, network, replica, truth

_TIMEOUT_S = 12.0
_AT_ONCE = 0.2  # of the starts that may be repeated are sent to every controller at once


class Client:
    """One client. Everything is drawn from `chance`."""

    def __init__(
        self,
        name: str,
        world: clockwork.World,
        net: network.Net,
        replicas: Sequence[replica.Replica],
        judge: truth.Truth,
    ) -> None:
        self.name = name
        self.varied = False  # its VMs have sizes and scripts
        self._world = world
        self._chance = random.Random(f"{world.seed} {name}")
        self._judge = judge
        self._replicas = replicas
        self._all = http.Endpoints([one.url for one in replicas], exchange=net.exchange(name))
        self._each = [http.Endpoints([one.url], exchange=net.exchange(name)) for one in replicas]

    # ---- starts ----------------------------------------------------------------------------------------------------

    async def start_at(self, controller: str) -> None:
        """One start without key, at this controller; repeats of it may come to others."""
        at = next(way for way, one in zip(self._each, self._replicas, strict=True) if one.name == controller)
        await self.start((), at)

    async def start(self, nodes: Sequence[str], at: http.Endpoints | None = None) -> None:
        """One start, repeated a few times where that is harmless."""
        chance = self._chance
        tag, kind = self._world.token(), chance.choice(("twin", "once") if at else ("key", "key", "twin", "once"))
        ask = truth.Ask(count=chance.choice((1, 1, 1, 2, 5)), key=tag if kind == "key" else "", twin=kind == "twin")
        self._judge.asks[tag] = ask
        body: dict[str, Any] = {
            "vmid": chance.choice(replica.TEMPLATES),
            "count": ask.count,
            "priority": chance.choice((1, 1000)),
            "metadata": {"ask": tag},
        }
        if ask.twin:
            body |= {"external_id": tag, "name": "twin"}
        if self.varied:
            body |= self._varieties()
        if nodes and chance.random() < 0.1:
            body["node_id"] = chance.choice(nodes)
        if kind != "once" and at is None and chance.random() < _AT_ONCE:
            await asyncio.gather(*(self._send_start(tag, ask, body, way) for way in self._each))
        for _ in range(1 if kind == "once" else chance.choice((1, 2, 4))):
            if await self._send_start(tag, ask, body, at) and chance.random() < 0.6:
                return
            at = None
            await asyncio.sleep(chance.uniform(0.0, 5.0))

    def _varieties(self) -> dict[str, Any]:
        """A size, and a start script."""
        chance = self._chance
        body: dict[str, Any] = {"vcpu": chance.choice((0, 1, 2, 4)), "vram": chance.choice((0, 1024, 4096, 8192))}
        if chance.random() < 0.5:
            text = chance.choice(("echo well", "sleep 2; echo well", "sleep 10", "exit 1", "sleep 40", "poweroff"))
            body |= {
                "startup_script": base64.b64encode(text.encode()).decode(),
                "script_monitoring": chance.random() < 0.7,
                "script_fail_handler": chance.choice((0, 1, truth.DELETE)),
                "script_timeout": 30,
            }
        return body

    async def _send_start(
        self, tag: str, ask: truth.Ask, body: dict[str, Any], at: http.Endpoints | None = None
    ) -> bool:
        """Whether it was answered OK. `at`: by which controllers; else one of its choice, or all if it is harmless."""
        headers = {"Idempotency-Key": ask.key} if ask.key else {}
        again = bool(ask.key or ask.twin)
        index = self._each.index(at) if at else self._chance.randrange(len(self._each))
        way = at or (self._all if again else self._each[index])
        process, restores = self._replicas[index].process, self._judge.restores
        try:
            ids = await way.ask(
                "POST", "/api/v1/vm", list[str], body, headers=headers, repeatable=again, timeout_s=_TIMEOUT_S
            )
        except errors.Refused:
            return False
        except errors.RemoteError as error:
            same = process is self._replicas[index].process and restores == self._judge.restores
            if not again and error.status == 503 and same:
                ask.unsure_by, ask.unsure_at_s = process, asyncio.get_running_loop().time()
                self._judge.counts["starts not known"] += 1
            return False
        self._judge.answered(tag, ids)
        for id in ids:
            if self._chance.random() < 0.5:
                await self.look(id)
        return True

    # ---- ends ------------------------------------------------------------------------------------------------------

    async def terminate(self, id: str) -> bool:
        """Whether it was answered OK."""
        self._judge.terminate_asked.add(id)
        restores = self._judge.restores
        try:
            await self._all.ask("DELETE", "/api/v1/vm", type(None), {"id": id}, timeout_s=_TIMEOUT_S)
        except errors.NotFound:
            if id in self._judge.accepted and restores == self._judge.restores:
                self._judge.fail(f"I1: {id} was accepted and is not found")
            return True
        except (errors.RemoteError, errors.Refused):
            return False
        self._judge.counts["terminations answered"] += 1
        await self.look(id)
        return True

    # ---- looks -----------------------------------------------------------------------------------------------------

    async def look(self, id: str) -> None:
        """Ask one controller for one instance."""
        index, sent_at = self._chance.randrange(len(self._each)), self._judge.revision
        try:
            found = await self._each[index].ask(
                "GET", f"/api/v1/vm?id={id}", dict[str, Any], repeatable=False, timeout_s=_TIMEOUT_S
            )
        except errors.NotFound:
            self._judge.shown(self._replicas[index].name, id, None, sent_at)
        except (errors.RemoteError, errors.Refused):
            return
        else:
            self._judge.shown(self._replicas[index].name, id, str(found["instance_state"]), sent_at)

    async def list(self) -> None:
        index, sent_at = self._chance.randrange(len(self._each)), self._judge.revision
        try:
            found = await self._each[index].ask(
                "GET", "/api/v1/vm", list[dict[str, Any]], repeatable=False, timeout_s=_TIMEOUT_S
            )
        except (errors.RemoteError, errors.Refused):
            return
        self._judge.listed(self._replicas[index].name, [one["instance_id"] for one in found], sent_at)

    # ---- operators -------------------------------------------------------------------------------------------------

    async def drain(self, node: str, drain: bool) -> bool:
        body = {"node_id": node, "drain_mode": drain}
        return await self._do("POST", "/api/v1/node/config", body)

    async def count_sizes(self, node: str) -> bool:
        return await self._do("POST", "/api/v1/node/config", {"node_id": node, "capacity_mode": "resource"})

    async def remove(self, node: str) -> bool:
        return await self._do("DELETE", "/api/v1/node", {"node_id": node})

    async def _do(self, method: str, path: str, body: dict[str, Any]) -> bool:
        try:
            await self._all.ask(method, path, type(None), body, timeout_s=_TIMEOUT_S)
        except (errors.RemoteError, errors.Refused):
            return False
        return True
