"""/api/v1/health: the cloud at a glance, as this controller sees it, with a remedy for each trouble.

It answers at any time, also while this controller is red, and then says what it knew last: whoever asks for health must
not wait behind what is ill. So nothing here waits for the store. etcd's members and the registries are asked side by
side, each within a second and a half, by one who asks for all; what they said is told again for a second. What it
means is judged elsewhere (`decide.troubles`).
"""

import asyncio
import heapq
import itertools
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Generic, NamedTuple, TypeVar

import msgspec

import covey
from covey import errors, gate, model, serve
from covey import world as worlds
from covey.client import http, oci
from covey.controller import display, etcd_health, views, waiting
from covey.decide import troubles
from covey.store import commit, mirror, schema, view

T = TypeVar("T")

_AGAIN_NS = 1_000_000_000
_CERTIFICATES_NS = 600 * 1_000_000_000
_AILING_MOST = 100
_TIGHTEST = 3
_NS = 1e9


class RegistryStatus(msgspec.Struct, frozen=True, kw_only=True):
    """What a registry says at /registry/status."""

    version: str = ""
    disk: oci.DiskView = oci.DiskView(total=0, free=0)
    trouble: str = ""


class _Kept(NamedTuple, Generic[T]):
    told: T
    at_ns: int


class Recent(Generic[T]):
    """What was said last, asked for anew when that is more than a second (or `again_ns`) ago; one question for all who
    ask."""

    def __init__(self, ask: Callable[[], Awaitable[T]], now_ns: Callable[[], int], again_ns: int = _AGAIN_NS) -> None:
        self._ask = ask
        self._now_ns = now_ns
        self._again_ns = again_ns
        self._kept: _Kept[T] | None = None
        self._asking: asyncio.Task[T] | None = None

    async def get(self) -> T:
        if self._kept is not None and self._now_ns() - self._kept.at_ns < self._again_ns:
            return self._kept.told
        if self._asking is None or self._asking.done():
            self._asking = asyncio.create_task(self._renew())
        return await asyncio.shield(self._asking)

    async def close(self) -> None:
        if self._asking is not None:
            self._asking.cancel()
            await asyncio.gather(self._asking, return_exceptions=True)

    async def _renew(self) -> T:
        told = await self._ask()
        self._kept = _Kept(told, self._now_ns())
        return told


class Registries:
    """Each of them by itself: that another one would answer in its place is no sign of its health."""

    def __init__(self, urls: Sequence[str], exchange: http.Exchange | None = None, ca_cert: Path | None = None) -> None:
        limit_s = etcd_health.ASK_S
        self._each = {
            url: http.Endpoints((url,), timeout_s=limit_s, connect_s=limit_s, exchange=exchange, ca_cert=ca_cert)
            for url in dict.fromkeys(urls)
        }

    async def look(self) -> list[troubles.Registry]:
        return list(await asyncio.gather(*(_registry(url, one) for url, one in self._each.items())))

    async def close(self) -> None:
        for one in self._each.values():
            await one.close()


async def _registry(url: str, endpoints: http.Endpoints) -> troubles.Registry:
    try:
        async with asyncio.timeout(etcd_health.ASK_S):
            said = await endpoints.ask("GET", "/registry/status", RegistryStatus)
    except TimeoutError:
        return troubles.Registry(url=url, trouble=f"no answer within {etcd_health.ASK_S:g} s")
    except errors.CoveyError as error:
        return troubles.Registry(url=url, trouble=str(error).removeprefix(f"{url}: "))
    return troubles.Registry(
        url=url,
        answers=True,
        version=said.version,
        total_bytes=said.disk.total,
        free_bytes=said.disk.free,
        trouble=said.trouble,
    )


class Parts(NamedTuple):
    """What of a controller is looked at. `trouble`: why it cannot serve; `silent_s`: since when a node was not heard of
    (None: never)."""

    me: str
    world: worlds.World
    mirror: mirror.Mirror
    writer: commit.Writer
    waiting: waiting.Waiting
    display: display.Display
    trouble: Callable[[], str]
    silent_s: Callable[[model.NodeId], float | None]


class HealthApi:
    """`settings`: what this controller goes by, without secrets. `backup` tells of the last scheduled one; None when
    there are none."""

    def __init__(
        self,
        parts: Parts,
        members: etcd_health.Members,
        registries: Registries,
        settings: Mapping[str, object],
        backup: Callable[[], Awaitable[troubles.Backup | None]] | None = None,
        certificates: Callable[[], Awaitable[list[troubles.Certificate]]] | None = None,
    ) -> None:
        self._parts = parts
        self._settings = settings
        self._registries = registries
        now_ns = parts.world.boot_ns
        self._members = Recent(members.look, now_ns)
        self._storages = Recent(registries.look, now_ns)
        self._backup = Recent(backup or _none, now_ns)
        self._certificates = Recent(certificates or _none_at_all, now_ns, _CERTIFICATES_NS)
        self._whole = Recent(self._look, now_ns)

    async def close(self) -> None:
        for part in (
            *(self._whole, self._members, self._storages, self._backup, self._certificates),
            self._registries,
        ):
            await part.close()

    def routes(self) -> Sequence[serve.Route]:
        """They answer also while this controller is red."""
        return [
            serve.Route("GET", "/api/v1/health", self.health, lane=gate.Lane.OPEN),
            serve.Route("GET", "/api/v1/settings", self.settings, lane=gate.Lane.OPEN),
        ]

    async def health(self, _call: serve.Call) -> troubles.Health:
        return await self.now()

    async def now(self) -> troubles.Health:
        """As it was within the last second."""
        return await self._whole.get()

    async def settings(self, _call: serve.Call) -> Mapping[str, object]:
        return self._settings

    async def _look(self) -> troubles.Health:
        (etcd, alarms), registries, backup, certificates = await asyncio.gather(
            self._members.get(),
            self._storages.get(),
            etcd_health.within(self._backup.get(), None),
            etcd_health.within(self._certificates.get(), []),
        )
        health = msgspec.structs.replace(
            cloud(self._parts),
            etcd=etcd,
            alarms=alarms,
            registries=registries,
            backup=backup,
            certificates=certificates,
        )
        return msgspec.structs.replace(health, troubles=troubles.judge(health))


async def _none() -> None:
    return None


async def _none_at_all() -> list[troubles.Certificate]:
    return []


def cloud(parts: Parts) -> troubles.Health:
    """What this process knows by itself, as of now."""
    snapshot, shown = parts.mirror.snapshot(), parts.display.of(parts.mirror.snapshot())
    states = Counter[str](dict.fromkeys(model.NodeState, 0))
    agents = Counter[str]()
    nodes: list[troubles.Node] = []
    for kept in snapshot.nodes():
        state = views.node_state(kept.noun, shown)
        session = snapshot.session(kept.noun.id)
        states[state] += 1
        agents[session.noun.facts.agent_version if session else ""] += 1
        nodes.append(_node(snapshot, kept.noun, parts, offline=state == model.NodeState.OFFLINE))
    ailing = itertools.islice(filter(troubles.ails, nodes), _AILING_MOST)
    told = [node for node in nodes if node.disk_bytes and node.free_disk_bytes]
    counts = {state: snapshot.instance_count(state) for state in model.State}
    broken = parts.mirror.broken
    return troubles.Health(
        version=covey.__version__,
        format=snapshot.format or schema.FORMAT,
        why=parts.trouble(),
        controllers=sorted(
            (_controller(kept.noun, parts.me) for kept in snapshot.controllers()), key=lambda one: (one.url, one.id)
        ),
        nodes={state: number for state, number in states.items() if number},
        agents={version or "unknown": number for version, number in agents.items()},
        ailing=sorted(ailing, key=lambda one: one.name),
        tightest=heapq.nsmallest(_TIGHTEST, told, key=lambda one: (one.free_disk_bytes / one.disk_bytes, one.name)),
        instances={state: number for state, number in counts.items() if number},
        queue=_queue(snapshot, parts),
        unsure=_unsure(parts),
        copy=troubles.Copy(
            revision=snapshot.revision,
            lag_s=round(parts.mirror.lag_ns / _NS, 3),
            broken=len(broken),
            example=min(broken, default=""),
        ),
    )


def _controller(noun: schema.Controller, me: str) -> troubles.Controller:
    return troubles.Controller(
        id=noun.id,
        url=noun.url,
        version=noun.version,
        format=noun.format,
        started=views.date(noun.started_ns),
        me=noun.id == me,
    )


def _node(snapshot: view.Snapshot, noun: model.Node, parts: Parts, *, offline: bool) -> troubles.Node:
    session, word, ledger = snapshot.session(noun.id), snapshot.word(noun.id), snapshot.ledger(noun.id)
    return troubles.Node(
        id=noun.id,
        name=noun.name or (session.noun.facts.name if session else "") or noun.id,
        offline=offline,
        held=snapshot.held(noun.id),
        silent_s=int((parts.silent_s(noun.id) or 0) if offline else 0),
        vms=len(ledger.noun.claims) if ledger else 0,
        trouble=word.noun.trouble if word else "",
        disk_bytes=max(session.noun.facts.disk_bytes, 0) if session else 0,
        free_disk_bytes=max(word.noun.free_disk_bytes, 0) if word else 0,
    )


def _queue(snapshot: view.Snapshot, parts: Parts) -> troubles.Queue:
    oldest = min((kept.noun for kept in snapshot.waiting()), key=lambda noun: (noun.created_ns, noun.id), default=None)
    if oldest is None:
        return troubles.Queue()
    return troubles.Queue(
        waiting=snapshot.waiting_count(),
        instance=oldest.id,
        template=oldest.spec.template_name or oldest.spec.template,
        waits_s=max(int((parts.world.wall_ns() - oldest.created_ns) / _NS), 0),  # for display, as all stored times
        why=parts.waiting.why(snapshot, oldest.id),
    )


def _unsure(parts: Parts) -> troubles.Unsure:
    since = parts.writer.unsure.values()
    oldest_s = (parts.world.boot_ns() - min(since)) / _NS if since else 0.0
    return troubles.Unsure(open=len(since), oldest_s=round(oldest_s, 1))
