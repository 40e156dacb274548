"""The push role where etcd is: held under a lease, taken over by itself, and a fence before every entry (safety S33).

    /covey-registry/
    ├── format                       the number of this layout
    ├── role                         {holder, term, id}: bound to the holder's lease; its create revision marks a reign
    ├── term                         the newest term there was
    ├── wanted                       who is to hold the role next, for a while: an operator said so
    ├── heads/<log>                  how many entries the log has: the number of the next one
    ├── chains/<log>                 the chain over them (`heads.Fold`), written together with the head
    └── accepted/<log>/<10 digits>   an entry that was accepted, until every server of the set has it

An entry is *accepted* by one transaction, which compares the role's create revision and the log's head, and writes
entry, head and chain. Only then is it linked to its number, so nobody sees what was not accepted. A holder that slept
through the end of its lease finds the role's key gone or new, however late it wakes up: its transaction fails, and
nothing of it is in any log. What was accepted is in etcd, so nothing of it can be lost with the server that accepted it
(safety S34): a server first enters the accepted entries that it lacks, and takes the role only if it then has every log
up to its head. The chain says which entries those are: by its count alone a log would pass that has others, which were
given up by force (decision 30).

The answer of a transaction may get lost (S15). It is sent again unchanged: the second time it fails, and the entry that
is found under its number says whose the first one was.
"""

import asyncio
import contextlib
from typing import Protocol

import msgspec

from covey import errors, failpoint, model, observe, world
from covey.registry import blobs, heads, role
from covey.store import base

log = observe.log("registry")

PREFIX = "/covey-registry/"
FORMAT_KEY, ROLE_KEY, TERM_KEY, WANTED_KEY = (PREFIX + name for name in ("format", "role", "term", "wanted"))
HEADS, CHAINS, ACCEPTED = (PREFIX + name for name in ("heads/", "chains/", "accepted/"))
FORMAT = b"1"

_ACCEPT_S = 8.0  # less than a request may take
_PAUSE_S = 0.5
_LOOK_S = 5.0


class Reign(model.Noun, frozen=True, kw_only=True):
    """What the role's key says. `id` is new with each time that it is taken."""

    holder: str
    term: int
    id: str


def head_key(log: str) -> str:
    return HEADS + log


def chain_key(log: str) -> str:
    return CHAINS + log


def accepted_key(log: str, number: int) -> str:
    return f"{ACCEPTED}{log}/{number:010d}"


def parse_accepted(key: str) -> tuple[str, int]:
    """Log and number."""
    name, _, number = key.removeprefix(ACCEPTED).rpartition("/")
    return name, int(number)


class Folds(Protocol):
    """How the logs of this server stand: `heads.Heads`."""

    async def fold(self, log: str) -> heads.Fold: ...


class Elected:
    """A `role.Role`: start → … → stop. What it knows of the role is told by a watch; what counts is what the
    transaction compares."""

    def __init__(
        self, store: base.Store, own_url: str, logs: blobs.Logs, world: world.World, copies: role.Copies | None = None
    ) -> None:
        self._store = store
        self._own_url = own_url
        self._logs = logs
        self._world = world
        self._copies = copies if copies is not None else role.Single()
        self.folds: Folds | None = None  # needed by whoever accepts
        self._reign: Reign | None = None  # the newest one known
        self._key = 0  # its create revision; 0: it is over
        self._revision = 0  # of the store, when something was heard of the role last
        self.lost = True  # by our own clock, if this process keeps the lease
        self.keeps = False  # this process keeps the lease
        self.floor = 0  # a term that somebody has spoken of
        self.moved = asyncio.Event()  # what is known of the role has changed
        self._watching: asyncio.Task[None] | None = None

    async def start(self) -> None:
        self._watching = asyncio.create_task(self._watch())

    async def stop(self) -> None:
        if self._watching is not None:
            self._watching.cancel()
            await asyncio.gather(self._watching, return_exceptions=True)

    async def _watch(self) -> None:
        while True:
            with contextlib.suppress(errors.StoreError):
                await self._watch_once()
            await asyncio.sleep(_PAUSE_S)

    async def _watch_once(self) -> None:
        """Until something is wrong. The key is read now and then, too: a watch on a store that was restored from a
        backup waits until that has as many revisions as before."""
        page = await self._store.range(ROLE_KEY)
        self._revision = page.revision
        self.learn(page.kvs[0] if page.kvs else None)
        watching = asyncio.create_task(self._hear(page.revision + 1))
        try:
            while not (await asyncio.wait([watching], timeout=_LOOK_S))[0]:
                before = self._revision
                page = await self._store.range(ROLE_KEY)
                if page.revision >= self._revision or page.revision < before:
                    self.learn(page.kvs[0] if page.kvs else None)
                if page.revision < before:
                    return
        finally:
            watching.cancel()
            await asyncio.gather(watching, return_exceptions=True)

    async def _hear(self, revision: int) -> None:
        async for batch in self._store.watch(ROLE_KEY, "", revision):
            self._revision = batch.revision
            self.learn(batch.changes[-1].kv)

    def learn(self, kv: base.Kv | None) -> None:
        """What the role's key says now."""
        key = 0 if kv is None else kv.create_revision
        if kv is not None:
            self._reign = msgspec.json.decode(kv.value, type=Reign)
            self.floor = max(self.floor, self._reign.term)
        if key != self._key:
            self._key = key
            self.moved.set()

    def view(self) -> role.View:
        reign = self._reign
        if reign is None:
            return role.View(why_not="no registry of the set takes pushes yet (etcd names none); nothing was entered")
        ours = reign.holder == self._own_url
        if not self._key or (ours and self.keeps and self.lost):
            text = f"the registry {reign.holder} took pushes and cannot now; another one takes over, or it does again"
            return role.View(term=reign.term, holder=reign.holder, why_not=f"{text}; nothing was entered")
        return role.View(term=reign.term, holder=reign.holder, mine=ours, key=self._key)

    async def heard(self, term: int, holder: str) -> None:
        """etcd says who it is; but its terms never go back behind one that was heard of (a restored etcd)."""
        if term > self.floor:
            self.floor = term
            self.moved.set()

    async def certain(self) -> bool:
        view = self.view()
        if not view.mine:
            return False
        page = await self._store.range(ROLE_KEY)
        return bool(page.kvs) and page.kvs[0].create_revision == view.key

    async def accept(self, view: role.View, log: str, number: int, entry: bytes) -> None:
        if not view.mine:
            raise role.not_holder(self.view(), self._own_url)
        failpoint.reach("registry.entry.unaccepted")
        head = base.absent(head_key(log)) if number == 0 else base.equals(head_key(log), str(number).encode())
        chain = await self._chain(log, number, entry)
        while True:
            again = await self._accept(view, log, number, entry, head, chain)
            if again is None:
                failpoint.reach("registry.entry.accepted")
                return
            head = again

    async def _chain(self, log: str, number: int, entry: bytes) -> str:
        """Over the log up to that number, the entry included."""
        assert self.folds is not None  # noqa: S101  joined
        fold = await self.folds.fold(log)
        if fold.count < number:
            raise errors.Unavailable(f"{log} was made anew meanwhile; nothing was entered")
        return heads.chain_on(fold.chain(number), entry)

    async def _accept(
        self, view: role.View, log: str, number: int, entry: bytes, head: base.Compare, chain: str
    ) -> base.Compare | None:
        """None: it is accepted. Else what to compare the head with, as it was found."""
        place = accepted_key(log, number)
        txn = base.Txn(
            compares=(base.same_life(ROLE_KEY, view.key), base.absent(place), head),
            then=(
                base.Put(place, entry),
                base.Put(head_key(log), str(number + 1).encode()),
                base.Put(chain_key(log), chain.encode()),
            ),
            otherwise=(base.Get(ROLE_KEY), base.Get(place), base.Get(head_key(log))),
        )
        outcome, unsure = await self._commit(txn)
        if outcome.succeeded:
            return None
        holds, found, stands = outcome.got
        if found is not None and found.value == entry:
            return None
        if holds is None or holds.create_revision != view.key:
            self.learn(holds)
            if unsure:  # it may have been accepted, and been taken over by all servers since
                raise errors.Unsure("another registry takes pushes now, and may have this one; send it again")
            raise role.not_holder(self.view(), self._own_url)
        if found is None and (stands is None or int(stands.value) <= number):
            return base.unchanged(head_key(log), 0 if stands is None else stands.mod_revision)
        await self._help(log, number, found, entry)
        return None

    async def _commit(self, txn: base.Txn) -> tuple[base.Outcome, bool]:
        """The outcome, and whether it was sent more than once. Raises Unavailable and Unsure."""
        until_ns = self._world.boot_ns() + int(_ACCEPT_S * 1e9)
        unsure = False
        while True:
            try:
                left_s = max((until_ns - self._world.boot_ns()) / 1e9, 0.001)
                return await self._store.commit(txn, within_s=left_s), unsure
            except errors.Unsure:
                unsure = True
            except errors.Unavailable as error:
                if not unsure:
                    raise errors.Unavailable(f"etcd, which accepts pushes, does not answer: {error}") from error
            if self._world.boot_ns() >= until_ns:
                raise errors.Unsure("etcd did not say whether this was accepted; send it again")
            await asyncio.sleep(0.05)

    async def _help(self, log: str, number: int, found: base.Kv | None, entry: bytes) -> None:
        """Another process of this server was first, and may have died before its entry was linked. Returns when the
        entry is ours after all, raises Taken when it is another."""
        if found is not None:
            await self._logs.append(log, number, found.value)
        here = (await self._logs.read({log: number}))[log]
        if not here:
            text = f"this registry has lost accepted entries of {log}, from {number} on; promote another one"
            raise errors.Unavailable(text)
        if here[0] != entry:
            raise role.Taken(f"{log} has another entry {number}")

    async def settle(self, view: role.View, log: str, number: int, *, entered: bool) -> None:
        if not entered:
            page = await self._store.range(ROLE_KEY)
            if not view.mine or not page.kvs or page.kvs[0].create_revision != view.key:
                raise role.not_holder(self.view(), self._own_url)
        await self._copies.wait(log, number)
