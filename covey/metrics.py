"""Figures for Prometheus: a page on a port of its own, so that it is neither balanced nor reachable where users are.

Controller and registry share it; what there is to tell they gather themselves when they are asked.
"""

from collections.abc import Awaitable, Callable, Iterable

import prometheus_client
from aiohttp import web
from prometheus_client import core, exposition, registry

from covey import gate, serve, server, settings, world

Collect = Callable[[], Awaitable[Iterable[core.Metric]]]


class Page:
    """start → (answers by itself) → stop."""

    def __init__(self, wanted: settings.Metrics, collect: Collect, world: world.World) -> None:
        self._wanted = wanted
        self._collect = collect
        route = serve.Route("GET", wanted.path, self._answer, lane=gate.Lane.OPEN)
        self._server = server.Server([route], world=world)

    async def start(self, host: str) -> None:
        """Raises SettingError when the port is taken."""
        await self._server.start(host, self._wanted.port)

    @property
    def port(self) -> int:
        return self._server.port

    async def stop(self) -> None:
        await self._server.drain(0.5)

    async def _answer(self, _call: serve.Call) -> web.Response:
        told = prometheus_client.CollectorRegistry(auto_describe=False)
        told.register(_Gathered(await self._collect()))
        text = exposition.generate_latest(told)
        return web.Response(body=text, headers={"Content-Type": prometheus_client.CONTENT_TYPE_PLAIN_0_0_4})


class _Gathered(registry.Collector):
    def __init__(self, families: Iterable[core.Metric]) -> None:
        self._families = families

    def collect(self) -> Iterable[core.Metric]:
        return self._families
