"""What happens to instances by decision: place, withdraw, age, launch, terminate, fail, update, forget."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import msgspec

from covey import lifecycle, model
from covey.decide import permission, placement
from covey.store import base, codec, commit, schema, view

Event = lifecycle.Event
Ended = commit.Done[model.Instance]
Outcome = Ended | commit.Missing
Instance = codec.Kept[model.Instance]


class Granted(NamedTuple):
    """This session may run guest code for this epoch (now, or already since the same nonce was granted)."""

    instance: Instance


class Denied(NamedTuple):
    why: str
    stale_session: bool = False  # answer 409


async def place(
    writer: commit.Writer, snapshot: view.Snapshot, node: model.NodeId, instances: Sequence[model.InstanceId]
) -> int | commit.Lost:
    """Give waiting instances to one node, all or none; the epoch of each rises (safety S1, S11).

    Compares each instance, the node's ledger, its session and the life of its alive key. Answers with the revision.
    """

    def rule(reading: commit.Reading) -> commit.Write[int | commit.Lost] | commit.Lost:
        ledger = reading.ledger(node)
        if ledger is None or reading.session(node) is None or reading.alive(node) is None:
            return commit.Lost("the node is gone")
        if snapshot.held(node):
            return commit.Lost("the node is on hold")
        ops: list[base.Op] = []
        claims = list(ledger.noun.claims)
        for id in instances:
            kept = reading.instance(id)
            if kept is not None and not snapshot.may_begin(kept):
                return commit.Lost("it waits until all nodes have told what they run")
            placed = _placed(reading, kept.noun, node) if kept is not None and kept.noun.waiting else None
            if placed is None:
                return commit.Lost("the instance does not wait any more")
            ops.append(reading.put(schema.instance(id), placed))
            claims.append(claim(placed))
        noun = msgspec.structs.replace(ledger.noun, claims=tuple(claims), tx=reading.tx)
        ops.append(reading.put(schema.ledger(node), noun))
        return commit.Write(tuple(ops), lambda revision: revision)

    return await writer.once(snapshot, rule)


def claim(instance: model.Instance) -> model.Claim:
    """The slot that an instance holds on its node."""
    return model.Claim(
        instance=instance.id, epoch=instance.epoch, vcpu=instance.spec.vcpu, vram_mb=instance.spec.vram_mb
    )


def _placed(reading: commit.Reading, instance: model.Instance, node: model.NodeId) -> model.Instance | None:
    return commit.stepped(
        instance,
        Event.PLACED,
        reading,
        node=node,
        placed_ns=reading.now_ns,
        acknowledged=False,
        launch=None,
        progress=0.0,
        message="",
        released=False,
    )


async def withdraw(
    writer: commit.Writer,
    snapshot: view.Snapshot,
    instance: Instance,
    decision: model.Decision,
    *,
    node_lost: bool = False,
) -> commit.Done[model.Instance] | commit.Lost:
    """Take an un-launched instance from its node so that it waits again; the claim stays, with an order to destroy
    what the node may have begun (safety S10, S11)."""

    def rule(reading: commit.Reading) -> commit.Write[commit.Done[model.Instance] | commit.Lost] | commit.Lost:
        old = reading.instance(instance.noun.id)
        if old is None or old.revision != instance.revision or old.noun.launched or not old.noun.claimed:
            return commit.Lost("it changed meanwhile")
        event = Event.NODE_LOST if node_lost else Event.REFUSED
        waiting = commit.stepped(old.noun, event, reading, message=decision.why)
        if waiting is None or not waiting.waiting:
            return commit.Lost("it does not wait for its node")
        ops = (
            reading.put(schema.instance(waiting.id), waiting),
            clean_up(reading, old.noun, decision, withdrawn=not node_lost),
            reading.event("withdrawn", waiting.id, decision, node=old.noun.node),
        )
        return commit.Write(ops, lambda revision: commit.Done(commit.kept(waiting, revision, old)))

    return await writer.once(snapshot, rule)


async def age(writer: commit.Writer, snapshot: view.Snapshot, instance: Instance) -> bool | commit.Lost:
    """It has waited for a whole span: its turn comes nearer. Kept with the instance, so that every controller sees the
    same queue."""

    def rule(reading: commit.Reading) -> commit.Write[bool | commit.Lost] | commit.Lost:
        old = reading.instance(instance.noun.id)
        if old is None or old.revision != instance.revision or not old.noun.waiting:
            return commit.Lost("it changed meanwhile")
        noun = msgspec.structs.replace(placement.older(old.noun, snapshot.revision), tx=reading.tx)
        return commit.Write((reading.put(schema.instance(noun.id), noun),), lambda _: True)

    return await writer.once(snapshot, rule)


def clean_up(
    reading: commit.Reading, instance: model.Instance, decision: model.Decision, *, withdrawn: bool = False
) -> base.Put:
    """The order by which a node removes what it has of a placement that is no longer its own."""
    reading.order(instance.node, instance.id)
    order = model.Order(
        node=instance.node,
        instance=instance.id,
        epoch=instance.epoch,
        decision=msgspec.structs.replace(decision, at_ns=reading.now_ns),
        withdrawn=withdrawn,
        tx=reading.tx,
    )
    return reading.put(schema.order(instance.node, instance.id), order)


async def launch(
    writer: commit.Writer,
    snapshot: view.Snapshot,
    node: model.NodeId,
    session: int,
    instance: model.InstanceId,
    epoch: int,
    nonce: str,
    until_ns: int = 0,
) -> Granted | Denied:
    """Leave to run guest code (safety S1): compares the instance and the node's session. The snapshot may be older than
    the instance."""
    wanted = model.Launch(node=node, session=session, epoch=epoch, nonce=nonce)

    def rule(reading: commit.Reading) -> commit.Write[Granted | Denied] | Granted | Denied:
        life = reading.session(node)
        if life is None or life.noun.counter != session:
            return Denied("another life of this agent has taken over", stale_session=True)
        old = reading.instance(instance)
        if old is None or old.noun.node != node or old.noun.epoch != epoch:
            return Denied("this placement is not the instance's newest")
        if old.noun.launched and old.noun.state in (model.State.PULLING, model.State.STARTED):
            return Granted(old) if old.noun.launch == wanted else Denied("this epoch was launched before")
        if not snapshot.may_begin(old):
            return Denied(permission.why_held_back(snapshot.awaited()))
        if old.noun.state != model.State.PULLING:
            return Denied(f"the instance is {old.noun.state}")
        noun = msgspec.structs.replace(old.noun, launch=wanted, acknowledged=True, tx=reading.tx)
        return commit.Write(
            (reading.put(schema.instance(instance), noun),),
            lambda revision: Granted(commit.kept(noun, revision, old)),
        )

    return await writer.run(snapshot, rule, until_ns=until_ns, sure=True)


async def terminate(
    writer: commit.Writer,
    snapshot: view.Snapshot,
    instance: model.InstanceId,
    decision: model.Decision,
    until_ns: int = 0,
) -> Outcome:
    """Terminating, or Terminated at once when no node holds a claim (safety S13). Repeats are `changed=False`.
    The snapshot may be older than the instance."""

    def rule(reading: commit.Reading) -> commit.Write[Outcome] | Outcome:
        old = reading.instance(instance)
        if old is None:
            return commit.Missing()
        return ended(reading, old, Event.TERMINATE, decision)

    return await writer.run(snapshot, rule, until_ns=until_ns, sure=True)


async def reap(
    writer: commit.Writer, snapshot: view.Snapshot, instance: Instance, decision: model.Decision
) -> commit.Done[model.Instance] | commit.Lost:
    """Terminate what has been in Error for long."""

    def rule(reading: commit.Reading) -> commit.Write[Ended | commit.Lost] | Ended | commit.Lost:
        old = reading.instance(instance.noun.id)
        if old is None or old.revision != instance.revision:
            return commit.Lost("it changed meanwhile")
        return ended(reading, old, Event.REAPED, decision)

    return await writer.once(snapshot, rule)


def ended(
    reading: commit.Reading, old: Instance, event: Event, decision: model.Decision
) -> commit.Write[Ended] | Ended:
    """`old` after its end was decided."""
    noun = commit.stepped(old.noun, event, reading, ended=msgspec.structs.replace(decision, at_ns=reading.now_ns))
    if noun is None or noun.state == old.noun.state:
        return commit.Done(old, changed=False)
    ops = (
        reading.put(schema.instance(noun.id), noun),
        reading.event("terminated" if noun.state == model.State.TERMINATED else "terminating", noun.id, decision),
    )
    return commit.Write(ops, lambda revision: commit.Done(commit.kept(noun, revision, old)))


async def fail(
    writer: commit.Writer, snapshot: view.Snapshot, instance: Instance, message: str
) -> commit.Done[model.Instance] | commit.Lost:
    """Error, decided by a controller: nothing could ever take it, or its node is silent for too long. That is compared
    too: a node that is back has begun another session, or has said a word."""

    def rule(reading: commit.Reading) -> commit.Write[commit.Done[model.Instance] | commit.Lost] | commit.Lost:
        old = reading.instance(instance.noun.id)
        if old is None or old.revision != instance.revision:
            return commit.Lost("it changed meanwhile")
        if old.noun.node != model.NOWHERE:
            reading.session(old.noun.node), reading.alive(old.noun.node), reading.word(old.noun.node)
        noun = commit.stepped(old.noun, Event.FAILED, reading, message=message)
        if noun is None:
            return commit.Lost("it cannot fail now")
        decision = model.Decision(who=writer.who, why=message)
        ops = (reading.put(schema.instance(noun.id), noun), reading.event("failed", noun.id, decision))
        return commit.Write(ops, lambda revision: commit.Done(commit.kept(noun, revision, old)))

    return await writer.once(snapshot, rule)


async def update(
    writer: commit.Writer,
    snapshot: view.Snapshot,
    instance: model.InstanceId,
    *,
    metadata: Mapping[str, str | int | bool] | None = None,
    external_id: str | None = None,
    name: str | None = None,
    until_ns: int = 0,
) -> Outcome:
    """PUT: metadata is merged key by key, the others replaced when given."""

    def rule(reading: commit.Reading) -> commit.Write[Outcome] | Outcome:
        old = reading.instance(instance)
        if old is None:
            return commit.Missing()
        noun = msgspec.structs.replace(
            old.noun,
            metadata={**old.noun.metadata, **(metadata or {})},
            external_id=old.noun.external_id if external_id is None else external_id,
            name=old.noun.name if name is None else name,
        )
        if noun == old.noun:
            return commit.Done(old, changed=False)
        noun = msgspec.structs.replace(noun, tx=reading.tx)
        return commit.Write(
            (reading.put(schema.instance(instance), noun),),
            lambda revision: commit.Done(commit.kept(noun, revision, old)),
        )

    return await writer.run(snapshot, rule, until_ns=until_ns)


async def forget(writer: commit.Writer, snapshot: view.Snapshot, instances: Sequence[Instance]) -> int | commit.Lost:
    """Remove Terminated instances, their outputs, and each script when no other instance of its request is left: all
    in one transaction, but for those that are not as they were any more. Answers with how many went."""

    def rule(reading: commit.Reading) -> commit.Write[int | commit.Lost] | int:
        keys: list[str] = []
        users: dict[str, int] = {}
        count = 0
        for instance in instances:
            id = instance.noun.id
            known = snapshot.instance(id)
            step = None if known is None else lifecycle.step(known.noun.state, Event.FORGOTTEN)
            if known is None or known.revision != instance.revision or step is None or step.state is not None:
                continue
            reading.instance(id)
            count += 1
            keys.append(schema.instance(id))
            script = known.noun.spec.script
            if script is not None or known.noun.script_result is not None:
                keys += [schema.output(id, stream) for stream in ("stdout", "stderr")]
            if script is not None:
                users[script.key] = users.get(script.key, 0) + 1
        keys += [schema.script(key) for key, gone in users.items() if snapshot.script_users(key) <= gone]
        return commit.Write(tuple(base.Delete(key) for key in keys), lambda _: count) if count else 0

    return await writer.once(snapshot, rule)


def owns(instance: model.Instance, node: model.NodeId, epoch: int) -> bool:
    """Whether an instance may still want the VM of this epoch on this node, or one that is newer than it knows: such
    a VM is never ordered destroyed. One that its node said to be gone is wanted no more, should it turn up again."""
    if epoch > instance.epoch:
        return True
    here = instance.node == node and instance.epoch == epoch
    return here and not instance.released and instance.state != model.State.TERMINATED
