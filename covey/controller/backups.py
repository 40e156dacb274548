"""Scheduled backups of etcd with retention: whoever of the controllers comes first makes the next one.

    look      once in a while at the record in the store: is one due, and does nobody make it?
    claim     guarded on that record, so that one of several does it
    make      to ETCD_BACKUP_DIR, proved; then a new history nonce (safety S18)
    tell      figures into the record; files beyond ETCD_BACKUP_KEEP go

A claim whose controller died is taken over when it was not moved for ten minutes by this controller's clock. Only files
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
from covey.decide import retention
from covey.store import commit, commit_backup, etcd, etcd_backup, schema

_LOOK_S = 15.0
_CLAIM_NS = 600 * 1_000_000_000
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
        self._writer = writer
        self._world = world
        self._me = me
        self._terms = terms
        self._seen = (0, 0)  # the record's revision, and since when it is the newest by our clock
        self.trouble = ""

    async def run(self) -> None:
        """Make each one that is due, for ever."""
        while True:
            await self.turn()
            await asyncio.sleep(min(_LOOK_S, self._terms.interval_s / 4))

    async def turn(self) -> bool:
        """Look once; whether a backup was made here."""
        record, revision = await commit_backup.read(self._store)
        self.trouble = record.trouble
        now_ns = self._world.boot_ns()
        if self._seen[0] != revision:
            self._seen = (revision, now_ns)
        if record.claim and now_ns - self._seen[1] < _CLAIM_NS:
            return False
        interval_ns = int(self._terms.interval_s * 1e9)
        if not retention.backup_due(record.at_ns, record.tried_ns, self._world.wall_ns(), interval_ns):
            return False
        mine = msgspec.structs.replace(record, claim=self._me, tried_ns=self._world.wall_ns())
        claimed = await commit_backup.write(self._writer, mine, revision)
        if not claimed:
            return False
        made = await self._make(mine)
        await commit_backup.finish(self._writer, made, claimed)
        self.trouble = made.trouble
        return not made.trouble

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
