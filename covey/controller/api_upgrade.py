"""/api/v1/upgrade: may the store's format be raised, and do it (safety S27; docs/operate/upgrade.md)."""

from collections.abc import Sequence

import msgspec

from covey import errors, observe, serve
from covey.decide import upgrade
from covey.store import commit, commit_cloud, mirror, view

log = observe.log("upgrade")


class Program(msgspec.Struct, frozen=True, kw_only=True):
    """A live controller. `format`: the newest that it writes."""

    id: str
    url: str
    version: str
    format: int


class Upgrade(msgspec.Struct, frozen=True, kw_only=True):
    """`format` is the store's, `target` the one to which it would be raised. `blockers` say what must be done before,
    each with its remedy."""

    format: int
    target: int
    may_finish: bool
    blockers: list[str]
    notes: list[str]
    controllers: list[Program]


class Finish(msgspec.Struct, kw_only=True):
    """POST /api/v1/upgrade. `format` 0: the newest that any controller knows."""

    format: int = 0


class UpgradeApi:
    def __init__(self, mirror: mirror.Mirror, writer: commit.Writer) -> None:
        self._mirror = mirror
        self._writer = writer

    def routes(self) -> Sequence[serve.Route]:
        return [
            serve.Route("GET", "/api/v1/upgrade", self.check),
            serve.Route("POST", "/api/v1/upgrade", self.finish),
        ]

    async def check(self, _call: serve.Call) -> Upgrade:
        snapshot = await self._mirror.fresh()
        return _shown(snapshot, commit_cloud.upgradable(snapshot))

    async def finish(self, call: serve.Call) -> Upgrade:
        """Harmless when repeated."""
        asked = await call.json(Finish)
        snapshot = await self._mirror.fresh()
        target = asked.format or commit_cloud.upgradable(snapshot).target
        if target > self._writer.newest_format:
            raise errors.Refused(f"this controller writes format {self._writer.newest_format} at most: ask a newer one")
        call.still_fresh()
        who = f"API client {call.client}"
        found = await commit_cloud.raise_format(self._writer, snapshot, target, who, call.until_ns)
        if found.format < target:
            raise errors.Refused("; ".join(found.blockers) or f"format {target} is not known")
        log.info("the store's format was raised", format=target, who=who)
        snapshot = await self._mirror.fresh()
        return _shown(snapshot, commit_cloud.upgradable(snapshot))


def _shown(snapshot: view.Snapshot, found: upgrade.Verdict) -> Upgrade:
    return Upgrade(
        format=found.format,
        target=found.target,
        may_finish=found.may_finish,
        blockers=list(found.blockers),
        notes=list(found.notes),
        controllers=[Program(**one._asdict()) for one in sorted(commit_cloud.programs(snapshot))],
    )
