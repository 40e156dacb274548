"""What was accepted stays in etcd until the other servers have it, within bounds (safety S34).

Every accepted entry is a key, for the case that the holder dies before anybody else has the entry. A server that is
away for weeks must not fill etcd, which controllers may share: so of what some server lacks only the newest
`Bounds.entries` and `Bounds.size_bytes` are kept. What is older goes as soon as one server beside the holder has it,
and when there are `HARD` times as many also what the holder alone has, in its log, on its disk.

What that costs: a server that was away can then not be completed by etcd alone. It is no candidate for the push role
before it has followed one that has the entries; so no number is given twice and nothing is lost, but if all that have
them are away at once nobody takes pushes until one of them is back.

And by force somebody may say that what is lost so shall be given up. Whoever has it then, and comes back, has a log as
long as any other, of which the last entries are none that count. So a log is what was accepted when its *chain* says
so, not its length; and no entry is put behind others than those it was accepted behind (decision 30).
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from covey import failpoint, model, observe
from covey.registry import blobs, elected, heads, peers
from covey.store import base

log = observe.log("registry")

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
    async def look(self) -> None: ...

    async def fold(self, log: str) -> heads.Fold: ...

    def all(self) -> dict[str, peers.Head]: ...


@dataclass(frozen=True, slots=True)
class Stand:
    """Up to where a log was accepted. `chain` "": not known, as an older Covey accepted the last entry. `revision`: of
    its head in etcd."""

    count: int = 0
    chain: str = ""
    revision: int = 0

    @property
    def head(self) -> peers.Head | None:
        return peers.Head(count=self.count, chain=self.chain) if self.chain else None


def contains(fold: heads.Fold, stand: Stand) -> bool:
    """Whether a log begins with everything that was accepted."""
    return fold.count >= stand.count and stand.chain in ("", fold.chain(stand.count))


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

    async def stands(self) -> dict[str, Stand]:
        """Of every log, as of one revision."""
        page = await self._store.range(elected.CHAINS, base.prefix_end(elected.HEADS))
        chains = {kv.key: kv for kv in page.kvs if kv.key.startswith(elected.CHAINS)}
        found = {}
        for kv in page.kvs:
            if kv.key.startswith(elected.HEADS):
                name = kv.key.removeprefix(elected.HEADS)
                chain = chains.get(elected.chain_key(name))
                known = chain is not None and chain.mod_revision == kv.mod_revision
                found[name] = Stand(int(kv.value), chain.value.decode() if chain and known else "", kv.mod_revision)
        return found

    async def complete(self) -> None:
        """Enter what this server lacks. Whoever prunes at the same time takes away only what others have."""
        stands = await self.stands()
        for name, ones in itertools.groupby(await self._all(), key=lambda one: one.log):  # ascending, numbers too
            await self._enter(name, list(ones), stands.get(name, Stand()))

    async def _enter(self, name: str, ones: Sequence[_One], stand: Stand) -> None:
        """Of one log; nothing, if what is here is not what they were accepted behind."""
        fold = await self._folds.fold(name)
        first = fold.count
        news: list[bytes] = []
        for one in ones:
            if one.number == first + len(news) and one.number < stand.count:
                news += [kv.value for kv in (await self._store.range(one.key)).kvs]
        if not news:
            return
        if stand.chain and heads.chain_on(fold.chain(first), *news) != stand.chain:
            return
        for number, entry in enumerate(news, first):
            await self._logs.append(name, number, entry)
            failpoint.reach("registry.role.completed")

    async def record(self, reign: int) -> bool:
        """Have etcd know every log as it is here, at the one that has just taken the role: also those that etcd has
        heard nothing of yet, or that an older Covey accepted. False: somebody entered something meanwhile."""
        stands = await self.stands()
        await self._folds.look()
        due = []
        for name, head in self._folds.all().items():
            stand = stands.get(name, Stand())
            if head.count >= stand.count and (stand.count, stand.chain) != (head.count, head.chain):
                due.append((name, stand, head))
        done = True
        for start in range(0, len(due), _AT_ONCE):
            some = due[start : start + _AT_ONCE]
            compares = [base.unchanged(elected.head_key(name), stand.revision) for name, stand, _ in some]
            puts = [put for name, _, head in some for put in _puts(name, head)]
            txn = base.Txn((base.same_life(elected.ROLE_KEY, reign), *compares), tuple(puts))
            done &= (await self._store.commit(txn)).succeeded
        return done

    async def give_up(self, reign: int) -> None:
        """By force: what was accepted and is not here is given up; logs go on from where they stand here."""
        present = await self._all()
        for name, stand in (await self.stands()).items():
            fold = await self._folds.fold(name)
            if contains(fold, stand):
                continue
            log.error("accepted entries are given up", log=name, accepted=stand.count, here=fold.count)
            ours = (await self._logs.read({name: 0}))[name]
            lost = [one for one in present if one.log == name and not await self._is_here(one, ours)]
            await self._remove(lost, reign)
            own = base.same_life(elected.ROLE_KEY, reign)
            await self._store.commit(base.Txn((own,), tuple(_puts(name, fold.head))))

    async def _is_here(self, one: _One, ours: Sequence[bytes]) -> bool:
        page = await self._store.range(one.key)
        return one.number < len(ours) and all(kv.value == ours[one.number] for kv in page.kvs)

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


def _puts(name: str, head: peers.Head) -> tuple[base.Put, base.Put]:
    return (
        base.Put(elected.head_key(name), str(head.count).encode()),
        base.Put(elected.chain_key(name), head.chain.encode()),
    )


def _has(fold: heads.Fold, head: peers.Head, one: _One) -> bool:
    """Whether a log with that head has the entry, as ours has it."""
    return head.count > one.number and heads.covers(fold, head)
