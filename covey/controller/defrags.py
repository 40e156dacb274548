"""Scheduled defragmentation of etcd (DEFRAG_DB_INTERVAL): a chore of whichever controller comes first.

Compaction makes room inside a member's file; only defragmentation gives it back, and the member serves nobody
meanwhile. So it is done where it pays, on one member after the other, the leader last and only after it has handed the
lead over, and never while any other member is away, lags or does not vote yet: then it waits for a better moment. A
lone member is silent for the time that it takes.
"""

import msgspec

from covey import errors, observe
from covey import world as worlds
from covey.controller import chores
from covey.decide import retention
from covey.store import commit, etcd, etcd_care, schema

_log = observe.log("defrag")


class Defrags:
    """`trouble` is why the last one broke off; "" when all is well."""

    def __init__(
        self, store: etcd.Etcd, writer: commit.Writer, world: worlds.World, me: str, interval_s: float
    ) -> None:
        self._admin = store.admin
        self._world = world
        self._me = me
        self._chore = chores.Chore(store, writer, world, me, schema.Defrag, interval_s)

    @property
    def trouble(self) -> str:
        return self._chore.trouble

    async def run(self) -> None:
        """Whenever it is due and all members are well, for ever."""
        await self._chore.run(self._work, self._all_well)

    async def _all_well(self) -> bool:
        return not etcd_care.unwell(await etcd_care.survey(self._admin))

    async def _work(self, record: schema.Defrag) -> schema.Defrag:
        """The record of what became of it."""
        begun_ns = self._world.boot_ns()
        try:
            names = await self._worth_it()
            freed = await self._defragment(names) if names else 0
        except errors.StoreError as error:
            _log.error("the defragmentation broke off", why=str(error))
            return msgspec.structs.replace(record, claim="", trouble=f"the defragmentation of etcd broke off: {error}")
        took_s = round((self._world.boot_ns() - begun_ns) / 1e9, 3)
        if names:
            _log.info("etcd was defragmented", members=list(names), freed_bytes=freed, took_s=took_s)
        return schema.Defrag(
            at_ns=self._world.wall_ns(),
            by=self._me,
            members=names,
            freed_bytes=freed,
            took_s=took_s,
            tried_ns=record.tried_ns,
        )

    async def _worth_it(self) -> tuple[str, ...]:
        found = [one for one in (await etcd_care.survey(self._admin)).standings if one.status is not None]
        return tuple(
            one.member.name
            for one in found
            if one.status is not None and retention.defragment_pays(one.status.size_bytes, one.status.used_bytes)
        )

    async def _defragment(self, names: tuple[str, ...]) -> int:
        return await etcd_care.defragment(self._admin, lambda line: _log.info(line), names, careful=True)
