"""What nodes tell after the store was restored becomes facts again (safety S19); and giving up on a node's word.

A node tells every VM that it has a record of, and every instance that it was told has ended. Nothing here is decided
twice: a part that is told again, or in another order, or by another node, comes to the same.

    an instance has ended         it is told to terminate; one that the store does not know is never made again
    a VM of a newer epoch         the instance is there, in that epoch, as the node says
    of the same epoch             what the store has forgotten of it is filled in: launched wins over un-launched
    of an older epoch             a leftover: it holds its slot until an order removes it
    of an instance not known      made again from its specification; not when it was forgotten after its end

Each VM becomes a claim on its node; what had not begun there and has no room beside them any more waits again. A
terminate that was accepted after the restore still wins.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import msgspec

from covey import lifecycle, model, wire
from covey.decide import permission, rooms
from covey.store import base, codec, commit, commit_instances, commit_reports, schema, spans, view

_AT_ONCE = 12  # VMs, or ended instances, per transaction: each may need five operations
_NONCE = "adopted"  # of a launch that was granted in a history which is lost
_NO_ROOM = "the store was restored, and others have its room on the node by now"
_WHY = "the store was restored, and its node has this VM"

State = model.State


class Told(NamedTuple):
    """A part of what a node tells was taken."""


class Torn(NamedTuple):
    """The store was restored again since the first part was taken, so that one may be forgotten: all must be told
    anew."""


Answer = Told | commit_reports.StaleSession


async def adopt(
    writer: commit.Writer,
    snapshot: view.Snapshot,
    node: model.NodeId,
    session: int,
    told: wire.Adopt,
    until_ns: int = 0,
) -> Answer | Torn:
    """Take one part. With `last` the node is released from its hold, as the last of the transactions."""
    if told.begun.revision and not _goes_on(snapshot, told.begun):
        return Torn()
    for start in range(0, len(told.buried), _AT_ONCE):
        graves = [grave for grave in told.buried[start : start + _AT_ONCE] if _is_news(snapshot, grave)]
        taken = await _fold(writer, snapshot, node, session, (), graves, until_ns) if graves else Told()
        if isinstance(taken, commit_reports.StaleSession):
            return taken
    for start in range(0, len(told.vms), _AT_ONCE):
        vms = told.vms[start : start + _AT_ONCE]
        taken = await _fold(writer, snapshot, node, session, vms, (), until_ns)
        if isinstance(taken, commit_reports.StaleSession):
            return taken
    return await _release(writer, snapshot, node, session, told.seen, until_ns) if told.last else Told()


def _goes_on(snapshot: view.Snapshot, begun: wire.Seen) -> bool:
    """Whether what was taken in the view `begun` is still known."""
    own = snapshot.kinship(begun) is permission.Kinship.OWN
    return own and begun.revision >= snapshot.breach.revision


def _is_news(snapshot: view.Snapshot, grave: wire.Buried) -> bool:
    """Whether the store may have forgotten that the instance ended: not when it was so ordered in its own history."""
    own = grave.seen.history and snapshot.kinship(grave.seen) is permission.Kinship.OWN
    return grave.final and not own


async def _fold(
    writer: commit.Writer,
    snapshot: view.Snapshot,
    node: model.NodeId,
    session: int,
    vms: Sequence[wire.Held],
    graves: Sequence[wire.Buried],
    until_ns: int,
) -> Answer:
    def rule(reading: commit.Reading) -> commit.Write[Answer] | Answer:
        life = reading.session(node)
        if life is None or life.noun.counter != session:
            return commit_reports.StaleSession()
        page = _Page(reading, node, session)
        for grave in graves:
            page.bury(grave)
        for vm in vms:
            page.take(vm)
        ops = page.ops()
        return commit.Write(ops, lambda _: Told()) if ops else Told()

    return await writer.run(snapshot, rule, until_ns=until_ns)


async def _release(
    writer: commit.Writer, snapshot: view.Snapshot, node: model.NodeId, session: int, seen: wire.Seen, until_ns: int
) -> Answer:
    """The node has told all: from here on it takes part again."""

    def rule(reading: commit.Reading) -> commit.Write[Answer] | Answer:
        life = reading.session(node)
        if life is None or life.noun.counter != session:
            return commit_reports.StaleSession()
        old = reading.adopted(node)
        before = old.noun if old is not None else schema.Adopted()
        new = msgspec.structs.replace(before, nonce=snapshot.breach.nonce, history=seen.history, revision=seen.revision)
        if new == before:
            return Told()
        decision = model.Decision(who=node, why=snapshot.breach_why or "it was away for longer than history is kept")
        ops = (
            reading.put(schema.adopted(node), msgspec.structs.replace(new, tx=reading.tx)),
            reading.event("node-adopted", node, decision),
            *_without_room(reading, life.noun),
        )
        return commit.Write(ops, lambda _: Told())

    return await writer.run(snapshot, rule, until_ns=until_ns)


def _without_room(reading: commit.Reading, life: model.Session) -> Iterator[base.Op]:
    """Placements that had not begun at the backup, and whose room others have taken since: they wait again. The node
    is told to clean up, for it may have prepared them (safety S10). As many as a transaction holds."""
    known, ledger = reading.node(life.node), reading.ledger(life.node)
    claims = [] if ledger is None else list(ledger.noun.claims)
    seen = {claim: reading.snapshot.instance(claim.instance) for claim in reversed(claims)}
    unbegun = [claim for claim, kept in seen.items() if kept is not None and not kept.noun.launched]
    for claim in unbegun[:_AT_ONCE]:
        if known is None or not _is_over(known.noun, life.facts, claims):
            return
        old = reading.instance(claim.instance)
        if old is None or (old.noun.node, old.noun.epoch) != (life.node, claim.epoch) or old.noun.launched:
            continue
        waiting = commit.stepped(old.noun, lifecycle.Event.REFUSED, reading, message=_NO_ROOM)
        if waiting is not None and waiting.waiting:
            claims.remove(claim)
            decision = model.Decision(who=life.node, why=_NO_ROOM)
            yield reading.put(schema.instance(waiting.id), waiting)
            yield commit_instances.clean_up(reading, old.noun, decision, withdrawn=True)
            yield reading.event("withdrawn", waiting.id, decision, node=life.node)


def _is_over(node: model.Node, facts: model.Facts, claims: Sequence[model.Claim]) -> bool:
    room = rooms.room(rooms.Host(node=node, facts=facts, claims=tuple(claims)))
    return room.free_slots < 0 if room.counts_vms else room.free.vcpu < 0 or room.free.ram_mb < 0


class _Page:
    """One transaction's VMs and ended instances, folded into new nouns."""

    def __init__(self, reading: commit.Reading, node: model.NodeId, session: int) -> None:
        self.reading = reading
        self.node = node
        self.session = session
        self.claims: dict[tuple[model.InstanceId, int], model.Claim] = {}
        self._ops: dict[str, base.Op] = {}

    def ops(self) -> tuple[base.Op, ...]:
        """What the page comes to."""
        ledger = self.reading.ledger(self.node)
        held = ledger.noun.claims if ledger is not None else ()
        known = {(claim.instance, claim.epoch) for claim in held}
        more = tuple(claim for key, claim in self.claims.items() if key not in known)
        if more:
            noun = model.Ledger(node=self.node) if ledger is None else ledger.noun
            noun = msgspec.structs.replace(noun, claims=(*held, *more), tx=self.reading.tx)
            self._put(schema.ledger(self.node), noun)
        return tuple(self._ops.values())

    # ---- ended instances

    def bury(self, grave: wire.Buried) -> None:
        """The instance was told to terminate in the history that is lost: so it is now, whatever its epoch."""
        try:
            old = self.reading.instance(grave.instance)
        except codec.Broken:
            return
        if old is None:
            if self.reading.born(grave.instance) is None:
                self._put(schema.born(grave.instance), schema.Born(tx=self.reading.tx), spans.DAY)
            return
        new = commit.stepped(old.noun, lifecycle.Event.TERMINATE, self.reading, ended=grave.decision)
        if new is not None and new.state != old.noun.state:
            self._put(schema.instance(new.id), new)
            self._say("terminated" if new.state is State.TERMINATED else "terminating", new.id, grave.decision)

    # ---- VMs

    def take(self, vm: wire.Held) -> None:
        """One VM of the node."""
        spec = vm.spec
        self.claims[vm.instance, vm.epoch] = model.Claim(
            instance=vm.instance, epoch=vm.epoch, vcpu=spec.vcpu, vram_mb=spec.vram_mb
        )
        order = self.reading.order(self.node, vm.instance)
        try:
            old = self.reading.instance(vm.instance)
        except codec.Broken:
            return
        if vm.buried:
            return  # the node is removing it, and will say so
        if order is not None and order.noun.epoch >= vm.epoch and not (vm.launched and _gives_way(old, vm)):
            return  # ordered away, as it stands
        if old is None:
            self._make_again(vm)
        elif old.noun.state in (State.TERMINATING, State.TERMINATED):
            self._after_its_end(old.noun, vm)
        elif old.noun.epoch < vm.epoch or (old.noun.epoch == vm.epoch and _gives_way(old, vm)):
            self._take_over(old.noun, vm, order)
        elif old.noun.epoch == vm.epoch and old.noun.node == self.node:
            self._fill_in(old.noun, vm)

    def _make_again(self, vm: wire.Held) -> None:
        """An instance that was accepted after the backup; unless it was known, has ended and was forgotten."""
        if self.reading.born(vm.instance) is not None:
            return
        now_ns = self.reading.now_ns
        noun = model.Instance(
            id=vm.instance,
            spec=vm.spec,
            state=State.PULLING,
            created_ns=now_ns,
            changed_ns=now_ns,
            external_id=vm.spec.external_id,
            name=vm.spec.name,
            learnt=self.reading.snapshot.breach.nonce,
        )
        self._put(schema.born(vm.instance), schema.Born(tx=self.reading.tx), spans.DAY)
        self._enter(self._as_told(noun, vm), vm)

    def _take_over(self, old: model.Instance, vm: wire.Held, order: codec.Kept[model.Order] | None) -> None:
        """The node has a newer epoch, or the launched one of two."""
        if old.launched and not vm.launched and old.node != self.node:
            why = "another node runs the instance, which was launched there"
            self._order_away(self.node, vm.instance, vm.epoch, model.Decision(who=_NONCE, why=why))
            return
        if old.claimed and old.node != self.node:
            why = f"node {self.node} has a newer epoch of the instance"
            self._order_away(old.node, old.id, old.epoch, model.Decision(who=_NONCE, why=why))
        if order is not None and order.noun.epoch >= vm.epoch:
            key = schema.order(self.node, vm.instance)
            self._ops[key] = base.Delete(key)
        self._enter(self._as_told(old, vm), vm)

    def _fill_in(self, old: model.Instance, vm: wire.Held) -> None:
        """What the store has forgotten of the epoch that it knows. All else comes by the reports that follow."""
        new = self._as_told(old, vm)
        if old.state is State.STARTED and not vm.stopped:
            new = msgspec.structs.replace(new, state=State.STARTED)
        elif old.state not in (State.PULLING, State.STARTED):
            new = msgspec.structs.replace(old, launch=old.launch if old.launched else new.launch)
        if msgspec.structs.replace(new, changed_ns=old.changed_ns, applied=old.applied) != old:
            self._enter(new, vm)

    def _after_its_end(self, old: model.Instance, vm: wire.Held) -> None:
        """A terminate that was accepted wins: the VM goes, by the instance itself or by an order of its own."""
        if old.epoch >= vm.epoch:
            return  # this node's is removed with the instance; any other is a leftover
        if old.node == self.node and old.state is State.TERMINATING:
            self._enter(msgspec.structs.replace(old, epoch=vm.epoch, applied=None, released=False), vm)
            return
        decision = old.ended or model.Decision(who=_NONCE, why="its instance was told to terminate")
        self._order_away(self.node, vm.instance, vm.epoch, decision)

    def _as_told(self, old: model.Instance, vm: wire.Held) -> model.Instance:
        """The instance as its node says that it is. One that failed stays so; its VM is its own again."""
        launch = model.Launch(node=self.node, session=self.session, epoch=vm.epoch, nonce=_NONCE)
        state = old.state
        if state is not State.ERROR:
            state = lifecycle.adopted(
                launched=vm.launched, running=vm.running, stopped=vm.stopped, complete=vm.vm is not None
            )
        same = old.epoch == vm.epoch and old.node == self.node
        return msgspec.structs.replace(
            old,
            state=state,
            epoch=vm.epoch,
            node=self.node,
            launch=old.launch if old.launched and same else launch if vm.launched else None,
            acknowledged=True,
            applied=old.applied if same else None,
            progress=1.0 if state is State.STARTED else old.progress,
            message=old.message if state is State.ERROR else vm.message,
            vm=vm.vm or (old.vm if same else None),
            released=False,
            changed_ns=old.changed_ns if state is old.state else self.reading.now_ns,
        )

    # ---- writing

    def _enter(self, noun: model.Instance, vm: wire.Held) -> None:
        noun = msgspec.structs.replace(noun, tx=self.reading.tx)
        self._put(schema.instance(noun.id), noun)
        details = {"node": str(self.node), "epoch": str(vm.epoch), "state": str(noun.state)}
        self._say("adopted", noun.id, model.Decision(who=self.node, why=_WHY), **details)

    def _order_away(self, node: model.NodeId, instance: model.InstanceId, epoch: int, decision: model.Decision) -> None:
        known = self.reading.order(node, instance)
        if known is not None and known.noun.epoch >= epoch:
            return
        decision = msgspec.structs.replace(decision, at_ns=self.reading.now_ns)
        noun = model.Order(node=node, instance=instance, epoch=epoch, decision=decision, tx=self.reading.tx)
        self._put(schema.order(node, instance), noun)
        self._say("ordered-destroyed", instance, decision, node=node, epoch=str(epoch))

    def _put(self, key: str, noun: msgspec.Struct, lease: int = 0) -> None:
        self._ops[key] = self.reading.put(key, noun, lease)

    def _say(self, what: str, about: str, decision: model.Decision, **details: str) -> None:
        put = self.reading.event(what, about, decision, **details)
        self._ops[put.key] = put


def _gives_way(old: codec.Kept[model.Instance] | None, vm: wire.Held) -> bool:
    """Whether the store's placement of the same epoch is not launched, and waits or is elsewhere, while the VM is."""
    if old is None or old.noun.launched or not vm.launched or old.noun.epoch != vm.epoch:
        return False
    return old.noun.state in (State.SCHEDULING, State.PULLING)


# ---- giving up, and having heard of all ----------------------------------------------------------------------------


async def excuse(
    writer: commit.Writer, snapshot: view.Snapshot, node: model.NodeId, who: str, until_ns: int = 0
) -> commit.Done[schema.Adopted] | commit.Missing:
    """An operator says that the node is lost: nobody waits for its word any more. It is held all the same, should it
    come back. Repeats are `changed=False`."""
    Outcome = commit.Done[schema.Adopted] | commit.Missing

    def rule(reading: commit.Reading) -> commit.Write[Outcome] | Outcome:
        if reading.node(node) is None:
            return commit.Missing()
        old = reading.adopted(node)
        before = old.noun if old is not None else schema.Adopted()
        if not snapshot.awaits(node):
            return commit.Done(old or commit.kept(before, 0), changed=False)
        new = msgspec.structs.replace(before, excused=snapshot.breach.nonce, tx=reading.tx)
        why = "the operator gave it up: what waited for its word after the restore goes on"
        ops = (
            reading.put(schema.adopted(node), new),
            reading.event("released", node, model.Decision(who=who, why=why)),
        )
        return commit.Write(ops, lambda revision: commit.Done(commit.kept(new, revision, old)))

    return await writer.run(snapshot, rule, until_ns=until_ns)


async def settle(writer: commit.Writer, snapshot: view.Snapshot) -> bool:
    """Every node has told, was removed or was given up: what waited since the break may begin. Nothing that this rests
    on is ever taken back, but by another break, which shuts it out."""
    breach = snapshot.breach.nonce

    def rule(reading: commit.Reading) -> commit.Write[bool] | bool:
        if breach in ("", snapshot.settled) or snapshot.awaited():
            return False
        decision = model.Decision(who=writer.who, why="every node has told what it runs, or was given up")
        ops = (
            base.Put(schema.SETTLED, schema.encode(schema.Settled(nonce=breach))),
            reading.event("settled", "store", decision),
        )
        return commit.Write(ops, lambda _: True)

    return await writer.run(snapshot, rule)
