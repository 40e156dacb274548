"""Scheduled backups of etcd with retention: a chore (controller/chores) of whichever controller comes first.

Made to ETCD_BACKUP_DIR and proved; then a new history nonce (safety S18). Files beyond ETCD_BACKUP_KEEP go; only files
named as ours are ever removed.
"""

import asyncio
import re
import time
from pathlib import Path
from typing import NamedTuple

import msgspec

from covey import errors, observe
from covey import world as worlds
from covey.controller import chores
from covey.decide import retention
from covey.store import commit, etcd, etcd_backup, schema

_NAME = re.compile(r"covey-\d{8}-\d{6}\.db")

_log = observe.log("backup")


class Terms(NamedTuple):
    """What the settings say."""

    folder: Path
    interval_s: float
    keep: int


class Backups:
    """`trouble` is why the last one was not made; "" when all is well."""

    def __init__(self, store: etcd.Etcd, writer: commit.Writer, world: worlds.World, me: str, terms: Terms) -> None:
        self._store = store
        self._world = world
        self._me = me
        self._terms = terms
        self._chore = chores.Chore(store, writer, world, me, schema.Backup, terms.interval_s)

    @property
    def trouble(self) -> str:
        return self._chore.trouble

    async def run(self) -> None:
        """Make each one that is due, for ever."""
        await self._chore.run(self._make)

    async def _make(self, record: schema.Backup) -> schema.Backup:
        """The record of what became of it."""
        at_ns = self._world.wall_ns()
        name = f"covey-{time.strftime('%Y%m%d-%H%M%S', time.gmtime(at_ns / 1e9))}.db"
        path = self._terms.folder / name
        try:
            await asyncio.to_thread(self._terms.folder.mkdir, 0o700, True, True)
            taken = await etcd_backup.take(self._store, path, self._world, f"controller {self._me}")
            await asyncio.to_thread(self._clear)
        except (errors.StoreError, OSError) as error:
            why = f"the backup of etcd to {self._terms.folder} failed: {error}"
            _log.error("no backup was made", folder=str(self._terms.folder), why=str(error))
            return msgspec.structs.replace(record, claim="", trouble=why)
        content = taken.content
        _log.info("a backup was made", file=str(path), size=content.size_bytes, took_s=round(taken.took_s, 2))
        return schema.Backup(
            at_ns=at_ns,
            by=self._me,
            file=str(path),
            size_bytes=content.size_bytes,
            revision=content.revision,
            took_s=round(taken.took_s, 3),
            tried_ns=record.tried_ns,
        )

    def _clear(self) -> None:
        """Remove what is beyond the number kept. Blocking."""
        names = [path.name for path in self._terms.folder.iterdir() if _NAME.fullmatch(path.name)]
        for name in retention.expired(names, self._terms.keep):
            (self._terms.folder / name).unlink(missing_ok=True)
