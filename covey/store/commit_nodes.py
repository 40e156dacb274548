"""Nodes: join, leave, remove, configure, their word, and orders to destroy (safety S2, S7, S11, S12)."""

import hashlib
import hmac
import uuid
from collections.abc import Mapping
from enum import StrEnum
from typing import NamedTuple

import msgspec

from covey import lifecycle, model, wire
from covey.store import base, codec, commit, commit_instances, schema, spans, view

_CLAIMS = 25  # dealt with per transaction when a node is removed: each compares and writes several keys
_NAMES = uuid.UUID("0b8f4f0e-8a0c-5c6b-9a53-6d3c2f9e7a10")  # the name space of node ids
_ROUNDS = 1000
_SESSIONS = 1 << 40  # more than any agent ever begins


class Joined(NamedTuple):
    """`session.noun.counter` is the new life; the agent's lease is session.noun.lease."""

    session: codec.Kept[model.Session]
    node: codec.Kept[model.Node]
    repeated: bool = False


class Why(StrEnum):
    """Why a join is refused."""

    REMOVED = "the node was removed"  # 410
    SECRET = "the last session's secret is wrong: another agent has taken this node over"  # noqa: S105 (409)
    HOST = "the node id belongs to another host"  # a data directory that was copied and changed
    ALIVE = "the node's last session is still alive"  # 409; explicit join: wait until its lease has ended
    UNKNOWN = "the node is not known here"  # hold; `covey join` registers it again
    CLOUD = "the agent belongs to another cloud"


class JoinRefused(NamedTuple):
    why: Why


JoinAnswer = Joined | JoinRefused


class StillClaimed(NamedTuple):
    """Leaving is refused: these instances hold claims on the node."""

    instances: tuple[model.InstanceId, ...]


class Left(NamedTuple):
    node: model.NodeId


def node_id(join: wire.Join) -> model.NodeId:
    """The id a join is about. As long as its agent knows none it follows from the key of its data directory, so that
    a join whose answer was lost is of the same node when it comes again, also from the agent's next life: no node is
    left behind that nobody is (safety S7)."""
    return join.node or model.NodeId(str(uuid.uuid5(_NAMES, join.host_key)))


async def join(writer: commit.Writer, snapshot: view.Snapshot, join: wire.Join, until_ns: int = 0) -> JoinAnswer:
    """A new life of an agent (safety S7): grants its lease, replaces the session, writes the alive key; at the first
    join also the node and its empty ledger. The same join repeated (its reply was lost) gets the same answer.

    A removed node may come back by its operator's word only, once nothing is left to clear: then the orders that its
    removal gave reach it (safety S12)."""
    if join.cloud and snapshot.cloud and join.cloud != snapshot.cloud:
        return JoinRefused(Why.CLOUD)
    lease = await writer.store.grant(wire.LEASE_TTL_S)
    id = node_id(join)

    def rule(reading: commit.Reading) -> commit.Write[JoinAnswer] | JoinAnswer:
        if reading.removed(id) is not None and not (join.explicit and reading.ledger(id) is None):
            return JoinRefused(Why.REMOVED)
        last = reading.session(id)
        alive = reading.alive(id)
        node = reading.node(id)
        if _is_repeat(join, last, alive) and last is not None and node is not None:
            return Joined(last, node, repeated=True)
        why = _refusal(join, last, alive is not None, _forgotten(snapshot, join, id))
        return JoinRefused(why) if why is not None else _joined(reading, join, id, lease.id)

    answer: JoinAnswer = await writer.run(snapshot, rule, until_ns=until_ns)
    if isinstance(answer, JoinRefused) or answer.repeated:
        await lease.revoke()
    return answer


def _is_repeat(join: wire.Join, last: codec.Kept[model.Session] | None, alive: codec.Kept[schema.Alive] | None) -> bool:
    return (
        last is not None and alive is not None and _matches(join.secret, last) and join.host_key == last.noun.host_key
    )


def _forgotten(snapshot: view.Snapshot, join: wire.Join, node: model.NodeId) -> bool:
    """Whether a restored store may have forgotten this node, or its newer secrets: it has not told what it has since
    (safety S19). What it begins is held."""
    return snapshot.held(node) and join.cloud == snapshot.cloud != ""


def _refusal(
    join: wire.Join, last: codec.Kept[model.Session] | None, alive: bool, forgotten: bool = False
) -> Why | None:
    """Who may begin a new life of a node: who knows the last secret, on the same host; or an operator, after it. A
    store that was restored takes the host's key for it, which nobody else was ever told."""
    if last is None:
        return Why.UNKNOWN if join.node and not join.explicit and not forgotten else None
    if join.host_key != last.noun.host_key:
        return Why.HOST
    if forgotten or _matches(join.last_secret, last) or _matches(join.secret, last):
        return None
    if not join.explicit:
        return Why.SECRET
    return Why.ALIVE if alive else None


def _joined(reading: commit.Reading, join: wire.Join, id: model.NodeId, lease: int) -> commit.Write[JoinAnswer]:
    last, old, removed = reading.session(id), reading.node(id), reading.removed(id)
    counter = last.noun.counter if last is not None else removed.noun.session if removed is not None else 0
    counter = 1 + max(counter, min(join.last_session, _SESSIONS))
    session = model.Session(
        node=id,
        counter=counter,
        secret_sha256=_sha(join.secret),
        host_key=join.host_key,
        lease=lease,
        facts=join.facts,
        started_ns=reading.now_ns,
        tx=reading.tx,
    )
    node = old.noun if old is not None else model.Node(id=id, created_ns=reading.now_ns, tx=reading.tx)
    decision = model.Decision(who=id, why="the operator joined it" if join.explicit else "its agent started")
    ops: list[base.Op] = [
        reading.put(schema.session(id), session),
        reading.put(schema.alive(id), schema.Alive(session=counter), lease),
        reading.event("joined", id, decision, session=str(counter)),
    ]
    if old is None:
        ops.append(reading.put(schema.node(id), node))
    if reading.ledger(id) is None:
        ops.append(reading.put(schema.ledger(id), model.Ledger(node=id, tx=reading.tx)))
    if removed is not None:
        ops.append(base.Delete(schema.removed(id)))
    breach = reading.snapshot.breach.nonce
    if breach and not join.node:  # its first join: it has nothing to tell (safety S19)
        ops.append(reading.put(schema.adopted(id), schema.Adopted(nonce=breach, tx=reading.tx)))
    return commit.Write(
        tuple(ops),
        lambda revision: Joined(commit.kept(session, revision, last), old or commit.kept(node, revision)),
    )


async def leave(
    writer: commit.Writer,
    snapshot: view.Snapshot,
    node: model.NodeId,
    session: int,
    *,
    force: bool,
    who: str,
    until_ns: int = 0,
) -> Left | StillClaimed | commit.Lost | commit.Missing:
    """The agent leaves for good. With `force` and claims it is a removal."""
    Answer = Left | StillClaimed | commit.Lost | commit.Missing

    def rule(reading: commit.Reading) -> commit.Write[Answer] | Answer:
        life = reading.session(node)
        if life is None:
            return commit.Missing()
        if life.noun.counter != session:
            return commit.Lost("another life of this agent has taken over")
        ledger = reading.ledger(node)
        if ledger is not None and ledger.noun.claims:
            return StillClaimed(tuple(claim.instance for claim in ledger.noun.claims))
        decision = model.Decision(who=who, why="the agent left")
        orders = [order.noun.instance for order in snapshot.orders_on(node)][:_CLAIMS]
        known = (schema.order(node, id) for id in orders if reading.order(node, id) is not None)
        ops: dict[str, base.Op] = {key: base.Delete(key) for key in (*_life_keys(node), schema.ledger(node), *known)}
        breach = reading.snapshot.breach.nonce
        if breach:  # else its agent, as long as it runs, would look like one of a node that the restore has lost
            mark = schema.Adopted(nonce=breach, tx=reading.tx)
            ops[schema.adopted(node)] = reading.put(schema.adopted(node), mark, spans.MONTH)
        return commit.Write((*ops.values(), reading.event("left", node, decision)), lambda _: Left(node))

    answer: Answer = await writer.run(snapshot, rule, until_ns=until_ns)
    if isinstance(answer, StillClaimed) and force:
        return await remove(writer, snapshot, node, who, until_ns)
    return answer


async def remove(
    writer: commit.Writer, snapshot: view.Snapshot, node: model.NodeId, who: str, until_ns: int = 0
) -> Left | commit.Missing:
    """An operator removes the node (safety S12): first its session and life end and it is marked removed; then, in as
    many transactions as needed (the loop finishes what a crash left), its instances go to Error and its claims become
    destroy orders."""

    def rule(reading: commit.Reading) -> commit.Write[Left | commit.Missing] | Left | commit.Missing:
        if reading.removed(node) is not None:
            return Left(node)
        life = reading.session(node)
        if reading.node(node) is None and life is None:
            return commit.Missing()
        mark = schema.Removed(at_ns=reading.now_ns, session=0 if life is None else life.noun.counter)
        ops: tuple[base.Op, ...] = (
            reading.put(schema.removed(node), mark),
            *map(base.Delete, _life_keys(node)),
            reading.event("removed", node, model.Decision(who=who, why="the operator removed it")),
        )
        return commit.Write(ops, lambda _: Left(node))

    answer: Left | commit.Missing = await writer.run(snapshot, rule, until_ns=until_ns)
    if isinstance(answer, Left):
        for _ in range(_ROUNDS):
            if not await clear_removed(writer, snapshot, node, who, until_ns):
                break
    return answer


def _life_keys(node: model.NodeId) -> tuple[str, ...]:
    return (schema.node(node), schema.session(node), schema.alive(node), schema.word(node), schema.adopted(node))


async def clear_removed(
    writer: commit.Writer, snapshot: view.Snapshot, node: model.NodeId, who: str, until_ns: int = 0
) -> bool:
    """One step of clearing a removed node's ledger; True while there is more to do."""
    decision = model.Decision(who=who, why="its node was removed")

    def rule(reading: commit.Reading) -> commit.Write[bool] | bool:
        ledger = reading.ledger(node)
        if ledger is None or reading.removed(node) is None:
            return False
        now, rest = ledger.noun.claims[:_CLAIMS], ledger.noun.claims[_CLAIMS:]
        ops: dict[str, base.Op] = {}
        for claim in now:
            for op in _cleared(reading, node, claim, decision):
                ops[op.key] = op
        key = schema.ledger(node)
        left = msgspec.structs.replace(ledger.noun, claims=rest, tx=reading.tx)
        ops[key] = reading.put(key, left) if rest else base.Delete(key)
        return commit.Write(tuple(ops.values()), lambda _: bool(rest))

    return await writer.run(snapshot, rule, until_ns=until_ns, sure=True)


def _cleared(
    reading: commit.Reading, node: model.NodeId, claim: model.Claim, decision: model.Decision
) -> list[base.Op]:
    """A claim of a removed node becomes an order, which waits a month for the node to be joined again; the instance
    that held it ends. An instance that cannot be read is left alone."""
    epoch = claim.epoch
    known = reading.order(node, claim.instance)
    if known is not None:
        epoch = max(epoch, known.noun.epoch)
    order = model.Order(node=node, instance=claim.instance, epoch=epoch, decision=decision, tx=reading.tx)
    ops: list[base.Op] = [reading.put(schema.order(node, claim.instance), order, spans.MONTH)]
    try:
        old = reading.instance(claim.instance)
    except codec.Broken:
        return ops
    if old is not None and old.noun.node == node and old.noun.claimed:
        new = commit.stepped(
            old.noun, lifecycle.Event.NODE_REMOVED, reading, released=True, message="Its node was removed"
        )
        if new is not None:
            ops += (reading.put(schema.instance(new.id), new), reading.event("node-removed", new.id, decision))
    return ops


async def configure(
    writer: commit.Writer,
    snapshot: view.Snapshot,
    node: model.NodeId,
    changes: Mapping[str, object],
    who: str,
    until_ns: int = 0,
) -> commit.Done[model.Node] | commit.Missing:
    """Set fields of the node (by their model names: name, host, max_vms, capacity_mode, drain, …)."""
    Answer = commit.Done[model.Node] | commit.Missing

    def rule(reading: commit.Reading) -> commit.Write[Answer] | Answer:
        old = reading.node(node)
        if old is None:
            return commit.Missing()
        noun = msgspec.structs.replace(old.noun, **changes)
        if noun == old.noun:
            return commit.Done(old, changed=False)
        noun = msgspec.structs.replace(noun, tx=reading.tx)
        details = {name: str(value) for name, value in changes.items()}
        ops = (
            reading.put(schema.node(node), noun),
            reading.event("configured", node, model.Decision(who=who, why="the operator set it"), **details),
        )
        return commit.Write(ops, lambda revision: commit.Done(commit.kept(noun, revision, old)))

    return await writer.run(snapshot, rule, until_ns=until_ns)


async def say(
    writer: commit.Writer,
    snapshot: view.Snapshot,
    node: model.NodeId,
    session: int,
    word: model.Word,
    until_ns: int = 0,
) -> commit.Done[model.Word] | commit.Lost:
    """The node's last word. VMs that it names and the ledger lacks enter the ledger as claims (safety S11).

    A word older than the last one is dropped: it could bring back claims that were released since.
    """
    Answer = commit.Done[model.Word] | commit.Lost
    key = schema.word(node)

    def rule(reading: commit.Reading) -> commit.Write[Answer] | Answer:
        life = reading.session(node)
        if life is None or life.noun.counter != session:
            return commit.Lost("another life of this agent has taken over")
        old = reading.word(node)
        if old is not None and (old.noun.session, old.noun.messages) >= (session, word.messages):
            return commit.Done(old, changed=False)
        noun = msgspec.structs.replace(word, node=node, session=session, at_ns=reading.now_ns, tx=reading.tx)
        ops: list[base.Op] = [reading.put(key, noun)]
        ledger = reading.snapshot.ledger(node)
        if _unclaimed(ledger, word, reading.snapshot.cloud) or reading.again:
            ledger = reading.ledger(node)
            ops += _adopted(reading, ledger, word)
        return commit.Write(tuple(ops), lambda revision: commit.Done(commit.kept(noun, revision, old)))

    return await writer.run(snapshot, rule, until_ns=until_ns)


def _unclaimed(ledger: codec.Kept[model.Ledger] | None, word: model.Word, cloud: str) -> list[model.VmSeen]:
    """VMs of this cloud that hold no claim on their node."""
    held = {(claim.instance, claim.epoch) for claim in ledger.noun.claims} if ledger is not None else set()
    return [vm for vm in word.vms if (vm.instance, vm.epoch) not in held and vm.cloud in ("", cloud)]


def _adopted(reading: commit.Reading, ledger: codec.Kept[model.Ledger] | None, word: model.Word) -> tuple[base.Op, ...]:
    """The ledger with the claims of VMs that are there although it lacks them."""
    found = _unclaimed(ledger, word, reading.snapshot.cloud)
    if ledger is None or not found:
        return ()
    claims = list(ledger.noun.claims)
    for vm in found:
        known = reading.snapshot.instance(vm.instance)
        spec = known.noun.spec if known is not None else None
        claims.append(
            model.Claim(
                instance=vm.instance,
                epoch=vm.epoch,
                vcpu=spec.vcpu if spec else 0,
                vram_mb=spec.vram_mb if spec else 0,
            )
        )
    noun = msgspec.structs.replace(ledger.noun, claims=tuple(claims), tx=reading.tx)
    return (reading.put(schema.ledger(ledger.noun.node), noun),)


async def order(
    writer: commit.Writer,
    snapshot: view.Snapshot,
    node: model.NodeId,
    instance: model.InstanceId,
    epoch: int,
    decision: model.Decision,
) -> commit.Done[model.Order] | commit.Lost:
    """Order a VM's destruction, guarded on the instance key as seen: its revision, or its absence (safety S2)."""

    Answer = commit.Done[model.Order] | commit.Lost

    def rule(reading: commit.Reading) -> commit.Write[Answer] | Answer:
        held = reading.instance(instance)
        if held is not None and commit_instances.owns(held.noun, node, epoch):
            return commit.Lost("the instance still wants it")
        old = reading.order(node, instance)
        if old is not None and old.noun.epoch >= epoch:
            return commit.Done(old, changed=False)
        noun = model.Order(
            node=node,
            instance=instance,
            epoch=epoch,
            decision=msgspec.structs.replace(decision, at_ns=reading.now_ns),
            tx=reading.tx,
        )
        ops = (
            reading.put(schema.order(node, instance), noun),
            reading.event("ordered-destroyed", instance, decision, node=node, epoch=str(epoch)),
        )
        return commit.Write(ops, lambda revision: commit.Done(commit.kept(noun, revision, old)))

    return await writer.once(snapshot, rule)


def _matches(secret: str, session: codec.Kept[model.Session]) -> bool:
    return bool(secret) and hmac.compare_digest(_sha(secret), session.noun.secret_sha256)


def _sha(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()
