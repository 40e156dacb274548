"""The cloud itself: bootstrap, the chain of history nonces and its breaks (safety S18), controllers, sweeping.

Each nonce notes where the store was in its own life when it was added. Whoever adds the next one compares that with
where the store is now: what has gone back was restored from a backup. Then the new nonce begins a new history: it is
written together with the break, and with the format key, which shuts out everything that was decided before.
"""

import asyncio
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import msgspec

from covey import errors, model, observe
from covey.decide import permission, upgrade
from covey.store import base, codec, commit, schema, view

_DELETES = 100  # per transaction
_BALLAST, _BALLAST_TTL_S = 24, 60  # two entries each; a restored store of five members begins with twelve
_KEPT_NS = 30 * 24 * 3600 * 1_000_000_000  # nonces
_MOST = 5000  # nonces of 30 days: an etcd that fails again and again must not make the chain grow without end

_log = observe.log("history")


class Cloud(NamedTuple):
    id: str
    history: str  # the nonce just added


class WrongFormat(NamedTuple):
    """The store's data has another format than this program writes."""

    found: str


async def start(writer: commit.Writer) -> Cloud | WrongFormat:
    """At each controller start, before anything else: writes format and cloud id once, and adds a history nonce."""
    wanted = schema.encode(schema.Format(format=writer.newest_format))
    cloud = schema.encode(schema.Cloud(id=writer.world.uuid()))
    txn = base.Txn(
        (base.absent(schema.FORMAT_KEY), base.absent(schema.CLOUD)),
        (base.Put(schema.FORMAT_KEY, wanted), base.Put(schema.CLOUD, cloud)),
        (base.Get(schema.FORMAT_KEY), base.Get(schema.CLOUD)),
    )
    outcome = await writer.settle(txn, writer.world.boot_ns() + commit.LIMIT_NS)
    if not outcome.succeeded:
        found, named = outcome.got
        if found is None or named is None or not writer.knows(commit.format_of(found)):
            return WrongFormat("none" if found is None else found.value.decode("utf-8", "replace"))
        writer.format = commit.format_of(found)
        cloud = named.value
    else:
        writer.format = writer.newest_format
        await _grow_log(writer)
    id = msgspec.json.decode(cloud, type=schema.Cloud).id
    return Cloud(id, await add_nonce(writer))


async def _grow_log(writer: commit.Writer) -> None:
    """A store that was restored begins its log anew, with a few entries. Were the first nonces of a young cloud noted
    at so few, a backup of it could not be told from itself. A lease is an entry of its own, and ends by itself."""
    for lease in await asyncio.gather(*(writer.store.grant(_BALLAST_TTL_S) for _ in range(_BALLAST))):
        await lease.revoke()


async def add_nonce(writer: commit.Writer, proof: str = "", before: Sequence[permission.Link] = ()) -> str:
    """Lengthen the history chain (at each start, hourly, after each backup, and before a controller serves again after
    it could not), and enter a break when the store has gone back since the newest nonce.

    `proof`: why the caller knows that the store was restored; `before` is the chain as the caller knew it, so that a
    break which another controller has entered for the same restore is not entered twice. Raises Unavailable when
    somebody else enters one at the same moment: then do it again."""
    store, nonce = writer.store, writer.world.token()
    past = await _look_back(store)
    format, origin, broke = past.format, past.origin, past.broke
    guarded = view.Snapshot()
    past.guard(guarded)
    if proof and not broke and not permission.recorded_by_another(before, _breach(past.breach)):
        broke = proof

    def rule(reading: commit.Reading) -> commit.Write[str] | str:
        link = schema.Nonce(
            at_ns=reading.now_ns, term=origin.term, index=origin.entries, cluster=origin.cluster, broke=broke
        )
        ops: list[base.Op] = [base.Put(schema.nonce(nonce), schema.encode(link))]
        if broke and format is not None:
            breach = schema.Break(nonce=nonce, why=broke, at_ns=reading.now_ns)
            ops += (base.Put(schema.BREAK, schema.encode(breach)), base.Put(schema.FORMAT_KEY, format.value))
            ops.append(reading.event("restored", "store", model.Decision(who=writer.who, why=broke)))
        return commit.Write(tuple(ops), lambda _: nonce)

    await writer.run(guarded, rule)
    if broke:
        _log.warning("the store was restored from a backup: every node is asked what it runs", why=broke, nonce=nonce)
    return nonce


class Past(NamedTuple):
    """What a store is by its own past. `broke`: why it must have gone back since its newest nonce, "" when nothing says
    so."""

    format: base.Kv | None
    breach: base.Kv | None  # the newest break that was entered
    origin: permission.Origin
    broke: str

    def guard(self, snapshot: view.Snapshot) -> None:
        """What is decided on this snapshot is shut out by a break that is entered from here on."""
        snapshot.fence = self.format.mod_revision if self.format is not None else 0
        snapshot.broke = self.breach

    @property
    def newest_break(self) -> str:
        """Its nonce."""
        return _breach(self.breach).nonce


async def _look_back(store: base.Store) -> Past:
    """Format and break are read first, so that a break since then is found out by them."""
    formats = (await store.range(schema.FORMAT_KEY)).kvs
    breaks = (await store.range(schema.BREAK)).kvs
    links = (await store.range(schema.HISTORY, base.prefix_end(schema.HISTORY))).kvs
    newest = max(links, key=lambda kv: kv.create_revision, default=None)
    origin = await store.origin(newest.create_revision if newest is not None else 0)
    format, breach = (kvs[0] if kvs else None for kvs in (formats, breaks))
    return Past(format, breach, origin, permission.restored(_noted(newest), origin))


async def prove(store: base.Store) -> Past:
    """That nothing says the store was restored, but for breaks that were entered. Raises Unavailable."""
    past = await _look_back(store)
    if past.broke or past.format is None:
        raise errors.Unavailable(f"the store was restored: {past.broke}" if past.broke else "the store has no format")
    return past


def _noted(newest: base.Kv | None) -> permission.Origin:
    """Where the store was when its newest nonce was added, as far as that was written down."""
    try:
        noun = None if newest is None else codec.decode(newest, schema.Nonce).noun
    except codec.Broken:
        noun = None
    return permission.Origin() if noun is None else permission.Origin(noun.cluster, noun.term, noun.index)


def _breach(kv: base.Kv | None) -> permission.Link:
    if kv is None:
        return permission.Link(0, "")
    return permission.Link(kv.mod_revision, codec.decode(kv, schema.Break).noun.nonce)


async def old_nonces(writer: commit.Writer) -> list[base.Kv]:
    """Nonces older than 30 days, or more than 5,000, for `sweep`: the oldest, so that the chain stays whole from its
    oldest link on. Clocks that differ make it shorter or longer; who saw less than it reaches back is held (S18)."""
    page = await writer.store.range(schema.HISTORY, base.prefix_end(schema.HISTORY))
    old: list[base.Kv] = []
    for kv in sorted(page.kvs, key=lambda kv: kv.create_revision)[:-1]:
        try:
            young = writer.world.wall_ns() - codec.decode(kv, schema.Nonce).noun.at_ns < _KEPT_NS
        except codec.Broken:
            break  # left alone, and so is what came after it
        if young and len(page.kvs) - len(old) <= _MOST:
            break
        old.append(kv)
    return old


async def announce(writer: commit.Writer, controller: schema.Controller, lease: base.Lease) -> None:
    """This controller is there as long as `lease` lives. Its key is its own: nothing is compared."""

    def rule(_reading: commit.Reading) -> commit.Write[int] | int:
        value = schema.encode(controller)
        return commit.Write((base.Put(schema.controller(controller.id), value, lease.id),), lambda revision: revision)

    await writer.run(view.Snapshot(), rule)


def programs(snapshot: view.Snapshot) -> list[upgrade.Program]:
    """The controllers that are there."""
    return [_program(kept.noun) for kept in snapshot.controllers()]


def _program(noun: schema.Controller) -> upgrade.Program:
    return upgrade.Program(noun.id, noun.url, noun.version, noun.format)


def upgradable(snapshot: view.Snapshot, target: int = 0) -> upgrade.Verdict:
    """Whether the store's format may be raised to `target` (0: to the newest that any controller knows)."""
    lives = (snapshot.session(kept.noun.id) for kept in snapshot.nodes())
    agents = [life.noun.facts.agent_version for life in lives if life is not None]
    return upgrade.verdict(snapshot.format, programs(snapshot), agents, _unsettled(snapshot), target)


def _unsettled(snapshot: view.Snapshot) -> str:
    count = len(snapshot.awaited())
    return f"the store was restored, and {count} nodes have not told what they run" if count else ""


async def raise_format(
    writer: commit.Writer, snapshot: view.Snapshot, target: int, who: str, until_ns: int = 0
) -> upgrade.Verdict:
    """Raise the store's format, guarded on every controller that the snapshot lists: each is as it was, or gone. One
    that starts just then and knows only the old format can write nothing: every transaction compares the format. The
    verdict's `format` is `target` once it is so, also when it was so before."""

    def rule(reading: commit.Reading) -> commit.Write[upgrade.Verdict] | upgrade.Verdict:
        there = [reading.controller(kept.noun.id) for kept in snapshot.controllers()]
        known = [_program(kept.noun) for kept in there if kept is not None]
        verdict = upgrade.verdict(snapshot.format, known, (), _unsettled(snapshot), target)
        if not verdict.may_finish:
            return verdict
        decision = model.Decision(who=who, why=f"from {snapshot.format} to {target}")
        ops = (
            base.Put(schema.FORMAT_KEY, schema.encode(schema.Format(format=target))),
            reading.event("format raised", "store", decision),
        )
        return commit.Write(ops, lambda _: verdict._replace(format=target))

    return await writer.run(snapshot, rule, until_ns=until_ns)


async def sweep(writer: commit.Writer, snapshot: view.Snapshot, leftovers: Iterable[base.Kv]) -> int:
    """Delete keys that nothing refers to by this view (scripts, outputs, remembered requests beyond the limit, old
    nonces), each guarded on being as it was seen; after a restore something may refer to them again. They go in their
    order, and what follows upon one that has changed stays for the next time: another controller sweeps too, and a hole
    in the chain of nonces would look like a restore (safety S18). Answers with how many went."""
    done = 0
    batch = list(leftovers)
    for start in range(0, len(batch), _DELETES):
        part = batch[start : start + _DELETES]
        compares = (*writer.fences(snapshot), *(base.unchanged(kv.key, kv.mod_revision) for kv in part))
        txn = base.Txn(compares, tuple(base.Delete(kv.key) for kv in part))
        outcome = await writer.settle(txn, writer.world.boot_ns() + commit.LIMIT_NS)
        if not outcome.succeeded:
            break
        done += len(part)
    return done
