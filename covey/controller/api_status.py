"""/livez, /readyz and /api/v1/status (safety S25)."""

from collections.abc import Callable, Sequence

import msgspec

import covey
from covey import errors, gate, serve, world
from covey.controller import shared, templates
from covey.store import mirror

_WATCHED_NS = 30_000_000_000  # the slowest usual probe asks each 10 s


class Status(msgspec.Struct, frozen=True, kw_only=True):
    """Clients compare `status` and `registry_status` with exactly these words; `license` only tells what is enabled."""

    status: str
    version: str
    registry_address: str
    registry_status: str
    license: str = "enterprise plus"


class Ready(msgspec.Struct, frozen=True, kw_only=True):
    """Body of a green /readyz: `troubles` are those under which reads and most writes go on."""

    version: str
    revision: int
    troubles: list[str]


class StatusApi:
    """`trouble` says why this controller cannot serve ("" when it can), `lesser` what is wrong besides."""

    def __init__(
        self,
        mirror: mirror.Mirror,
        templates: templates.Templates,
        registry: str,
        trouble: Callable[[], str],
        lesser: Callable[[], list[str]],
        world: world.World,
    ) -> None:
        self._world = world
        self._mirror = mirror
        self._templates = templates
        self._registry = registry
        self._trouble = trouble
        self._lesser = lesser
        self._asked_ns: int | None = None
        self._registry_runs: shared.Shared[str, bool] = shared.Shared(lambda _: templates.running())

    async def close(self) -> None:
        await self._registry_runs.close()

    def probes(self) -> Sequence[serve.Route]:
        """Those that answer also while this controller is red."""
        return [
            serve.Route("GET", "/livez", self.live, lane=gate.Lane.OPEN),
            serve.Route("GET", "/readyz", self.ready, lane=gate.Lane.OPEN),
        ]

    def routes(self) -> Sequence[serve.Route]:
        return [serve.Route("GET", "/api/v1/status", self.status)]

    async def live(self, _call: serve.Call) -> None:
        """The process turns its loop: nothing more, or a store's outage would get controllers restarted."""

    @property
    def watched(self) -> bool:
        """Whether somebody looks at /readyz, as balancers do: they must see it red before this controller goes."""
        return self._asked_ns is not None and self._world.boot_ns() - self._asked_ns < _WATCHED_NS

    async def ready(self, call: serve.Call) -> Ready:
        self._asked_ns = self._world.boot_ns()
        if call.draining.is_set():
            raise errors.Unavailable("this controller is going down")
        trouble = self._trouble()
        if trouble:
            raise errors.Unavailable(trouble)
        return Ready(version=covey.__version__, revision=self._mirror.revision, troubles=self._lesser())

    async def status(self, _call: serve.Call) -> Status:
        await self._mirror.fresh()
        runs = await self._registry_runs.get("")
        return Status(
            status="Running",
            version=covey.__version__,
            registry_address=self._registry,
            registry_status="Running" if runs else "FAIL",
        )
