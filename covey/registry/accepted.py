"""What was accepted stays in etcd until the other servers have it, within bounds (safety S34).

Every accepted entry is a key, for the case that the holder dies before anybody else has the entry. A server that is
away for weeks must not fill etcd, which controllers may share: so of what some server lacks only the newest
`Bounds.entries` and `Bounds.size_bytes` are kept. What is older goes as soon as one server beside the holder has it,
and when there are `HARD` times as many also what the holder alone has, in its log, on its disk.

What that costs: a server that was away can then not be completed by etcd alone. It is no candidate for the push role
before it has followed one that has the entries; so no number is given twice and nothing is lost, but if all that have
them are away at once nobody takes pushes until one of them is back.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple, Protocol

from covey import failpoint, model
from covey.registry import blobs, elected, heads, peers
from covey.store import base

HARD = 4
_AT_ONCE = 60  # keys of one transaction
_PAGE = 1000


class Bounds(NamedTuple):
    """Of what is kept for servers that lack it."""

    entries: int = 1000
    size_bytes: int = 16 << 20


class Kept(model.Noun, frozen=True, kw_only=True):
    """What etcd keeps, and the servers that lack some of it, or do not answer."""

    entries: int = 0
    size_bytes: int = 0
    waits_for: tuple[str, ...] = ()
    dropped: int = 0  # entries that went although `waits_for` may lack them, since this server took the role


class Folds(Protocol):
    async def fold(self, log: str) -> heads.Fold: ...


class _One(NamedTuple):
    key: str
    log: str
    number: int
    revision: int


class Accepted:
    """Of one server, in the process that campaigns."""

    def __init__(self, store: base.Store, logs: blobs.Logs, folds: Folds, bounds: Bounds | None = None) -> None:
        self._store = store
        self._logs = logs
        self._folds = folds
        self._bounds = bounds or Bounds()
        self._sizes: dict[str, int] = {}
        self.kept = Kept()

    async def complete(self) -> None:
        """Enter what this server lacks. Whoever prunes at the same time takes away only what others have."""
        for one in await self._all():  # ascending: by log, then by number
            if (await self._folds.fold(one.log)).count == one.number:
                page = await self._store.range(one.key)
                if page.kvs:
                    await self._logs.append(one.log, one.number, page.kvs[0].value)
                    failpoint.reach("registry.role.completed")

    async def prune(self, told: Mapping[str, peers.Inventory], urls: Sequence[str], reign: int) -> None:
        """Take away what `urls`, the others, have by their own word, and what is beyond the bounds. `reign`: the create
        revision of our role's key; without it nothing is taken away."""
        present = await self._all()
        lacking = {url for url in urls if url not in told} if present else set()
        done, open_ = [], []
        for one in present:
            fold = await self._folds.fold(one.log)
            theirs = {url for url, found in told.items() if _has(fold, found.heads.get(one.log, peers.Head()), one)}
            if fold.count > one.number and theirs >= set(urls):
                done.append(one)
            else:
                open_.append((one, fold.count > one.number, bool(theirs)))
                lacking |= set(urls) - theirs
        await self._measure([one for one, _, _ in open_])
        beyond = list(self._beyond(open_))
        await self._remove([*done, *beyond], reign)
        sizes = [self._sizes[one.key] for one, _, _ in open_ if one not in set(beyond)]
        self.kept = Kept(
            entries=len(sizes),
            size_bytes=sum(sizes),
            waits_for=tuple(sorted(lacking)),
            dropped=self.kept.dropped + len(beyond),
        )

    def _beyond(self, open_: Sequence[tuple[_One, bool, bool]]) -> Iterator[_One]:
        """The newest are kept; of the others those that would not be lost with this server, or with etcd."""
        count = size = 0
        for one, here, elsewhere in sorted(open_, key=lambda item: item[0].revision, reverse=True):
            count, size = count + 1, size + self._sizes[one.key]
            times = max(count / self._bounds.entries, size / self._bounds.size_bytes)
            if here and (times > HARD or (times > 1 and elsewhere)):
                yield one

    async def _all(self) -> list[_One]:
        found: list[_One] = []
        start, end = elected.ACCEPTED, base.prefix_end(elected.ACCEPTED)
        while True:
            page = await self._store.range(start, end, limit=_PAGE, keys_only=True)
            found += [_One(kv.key, *elected.parse_accepted(kv.key), kv.mod_revision) for kv in page.kvs]
            if not page.more:
                return found
            start = page.kvs[-1].key + "\0"

    async def _measure(self, present: Sequence[_One]) -> None:
        """Keys do not say how large their values are: each is read once."""
        self._sizes = {one.key: self._sizes.get(one.key, 0) for one in present}
        for one in present:
            if not self._sizes[one.key]:
                page = await self._store.range(one.key)
                self._sizes[one.key] = sum(len(kv.value) for kv in page.kvs)

    async def _remove(self, what: Sequence[_One], reign: int) -> None:
        for start in range(0, len(what), _AT_ONCE):
            then = tuple(base.Delete(one.key) for one in what[start : start + _AT_ONCE])
            await self._store.commit(base.Txn((base.same_life(elected.ROLE_KEY, reign),), then))


def _has(fold: heads.Fold, head: peers.Head, one: _One) -> bool:
    """Whether a log with that head has the entry, as ours has it."""
    return head.count > one.number and heads.covers(fold, head)
