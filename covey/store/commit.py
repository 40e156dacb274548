"""Every write of Covey is a function of a `commit_*` module; this is the engine beneath them.

A write is a *rule*: a pure function that reads nouns through a `Reading` and answers with a `Write` or with a plain
value (a refusal, or "it is so already"). Everything a rule reads is compared by the transaction that carries its
writes, together with the store's format (safety S27), so a write happens exactly if what it was decided on still
stands. When it does not, the present values are read and the rule decides again on them: callers get a definite answer
without waiting for the mirror.

The format key is also a fence: it is written anew when the store is found restored from a backup (safety S18), and
what was decided on a view from before that is never written, whatever revisions its guards name. Once a store was
restored its newest break is compared too: restored a second time it may write the fence at the same revision again.
Before anybody has noticed there is no break to compare. Then the revision of the store's answer tells.

Replies get lost. An `Unsure` transaction is sent again unchanged until the outcome is definite (safety S15). Every
written noun carries the transaction's id, so a guard that fails because our own first copy was applied is known by
the bytes it finds. Nothing is sent for a request after `until_ns` (safety S24).

    commit_births     create (one transaction, all or none)
    commit_door       closing the door on a create whose reply was lost
    commit_instances  place, withdraw, launch, terminate, fail, update, forget
    commit_reports    what agents report
    commit_nodes      join, leave, remove, configure, word with adoption of claims, destroy orders
    commit_questions  asking nodes for output that they keep, and their answers
    commit_cloud      bootstrap, history nonces, breaks, controllers, sweeping
    commit_adopt      what nodes tell after a break, and giving up on a node's word
"""

import asyncio
import functools
from collections.abc import Callable, Coroutine, Iterable, Mapping
from typing import Any, Generic, NamedTuple, TypeVar

import msgspec

from covey import errors, lifecycle, model
from covey import world as worlds
from covey.store import base, codec, schema, spans, view

R = TypeVar("R")
R_co = TypeVar("R_co", covariant=True)
T = TypeVar("T", bound=msgspec.Struct)

LIMIT_NS = 10_000_000_000  # nothing is committed for a request older than this (safety S24)
_ATTEMPTS = 50  # each lost race means that somebody else got on; so many in a row mean a bug
_RESEND_S = 0.05  # doubled each time, up to …
_RESEND_MOST_S = 0.4
_CLOSE_S = 2.0
_RESTORED = "the store was restored"


class Lost(NamedTuple):
    """What the decision rested on has changed meanwhile: look again."""

    why: str = ""


class Missing(NamedTuple):
    """The noun named does not exist."""


class Done(NamedTuple, Generic[T]):
    """The noun as it now stands. `changed` False: it was so already and nothing was written."""

    noun: codec.Kept[T]
    changed: bool = True


class Write(NamedTuple, Generic[R_co]):
    """What a rule wants written, and the answer once it is, given the revision at which it happened."""

    ops: tuple[base.Op, ...]
    answer: Callable[[int], R_co]


class Reading:
    """What one rule reads in one attempt; remembers it as the guard of what the rule writes.

    Values come from the snapshot, or fresh from the attempt that lost. Keys that snapshots do not hold (births,
    remembered requests) are taken as absent at first, which the guard then proves or refutes.
    """

    def __init__(self, snapshot: view.Snapshot, fresh: Mapping[str, base.Kv | None], tx: str, now_ns: int) -> None:
        self.tx = tx
        self.now_ns = now_ns
        self.snapshot = snapshot
        self.again = bool(fresh)  # a first attempt lost
        self.guards: dict[str, base.Compare] = {}
        self._fresh = fresh
        self._old: dict[str, codec.Kept[Any] | None] = {}
        self._events = 0

    def instance(self, id: str) -> codec.Kept[model.Instance] | None:
        return self._unchanged(schema.instance(id), model.Instance, self.snapshot.instance(id))

    def node(self, id: str) -> codec.Kept[model.Node] | None:
        return self._unchanged(schema.node(id), model.Node, self.snapshot.node(id))

    def session(self, node: str) -> codec.Kept[model.Session] | None:
        return self._unchanged(schema.session(node), model.Session, self.snapshot.session(node))

    def ledger(self, node: str) -> codec.Kept[model.Ledger] | None:
        return self._unchanged(schema.ledger(node), model.Ledger, self.snapshot.ledger(node))

    def word(self, node: str) -> codec.Kept[model.Word] | None:
        return self._unchanged(schema.word(node), model.Word, self.snapshot.word(node))

    def order(self, node: str, instance: str) -> codec.Kept[model.Order] | None:
        return self._unchanged(schema.order(node, instance), model.Order, self.snapshot.order(node, instance))

    def question(self, node: str, slot: int) -> codec.Kept[model.Question] | None:
        return self._unchanged(schema.ask(node, slot), model.Question, self.snapshot.question(node, slot))

    def answer(self, nonce: str) -> codec.Kept[schema.Answer] | None:
        return self._unchanged(schema.answer(nonce), schema.Answer, None)

    def removed(self, node: str) -> codec.Kept[schema.Removed] | None:
        return self._unchanged(schema.removed(node), schema.Removed, self.snapshot.removed(node))

    def alive(self, node: str) -> codec.Kept[schema.Alive] | None:
        """Guards the life of the key, not its revision."""
        key = schema.alive(node)
        kept = self._value(key, schema.Alive, self.snapshot.alive(node))
        self.guards[key] = base.same_life(key, kept.created if kept else 0)
        return kept

    def adopted(self, node: str) -> codec.Kept[schema.Adopted] | None:
        return self._unchanged(schema.adopted(node), schema.Adopted, self.snapshot.adopted(node))

    def controller(self, id: str) -> codec.Kept[schema.Controller] | None:
        return self._unchanged(schema.controller(id), schema.Controller, self.snapshot.controller(id))

    def born(self, id: str) -> codec.Kept[schema.Born] | None:
        return self._unchanged(schema.born(id), schema.Born, None)

    def remembered(self, key: str) -> codec.Kept[schema.Remembered] | None:
        """A record of the idempotency or twin kind, by its whole key."""
        return self._unchanged(key, schema.Remembered, None)

    def put(self, key: str, noun: msgspec.Struct, lease: int = 0) -> base.Put:
        """Write a noun over what was read under the key, keeping what only newer programs know (safety S27)."""
        return base.Put(key, codec.encode(noun, self._old.get(key)), lease)

    def event(self, what: str, about: str, decision: model.Decision, **details: str) -> base.Put:
        """A line of the cloud's history, written with the decision itself (safety S28)."""
        at_ns = self.now_ns + self._events
        self._events += 1
        event = schema.Event(
            what=what, about=about, who=decision.who, why=decision.why, at_ns=self.now_ns, details=details
        )
        return base.Put(schema.event(at_ns, self.tx), schema.encode(event), spans.WEEK)

    def _unchanged(self, key: str, kind: type[T], known: codec.Kept[T] | None) -> codec.Kept[T] | None:
        kept = self._value(key, kind, known)
        self.guards[key] = base.unchanged(key, kept.revision if kept else 0)
        return kept

    def _value(self, key: str, kind: type[T], known: codec.Kept[T] | None) -> codec.Kept[T] | None:
        if key in self._fresh:
            kv = self._fresh[key]
            known = None if kv is None else codec.decode(kv, kind)
        self._old[key] = known
        return known


Rule = Callable[[Reading], Write[R] | R]


class Writer:
    """The one way to the store for writes. One per process; holds nothing but leases shared by short-lived keys."""

    def __init__(
        self,
        store: base.Store,
        world: worlds.World,
        *,
        who: str = "controller",
        newest_format: int = schema.FORMAT,
    ) -> None:
        self.store = store
        self.world = world
        self.who = who
        self.newest_format = newest_format
        self.format = newest_format  # of the store, as last seen: what is written (safety S27)
        self._spans = spans.Spans(store, world)
        self._background: set[asyncio.Task[None]] = set()
        self.unsure: dict[object, int] = {}  # writes whose outcome is open, and since when on the boot clock

    @property
    def format_guard(self) -> base.Compare:
        """Part of every transaction: the store has the format that is written."""
        return base.equals(schema.FORMAT_KEY, schema.encode(schema.Format(format=self.format)))

    def knows(self, format: int) -> bool:
        return schema.OLDEST_FORMAT <= format <= self.newest_format

    async def run(self, snapshot: view.Snapshot, rule: Rule[R], *, until_ns: int = 0, sure: bool = False) -> R:
        """Decide and write until it is definite. Raises Unavailable (nothing was done), Unsure or Rejected.

        An answer without a write rests on the snapshot, which a caller takes fresh. With `sure` it is proved against
        the store as well: for snapshots that may be old.
        """
        until_ns = until_ns or self.world.boot_ns() + LIMIT_NS
        fresh: dict[str, base.Kv | None] = {}
        for _ in range(_ATTEMPTS):
            answer = await self._attempt(snapshot, rule, fresh, until_ns, sure)
            if not isinstance(answer, _Again):
                return answer
        raise errors.Unavailable("too many others write the same thing at once; nothing was done")

    async def once(self, snapshot: view.Snapshot, rule: Rule[R], *, until_ns: int = 0) -> R | Lost:
        """As `run`, but a decision that no longer stands is Lost: for decisions that rest on more than they guard."""
        until_ns = until_ns or self.world.boot_ns() + LIMIT_NS
        answer = await self._attempt(snapshot, rule, {}, until_ns)
        return Lost("it changed meanwhile") if isinstance(answer, _Again) else answer

    def soon(self, work: Coroutine[Any, Any, None]) -> None:
        """Finish something after the caller was answered."""
        task = asyncio.get_running_loop().create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    @property
    def unfinished(self) -> int:
        """How much is being finished in the background."""
        return len(self._background)

    async def close(self) -> None:
        """Give what runs in the background a moment, then end it."""
        if self._background:
            await asyncio.wait(self._background, timeout=_CLOSE_S)
        for task in self._background:
            task.cancel()
        await asyncio.gather(*self._background, return_exceptions=True)
        await self._spans.close()

    async def _attempt(
        self,
        snapshot: view.Snapshot,
        rule: Rule[R],
        fresh: dict[str, base.Kv | None],
        until_ns: int,
        sure: bool = False,
    ) -> "R | _Again":
        reading = Reading(snapshot, fresh, self.world.token(), self.world.wall_ns())
        verdict = rule(reading)
        if not isinstance(verdict, Write):
            if not sure or reading.again:
                return verdict
            verdict = Write((), functools.partial(_same, verdict))
        write: Write[R] = verdict
        compares = (*self.fences(snapshot), *reading.guards.values())
        ops = await self._spans.lease_out(write.ops)
        try:
            outcome = await self.settle(base.Txn(compares, ops), until_ns)
        except errors.Rejected:
            if ops == write.ops:
                raise
            self._spans.forget()  # perhaps a shared lease ended early: once more with a new one
            ops = await self._spans.lease_out(write.ops)
            outcome = await self.settle(base.Txn(compares, ops), until_ns)
        if outcome.succeeded:
            _check_went_back(outcome, snapshot, written=bool(ops))
            return write.answer(outcome.revision)
        if not outcome.got:  # it lost, and nothing was done: see against what
            outcome = await self.settle(base.Txn((), _gets(compares)), until_ns)
        found = dict(zip((compare.key for compare in compares), outcome.got, strict=True))
        written = _own(ops, found, reading.tx)
        _check_went_back(outcome, snapshot, written=written is not None)
        if written is not None:
            return write.answer(written)
        self._check_format(found.pop(schema.FORMAT_KEY), snapshot)
        if schema.BREAK in found and not view.is_same_break(found.pop(schema.BREAK), snapshot.broke):
            raise errors.Unavailable(f"{_RESTORED} since this was decided; nothing was done")
        fresh.update(found)
        return _Again()

    async def settle(self, txn: base.Txn, until_ns: int) -> base.Outcome:
        """Send until it is definite, and be counted among the unsure for as long as it is not."""
        mine = object()
        try:
            return await self._settle(txn, until_ns, mine)
        finally:
            self.unsure.pop(mine, None)

    async def _settle(self, txn: base.Txn, until_ns: int, mine: object) -> base.Outcome:
        """Send one transaction until its outcome is definite (safety S15), but nothing after `until_ns`.

        Rejected is definite also after Unsure: an earlier copy that was applied would have made the guards fail first.
        A copy brings the guarded keys' values when it loses, so that the work of the first one is known by them; the
        first does without: reads for the case that it loses would cost every write.
        """
        unsure = False
        pause_s = _RESEND_S
        while True:
            left_ns = until_ns - self.world.boot_ns()
            if left_ns < 0:
                raise errors.Unsure("the store's answer was lost") if unsure else errors.Unavailable("too late")
            try:
                return await self.store.commit(txn, within_s=left_ns / 1e9)
            except errors.Unsure:
                unsure = True
                self.unsure.setdefault(mine, self.world.boot_ns())
                txn = txn._replace(otherwise=txn.otherwise or _gets(txn.compares))
            except errors.Unavailable:
                if not unsure:  # this copy was not applied, but an earlier one may yet be
                    raise
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, _RESEND_MOST_S)

    def fences(self, snapshot: view.Snapshot) -> tuple[base.Compare, ...]:
        """What every transaction compares first: the format key is as it was when the snapshot was taken, not raised
        since and not written by a break. Of two restores from one backup both breaks may have one revision: so a view
        of a restored store compares the break itself, and one in which the format was raised that there is none."""
        if not snapshot.fence or not (snapshot.format == 0 or self.knows(snapshot.format)):
            return (self.format_guard,)
        fence = base.unchanged(schema.FORMAT_KEY, snapshot.fence)
        if snapshot.broke is not None:
            return fence, base.equals(schema.BREAK, snapshot.broke.value)
        return (fence, base.absent(schema.BREAK)) if snapshot.format > schema.OLDEST_FORMAT else (fence,)

    def _check_format(self, kv: base.Kv | None, snapshot: view.Snapshot) -> None:
        found = format_of(kv)
        if kv is None or not self.knows(found):
            text = "nothing" if kv is None else kv.value.decode("utf-8", "replace")
            raise errors.Rejected(f"the store's format is {text}; this program writes {self.newest_format}")
        why = _RESTORED if found == self.format else "the store's format was raised"
        self.format = found
        if snapshot.fence not in (0, kv.mod_revision):
            raise errors.Unavailable(f"{why} since this was decided; nothing was done")


def format_of(kv: base.Kv | None) -> int:
    """What the format key says; 0 when it is missing or no format of ours."""
    try:
        return 0 if kv is None else codec.decode(kv, schema.Format).noun.format
    except codec.Broken:
        return 0


class _Again(NamedTuple):
    """The guard did not hold: decide again."""


def _same(answer: R, _revision: int) -> R:
    return answer


def _gets(compares: Iterable[base.Compare]) -> tuple[base.Get, ...]:
    """What is compared."""
    return tuple(base.Get(compare.key) for compare in compares)


def _check_went_back(outcome: base.Outcome, snapshot: view.Snapshot, *, written: bool) -> None:
    """A store that has not the revision any more at which the decision was made was restored since, and nobody has
    entered the break yet: what it holds now is no ground to decide once more on, for it may have forgotten launches
    (safety S18)."""
    if outcome.revision < snapshot.revision:
        why = f"{_RESTORED}: its revision went back from {snapshot.revision} to {outcome.revision}"
        raise errors.Unsure(why) if written else errors.Unavailable(f"{why}; nothing was done")


def _own(ops: tuple[base.Op, ...], found: Mapping[str, base.Kv | None], tx: str) -> int | None:
    """The revision at which these very writes were applied already, if a key still shows it: a value that carries this
    transaction's id was written by nobody else."""
    for op in ops:
        kv = found.get(op.key)
        if isinstance(op, base.Put) and kv is not None and kv.value == op.value and tx.encode() in op.value:
            return kv.mod_revision
    return None


def stepped(
    instance: model.Instance, event: lifecycle.Event, reading: Reading, **changes: Any
) -> model.Instance | None:
    """`instance` after `event`, with `changes`; None when the event has no place in its state."""
    step = lifecycle.step(
        instance.state, event, launched=instance.launched, claimed=instance.claimed, before=instance.before
    )
    if step is None or step.state is None:
        return None
    if step.state != instance.state:
        changes.setdefault("changed_ns", reading.now_ns)
    if step.new_epoch:
        changes.setdefault("epoch", instance.epoch + 1)
    if step.replace:
        changes |= {"node": model.NOWHERE, "acknowledged": False, "launch": None, "placed_ns": 0, "progress": 0.0}
    return msgspec.structs.replace(instance, state=step.state, tx=reading.tx, **changes)


def kept(noun: T, revision: int, old: codec.Kept[T] | None = None) -> codec.Kept[T]:
    """A noun just written at `revision` over `old`."""
    if old is None:
        return codec.Kept(noun, revision, revision)
    return codec.Kept(noun, revision, old.created, codec.encode(noun, old) if old.extra else b"")
