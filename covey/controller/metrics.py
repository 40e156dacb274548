"""What a controller tells Prometheus (ENABLE_METRICS): the cloud as it sees it, and what it has served itself.

Everything but the counters comes from what /api/v1/health knows, gathered at most once a second; a scrape costs one
linearizable read of etcd, which is timed, and a request two additions. Names begin with ``covey_controller_``; each is
in docs/operate/controllers.md.
"""

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping

from prometheus_client import core

from covey import model, serve, server
from covey import world as worlds
from covey.controller import etcd_health
from covey.decide import troubles
from covey.store import base, schema

_OTHER = ("other", "other")


class Requests:
    """Counts by method, path and status. Only paths of routes are told apart: others may be any text."""

    def __init__(self, routes: Iterable[serve.Route]) -> None:
        self._known = {(route.method, route.path) for route in routes}
        self._answered = Counter[tuple[tuple[str, str], int]]()
        self._seconds: dict[tuple[str, str], float] = {}

    def served(self, one: server.Served) -> None:
        where = (one.method, one.path)
        if where not in self._known:
            where = _OTHER
        self._answered[where, one.status] += 1
        self._seconds[where] = self._seconds.get(where, 0.0) + one.took_s

    def families(self) -> Iterator[core.Metric]:
        requests = core.CounterMetricFamily(
            "covey_controller_requests", "Requests answered.", labels=["method", "path", "status"]
        )
        for ((method, path), status), count in sorted(self._answered.items()):
            requests.add_metric([method, path, str(status)], count)
        yield requests
        seconds = core.CounterMetricFamily(
            "covey_controller_request_seconds",
            "Time from requests' first line to their answer's last byte, parked polls included.",
            labels=["method", "path"],
        )
        for (method, path), took_s in sorted(self._seconds.items()):
            seconds.add_metric([method, path], took_s)
        yield seconds


class Figures:
    """Gathers what a scrape is answered with. `connections`: how many are open now."""

    def __init__(
        self,
        store: base.Store,
        world: worlds.World,
        requests: Requests,
        health: Callable[[], Awaitable[troubles.Health]],
        connections: Callable[[], int],
    ) -> None:
        self._store = store
        self._world = world
        self._requests = requests
        self._health = health
        self._connections = connections

    async def collect(self) -> list[core.Metric]:
        health, read_s = await asyncio.gather(self._health(), self._timed_read())
        return [
            *self._requests.families(),
            _gauge("connections", "Open connections.", self._connections()),
            _gauge("tasks", "Tasks of the event loop.", len(asyncio.all_tasks())),
            _gauge("etcd_read_seconds", "How long a linearizable read took just now; NaN: it failed.", read_s),
            *_of_cloud(health),
            *_of_members(health.etcd),
        ]

    async def _timed_read(self) -> float:
        begun_ns = self._world.boot_ns()
        if await etcd_health.within(self._store.range(schema.FORMAT_KEY), None) is None:
            return float("nan")
        return (self._world.boot_ns() - begun_ns) / 1e9


def _of_cloud(health: troubles.Health) -> Iterator[core.Metric]:
    yield _gauge("ready", "1 when this controller can serve.", int(not health.why))
    yield _by("instances", "Instances by state.", "state", {str(state): 0 for state in model.State} | health.instances)
    yield _by("nodes", "Nodes by state.", "state", {str(state): 0 for state in model.NodeState} | health.nodes)
    yield _by("agents", "Nodes by the version of their agent.", "version", health.agents)
    yield _gauge("queue_length", "Instances that wait for a node.", health.queue.waiting)
    yield _gauge("queue_oldest_seconds", "How long the oldest of them has waited.", health.queue.waits_s)
    yield _gauge("copy_lag_seconds", "How far this controller's copy is behind the store.", health.copy.lag_s)
    yield _gauge("copy_revision", "The revision that its copy has reached.", health.copy.revision)
    yield _gauge("unsure_writes", "Writes whose outcome is open.", health.unsure.open)
    yield _gauge("unsure_oldest_seconds", "Since when the oldest of them is.", health.unsure.oldest_s)
    yield _gauge("controllers", "Controllers that have announced themselves.", len(health.controllers))
    yield _gauge("registries_answering", "Registries that answer.", sum(one.answers for one in health.registries))
    if health.backup is not None and health.backup.at:
        yield _gauge("backup_age_seconds", "Age of the last scheduled backup of etcd.", health.backup.age_s)
    left = {one.name: one.left_s for one in health.certificates}
    yield _by("certificate_left_seconds", "Until a certificate expires.", "certificate", left)
    kinds = Counter[str](dict.fromkeys(troubles.Kind, 0))
    kinds.update(one.kind for one in health.troubles)
    yield _by("troubles", "What `covey status` complains of, by kind.", "kind", kinds)


def _of_members(members: list[troubles.Member]) -> Iterator[core.Metric]:
    named = [one for one in members if not one.stranger]
    yield _by("etcd_member_up", "1 when the member answers.", "member", {_name(one): int(one.answers) for one in named})
    well = [one for one in named if one.answers]
    yield _by("etcd_member_leads", "1 on the leader.", "member", {_name(one): int(one.leads) for one in well})
    yield _by("etcd_member_behind", "Log entries it lacks.", "member", {_name(one): one.raft_behind for one in well})
    yield _by("etcd_member_size_bytes", "Its database.", "member", {_name(one): one.size_bytes for one in well})
    yield _by("etcd_member_used_bytes", "What is in use of it.", "member", {_name(one): one.used_bytes for one in well})
    quotas = {_name(one): one.quota_bytes for one in well if one.quota_bytes}
    yield _by("etcd_member_quota_bytes", "The most it may become.", "member", quotas)


def _name(member: troubles.Member) -> str:
    return member.name or member.address


def _gauge(name: str, doc: str, value: float) -> core.Metric:
    return core.GaugeMetricFamily(f"covey_controller_{name}", doc, value=value)


def _by(name: str, doc: str, label: str, values: Mapping[str, float]) -> core.Metric:
    family = core.GaugeMetricFamily(f"covey_controller_{name}", doc, labels=[label])
    for key, value in values.items():
        family.add_metric([str(key)], value)
    return family
