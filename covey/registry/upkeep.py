"""What a server does for its storage beside serving: collection, scrub, healing, and the figures it tells.

Every server of a storage does all of it; notes in the storage tell when somebody else was just there, so that together
they do it about once. A fault in it is logged, once, and tried again later; it never ends the server.
"""

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import msgspec

from covey import errors, model, observe, settings, world
from covey.decide import garbage
from covey.registry import blobs, catalog, elsewhere, figures, replica_disk, scrub, standing, sweep

log = observe.log("upkeep")

_LOOK_S = 5.0  # between two looks at the room on the disk
_SURVEY_S = 60.0  # between two looks into trash and quarantine, and at what is due
_LOW_BYTES = 4 << 20  # less than this beside the reserve is no room for a push


class Settings(model.Noun, frozen=True, kw_only=True):
    """How often, how fast, and where lost blobs may be fetched. 0 as a period: never."""

    periods: garbage.Periods = garbage.Periods()
    collect_every_s: float = 3600.0
    scrub_every_s: float = 7 * 24 * 3600.0
    scrub_bytes_per_s: float = 50e6
    heal_from: tuple[str, ...] = ()
    ca_cert: Path | None = None  # believed where those are reached by https


def of(chosen: settings.Registry) -> Settings:
    """As the program's settings say."""
    periods = garbage.Periods(grace_s=chosen.gc_grace_s, trash_s=chosen.gc_trash_s, upload_s=chosen.upload_timeout_s)
    return Settings(
        periods=periods,
        collect_every_s=chosen.gc_every_s,
        scrub_every_s=chosen.scrub_every_s,
        scrub_bytes_per_s=chosen.scrub_mb_per_s * 1e6,
        heal_from=chosen.heal_from,
        ca_cert=chosen.ca_cert,
    )


class Upkeep:
    """start → (works by itself) → stop. `figures` is what was seen last."""

    def __init__(
        self,
        catalog: catalog.Catalog,
        care: blobs.Care,
        log_care: blobs.LogCare,
        world: world.World,
        wanted: Settings,
        *,
        held: replica_disk.ReplicaDisk | None = None,
    ) -> None:
        """`held`: of one of several registries with disks of their own."""
        others = elsewhere.Registries(wanted.heal_from, catalog.blobs, ca_cert=wanted.ca_cert)
        self.figures = figures.Figures()
        self.collector = sweep.Collector(
            catalog, care, log_care, wanted.periods, aside=None if held is None else held.aside
        )
        self.scrub = scrub.Scrub(
            self.collector,
            care,
            world,
            bytes_per_s=wanted.scrub_bytes_per_s,
            elsewhere=others if wanted.heal_from else None,
        )
        self._blobs = catalog.blobs
        self._care = care
        self._world = world
        self._wanted = wanted
        self._replica = held is not None
        self._tasks: list[asyncio.Task[None]] = []
        self._complained: set[str] = set()

    async def start(self) -> None:
        await self.look()
        await self._try("look at the storage", self.survey)
        first_s = _SURVEY_S * (0.5 + int(self._world.token()[:4], 16) / 0x10000)  # servers started at once spread out
        self._tasks = [
            asyncio.create_task(self._repeat("look at the room on the disk", self.look, _LOOK_S, _LOOK_S)),
            asyncio.create_task(self._repeat("look at the storage", self.survey, first_s, _SURVEY_S)),
            asyncio.create_task(self._repeat("collect garbage", self._collect, first_s, _SURVEY_S)),
            asyncio.create_task(self._repeat("scrub", self._scrub, 2 * first_s, _SURVEY_S)),
        ]

    async def stop(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks = []

    async def look(self) -> None:
        space = await self._blobs.space()
        self.figures = msgspec.structs.replace(
            self.figures,
            total_bytes=space.total_bytes,
            free_bytes=space.free_bytes,
            pushes=space.free_bytes >= _LOW_BYTES,
            replica=await standing.read(self._care) if self._replica else None,
        )

    async def survey(self) -> None:
        """What lies in quarantine and in the trash, and what other servers' notes tell."""
        trash = [held.size_bytes async for held in self._care.held(blobs.Place.TRASH)]
        lost = [
            held.digest
            async for held in self._care.held(blobs.Place.QUARANTINE)
            if await self._blobs.stat(held.digest) is None
        ]
        note = (await self._care.notes(sweep.NOTE)).get(sweep.NOTE)
        told, _ = await self.scrub.progress()
        last = sweep.last(note)
        self.figures = msgspec.structs.replace(
            self.figures,
            quarantined=tuple(sorted(lost)),
            trash_blobs=len(trash),
            trash_bytes=sum(trash),
            collected_s=int(last.ended_s),
            collected_bytes=last.freed_bytes,
            scrubbed_s=int(told.ended_s or told.last_s),
        )

    async def _collect(self) -> None:
        if self._wanted.collect_every_s and await self.collector.due(self._wanted.collect_every_s):
            await self.collector.run()
            await self.survey()

    async def _scrub(self) -> None:
        if self._wanted.scrub_every_s and await self.scrub.due(self._wanted.scrub_every_s):
            await self.scrub.run()
            await self.survey()
        if await self.scrub.heal():
            await self.survey()

    async def _repeat(self, what: str, work: Callable[[], Awaitable[None]], first_s: float, every_s: float) -> None:
        await asyncio.sleep(first_s)
        while True:
            await self._try(what, work)
            await asyncio.sleep(every_s)

    async def _try(self, what: str, work: Callable[[], Awaitable[None]]) -> None:
        try:
            await work()
        except (OSError, errors.CoveyError) as error:
            if what not in self._complained:
                log.warning(f"this server could not {what}; it tries again", error=str(error))
            self._complained.add(what)
        else:
            if what in self._complained:
                log.info(f"this server can {what} again")
            self._complained.discard(what)
