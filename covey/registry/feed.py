"""What a server tells its peers: which logs have grown, their entries, and how everything stands.

Any server of a set answers, follower or holder; who asks judges by `term` and `holder` what to make of it. Entries are
read from the disk at each call, so that an answer is never older than the question, whichever process gives it.
"""

import asyncio
from collections.abc import Callable

from covey.registry import blobs, heads, peers

_LOOK_S = 0.1  # how often the hints are looked at while somebody waits
_PART_ENTRIES = 500
_PART_BYTES = 4 << 20

View = Callable[[], tuple[int, str]]  # term and holder, as this server knows them


class Feed:
    """One server's word to its peers."""

    def __init__(self, logs: blobs.Logs, heads: heads.Heads, view: View) -> None:
        self._logs = logs
        self._heads = heads
        self._view = view

    def word(self) -> peers.Word:
        term, holder = self._view()
        return peers.Word(term=term, holder=holder)

    async def feed(
        self, cursor: str, wait_s: float, ending: asyncio.Event, known: tuple[int, str] | None
    ) -> peers.Feed:
        """What has changed since `cursor`. Waits for news for `wait_s`, unless `ending`, or unless term and holder are
        not what the asker knows."""
        loop = asyncio.get_running_loop()
        until_s = loop.time() + wait_s
        while True:
            await self._heads.look()
            moved = cursor != self._heads.cursor or known not in (None, self._view())
            if moved or ending.is_set() or loop.time() >= until_s:
                term, holder = self._view()
                changed = self._heads.since(cursor)
                return peers.Feed(term=term, holder=holder, cursor=self._heads.cursor, heads=changed)
            await asyncio.sleep(_LOOK_S)

    async def entries(self, log: str, start: int) -> peers.Part:
        """From that number on, as many as go into one answer."""
        while True:
            fold = await self._heads.fold(log)
            found = (await self._logs.read({log: start}))[log] if start < fold.count else []
            if (await self._heads.fold(log)).era == fold.era:
                break
        before = fold.chain(min(start, fold.count))
        return peers.Part(before=before, count=fold.count, entries=_first(found[: max(0, fold.count - start)]))

    async def inventory(self) -> peers.Inventory:
        await self._heads.look()
        term, holder = self._view()
        return peers.Inventory(term=term, holder=holder, heads=self._heads.all())


def _first(entries: list[bytes]) -> tuple[bytes, ...]:
    """As many as go into one answer, one at least."""
    size = 0
    for count, entry in enumerate(entries):
        size += len(entry)
        if count and (size > _PART_BYTES or count >= _PART_ENTRIES):
            return tuple(entries[:count])
    return tuple(entries)
