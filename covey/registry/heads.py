"""How all logs of this storage stand, and which have grown since somebody looked last.

A `Head` is a fold like any other: kept from one look to the next, brought up to date by reading on. What to look at is
told by hints that every server process on this storage leaves when it enters something (`replica_disk`); a hint may get
lost with its process, so from time to time all logs are looked at.

The cursor is made of the heads themselves: any process that has seen the same state knows it, whoever gave it out.
"""

import asyncio
import collections
import functools
import hashlib
from collections.abc import Mapping, Sequence

from covey import world
from covey.registry import blobs, peers, replica_disk

_FULL_LOOK_S = 60.0
_PAGE = 100  # logs read in one go
_REMEMBERED = 20_000  # changes; whoever comes with an older cursor is told everything


class Fold:
    """One log: a chain over its first n entries for every n. `era`: which making of the log."""

    __slots__ = ("chains", "era")

    def __init__(self, era: int) -> None:
        self.era = era
        self.chains: list[bytes] = []

    @property
    def count(self) -> int:
        return len(self.chains)

    def chain(self, count: int) -> str:
        """Over the first `count` entries."""
        return self.chains[count - 1].hex() if count else ""

    @property
    def head(self) -> peers.Head:
        return peers.Head(count=self.count, chain=self.chain(self.count))

    def add(self, entries: Sequence[bytes]) -> None:
        for entry in entries:
            last = self.chains[-1] if self.chains else b""
            self.chains.append(_link(last, entry))


def _link(last: bytes, entry: bytes) -> bytes:
    return hashlib.blake2b(last + entry, digest_size=16).digest()


def chain_on(chain: str, *entries: bytes) -> str:
    """A chain with some entries more."""
    return functools.reduce(_link, entries, bytes.fromhex(chain)).hex()


def covers(fold: Fold, head: peers.Head) -> bool:
    """Whether a log begins with all that a head stands for."""
    return fold.count >= head.count and fold.chain(head.count) == head.chain


class Heads:
    """Of all logs; for any number of callers at once."""

    def __init__(
        self, logs: blobs.Logs, log_care: blobs.LogCare, hints: replica_disk.ReplicaDisk, world: world.World
    ) -> None:
        self._logs = logs
        self._log_care = log_care
        self._hints = hints
        self._world = world
        self._folds: dict[str, Fold] = {}
        self._lock = asyncio.Lock()
        self._looking = asyncio.Lock()  # a look at all logs takes long: a single one is read between two pages
        self._mark: replica_disk.Mark | None = None
        self._looked_ns = 0
        self._sum = 0  # of all heads
        self._changes: collections.deque[str] = collections.deque(maxlen=_REMEMBERED)
        self._first = 0  # the number of the oldest change that is remembered
        self._places: dict[str, int] = {self.cursor: 0}  # cursor → the number of the next change then

    @property
    def cursor(self) -> str:
        return f"{self._sum:032x}"

    def all(self) -> dict[str, peers.Head]:
        """As of the last look."""
        return {log: fold.head for log, fold in self._folds.items() if fold.count}

    def since(self, cursor: str) -> dict[str, peers.Head]:
        """What has changed since then; everything when the cursor is not known."""
        place = self._places.get(cursor)
        if place is None or place < self._first:
            return self.all()
        changed = list(self._changes)[place - self._first :]
        return {log: self._folds[log].head for log in changed}

    async def look(self) -> None:
        """Bring what has changed up to date: usually one small look at the hints."""
        async with self._looking:
            mark, hinted = await self._hints.hints(self._mark)
            now_ns = self._world.boot_ns()
            if hinted is None or self._mark is None or now_ns - self._looked_ns > _FULL_LOOK_S * 1e9:
                hinted = await self._log_care.logs()
                self._looked_ns = now_ns
            self._mark = mark
            for start in range(0, len(hinted), _PAGE):
                async with self._lock:
                    await self._read_on(hinted[start : start + _PAGE])

    async def fold(self, log: str) -> Fold:
        """One log, as it stands now."""
        async with self._lock:
            return (await self._read_on([log]))[log]

    async def _read_on(self, logs: Sequence[str]) -> Mapping[str, Fold]:
        """Bring these up to date. What is read while a log is made anew does not count: read again."""
        found: dict[str, Fold] = {}
        left = list(logs)
        while left:
            eras = await self._hints.eras(left)
            known = {log: self._known(log, eras[log]) for log in left}
            news = await self._logs.read({log: fold.count for log, fold in known.items()})
            after = await self._hints.eras(left)
            for log in left:
                if after[log] == eras[log]:
                    self._enter(log, known[log], news[log])
                    found[log] = known[log]
            left = [log for log in left if log not in found]
        return found

    def _known(self, log: str, era: int) -> Fold:
        fold = self._folds.get(log)
        return fold if fold is not None and fold.era == era else Fold(era)

    def _enter(self, log: str, fold: Fold, news: Sequence[bytes]) -> None:
        old = self._folds.get(log)
        before = old.head if old is not None else peers.Head()
        fold.add(news)
        if fold.count or old is not None:
            self._folds[log] = fold
        if fold.head == before:
            return
        self._sum ^= _number(log, before) ^ _number(log, fold.head)
        if len(self._changes) == _REMEMBERED:
            self._first += 1
        self._changes.append(log)
        self._places[self.cursor] = self._first + len(self._changes)
        if len(self._places) > 2 * _REMEMBERED:
            self._places = {cursor: place for cursor, place in self._places.items() if place >= self._first}


def _number(log: str, head: peers.Head) -> int:
    """What a head adds to the sum; nothing for an empty log."""
    if not head.count:
        return 0
    text = f"{log} {head.count} {head.chain}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=16).digest(), "big")
