"""Work on etcd that is due now and then, and that whoever of the controllers comes first does.

    look      once in a while at the record in the store: is it due, does nobody do it, is this a good moment?
    claim     guarded on that record, so that one of several does it
    work      what is to be done
    tell      what became of it, into the record

A claim whose controller died is taken over when it was not moved for ten minutes by this controller's clock.
"""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Generic

import msgspec

from covey import world as worlds
from covey.decide import retention
from covey.store import commit, commit_chore, etcd

_LOOK_S = 15.0
_CLAIM_NS = 600 * 1_000_000_000


class Chore(Generic[commit_chore.R]):
    """`work` gets the record as it was claimed, and answers with the one that tells what became of it. `trouble` is why
    the last time came to nothing; "" when all is well."""

    def __init__(
        self,
        store: etcd.Etcd,
        writer: commit.Writer,
        world: worlds.World,
        me: str,
        kind: type[commit_chore.R],
        interval_s: float,
    ) -> None:
        self._store = store
        self._writer = writer
        self._world = world
        self._me = me
        self._kind: type[commit_chore.R] = kind
        self._interval_s = interval_s
        self._seen = (0, 0)  # the record's revision, and since when it is the newest by our clock
        self.trouble = ""

    async def run(
        self,
        work: Callable[[commit_chore.R], Awaitable[commit_chore.R]],
        good_moment: Callable[[], Awaitable[bool]] | None = None,
    ) -> None:
        """Whenever it is due, for ever."""
        while True:
            await self.turn(work, good_moment)
            await asyncio.sleep(min(_LOOK_S, self._interval_s / 4))

    async def turn(
        self,
        work: Callable[[commit_chore.R], Awaitable[commit_chore.R]],
        good_moment: Callable[[], Awaitable[bool]] | None = None,
    ) -> bool:
        """Look once; whether it was done here."""
        record, revision = await commit_chore.read(self._store, self._kind)
        self.trouble = record.trouble
        now_ns = self._world.boot_ns()
        if self._seen[0] != revision:
            self._seen = (revision, now_ns)
        if record.claim and now_ns - self._seen[1] < _CLAIM_NS:
            return False
        if not retention.due(record.at_ns, record.tried_ns, self._world.wall_ns(), int(self._interval_s * 1e9)):
            return False
        if good_moment is not None and not await good_moment():
            return False
        mine = msgspec.structs.replace(record, claim=self._me, tried_ns=self._world.wall_ns())
        claimed = await commit_chore.write(self._writer, mine, revision)
        if not claimed:
            return False
        done = await work(mine)
        await commit_chore.finish(self._writer, done, claimed)
        self.trouble = done.trouble
        return not done.trouble
