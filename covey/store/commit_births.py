"""Creating instances: one transaction, all or none (safety S16, S17)."""

import asyncio
from collections.abc import Callable, Sequence
from typing import NamedTuple

import msgspec

from covey import errors, model
from covey.store import base, codec, commit, commit_door, schema, spans, view

# A repeat of a start finds the earlier instance only while that one may still become, or be, of use.
_SPENT = frozenset({model.State.TERMINATING, model.State.TERMINATED, model.State.ERROR})
_DOORS = 300  # starts with a lost reply that may be unsettled at once


class Start(NamedTuple):
    """A start request, accepted: one instance of `spec` for each id. `body` is the SHA-256 of the request's body.

    `key` is the Idempotency-Key's text ("" when there was none). The twin record of spec.external_id + spec.name is
    kept when both are given. `script_text` is the start script in base64, stored once under spec.script.key.
    """

    spec: model.Spec
    ids: tuple[model.InstanceId, ...]  # fresh UUIDs, 1 to 100
    who: str
    body: str = ""
    key: str = ""
    script_text: str = ""
    metadata: dict[str, str | int | bool] = {}


class Created(NamedTuple):
    """Done in this call."""

    ids: tuple[model.InstanceId, ...]
    revision: int


class Repeated(NamedTuple):
    """The same request was done before: these are its instances."""

    ids: tuple[model.InstanceId, ...]


class KeyReused(NamedTuple):
    """The Idempotency-Key belongs to a request with another body."""


Answer = Created | Repeated | KeyReused
Fits = Callable[[model.NodeId, model.Ledger], bool]


def _never(_node: model.NodeId, _ledger: model.Ledger) -> bool:
    return False


async def create(
    writer: commit.Writer,
    snapshot: view.Snapshot,
    start: Start,
    homes: Sequence[model.NodeId] = (),
    until_ns: int = 0,
    fits: Fits = _never,
) -> Answer:
    """Create all instances of `start`, or none.

    `homes`: a node for each instance (see placement), to create and place in one transaction. When a node's claims have
    changed meanwhile, `fits` says whether there is room beside them. If not, or when anything else has changed there,
    the instances are created waiting and the loop places them.
    Raises Unavailable (nothing was done) or Unsure (answer 503). After Unsure the door is being closed in the
    background: what turns up nevertheless is terminated, unless a repeat may have been answered with it (commit_door).
    """

    def rule(reading: commit.Reading) -> commit.Write[Answer] | Answer:
        repeated = _remembered(reading, start)
        if isinstance(repeated, _Twin):
            return commit.Write((repeated.touch,), lambda _: Repeated(repeated.ids))
        if repeated is not None:
            return repeated
        if any(reading.born(id) is not None for id in start.ids):
            raise errors.Unavailable("the request was given up before; nothing was done")
        placed = _placed(reading, start, homes, fits)
        return commit.Write(
            (*_births(reading, start, homes, placed), *_records(reading, start), *placed.values()),
            lambda revision: Created(start.ids, revision),
        )

    if writer.unfinished >= _DOORS:
        raise errors.Unavailable("too many starts before this one are unsettled; nothing was done")
    try:
        return await writer.run(snapshot, rule, until_ns=until_ns)
    except (errors.Unsure, asyncio.CancelledError):
        writer.soon(commit_door.close(writer, _given_up(snapshot, start)))
        raise


def _given_up(snapshot: view.Snapshot, start: Start) -> commit_door.GivenUp:
    names = (start.spec.external_id, start.spec.name)
    twin = schema.twin(*names) if all(names) else ""
    return commit_door.GivenUp(start.ids, keyed=bool(start.key), twin=twin, breach=snapshot.breach.nonce)


class _Twin(NamedTuple):
    """An earlier, equal start that is still of use. `touch` marks its record as answered to a repeat: whoever closes
    the door on it must see that somebody counts on it now."""

    ids: tuple[model.InstanceId, ...]
    touch: base.Op


def _remembered(reading: commit.Reading, start: Start) -> Answer | _Twin | None:
    """The answer of an earlier, equal request (safety S17)."""
    if start.key:
        record = reading.remembered(schema.idempotency(start.key))
        if record is not None:
            return Repeated(record.noun.ids) if record.noun.body == start.body else KeyReused()
    if start.spec.external_id and start.spec.name:
        key = schema.twin(start.spec.external_id, start.spec.name)
        record = reading.remembered(key)
        if record is not None and record.noun.body == start.body and _of_use(reading.snapshot, record):
            noun = msgspec.structs.replace(record.noun, tx=reading.tx)
            return _Twin(noun.ids, reading.put(key, noun, spans.DAY))
    return None


def _of_use(snapshot: view.Snapshot, record: codec.Kept[schema.Remembered]) -> bool:
    """Whether an instance of an earlier start still lives; one younger than the snapshot does."""
    found = [snapshot.instance(id) for id in record.noun.ids]
    if record.revision > snapshot.revision and not any(found):
        return True
    return any(instance is not None and instance.noun.state not in _SPENT for instance in found)


def _placed(
    reading: commit.Reading, start: Start, homes: Sequence[model.NodeId], fits: Fits
) -> dict[model.NodeId, base.Op]:
    """The ledgers of `homes` with the new claims; empty when one of them is not there any more, or has no room."""
    claims: dict[model.NodeId, list[model.Claim]] = {}
    for id, node in zip(start.ids, homes, strict=False):
        claims.setdefault(node, []).append(
            model.Claim(instance=id, epoch=1, vcpu=start.spec.vcpu, vram_mb=start.spec.vram_mb)
        )
    puts: dict[model.NodeId, base.Op] = {}
    for node, added in claims.items():
        ledger = reading.ledger(node)
        if ledger is None or not _lives(reading, node):
            return {}
        if reading.again and not fits(node, ledger.noun):
            return {}
        noun = model.Ledger(node=node, claims=(*ledger.noun.claims, *added), tx=reading.tx)
        puts[node] = reading.put(schema.ledger(node), noun)
    return puts


def _lives(reading: commit.Reading, node: model.NodeId) -> bool:
    """Whether the node has a session, and a sign of life, and both are those that it was chosen by."""
    life, sign = reading.session(node), reading.alive(node)
    if life is None or sign is None:
        return False
    chosen = reading.snapshot.session(node), reading.snapshot.alive(node)
    return not reading.again or (
        chosen[0] is not None
        and chosen[1] is not None
        and (life.revision, sign.created) == (chosen[0].revision, chosen[1].created)
    )


def _births(
    reading: commit.Reading, start: Start, homes: Sequence[model.NodeId], placed: dict[model.NodeId, base.Op]
) -> list[base.Op]:
    """The instances and their births. An instance's own absence follows from its birth's."""
    ops: list[base.Op] = []
    for index, id in enumerate(start.ids):
        node = homes[index] if placed else model.NOWHERE
        instance = model.Instance(
            id=id,
            spec=start.spec,
            state=model.State.PULLING if placed else model.State.SCHEDULING,
            created_ns=reading.now_ns + index,  # keeps the order of the answer when sorted
            changed_ns=reading.now_ns,
            tx=reading.tx,
            epoch=1 if placed else 0,
            node=node,
            placed_ns=reading.now_ns if placed else 0,
            metadata=start.metadata,
            external_id=start.spec.external_id,
            name=start.spec.name,
        )
        ops.append(reading.put(schema.instance(id), instance))
        ops.append(base.Put(schema.born(id), schema.encode(schema.Born(tx=reading.tx)), spans.DAY))
    return ops


def _records(reading: commit.Reading, start: Start) -> list[base.Op]:
    """What a repeat is answered from, the script, and the line of history."""
    remembered = schema.encode(schema.Remembered(tx=reading.tx, body=start.body, ids=start.ids))
    ops: list[base.Op] = []
    if start.key:
        ops.append(base.Put(schema.idempotency(start.key), remembered, spans.DAY))
    if start.spec.external_id and start.spec.name:
        ops.append(base.Put(schema.twin(start.spec.external_id, start.spec.name), remembered, spans.DAY))
    if start.spec.script is not None:
        ops.append(base.Put(schema.script(start.spec.script.key), start.script_text.encode("ascii")))
    decision = model.Decision(who=start.who, why="start request")
    ops.append(reading.event("created", start.ids[0], decision, count=str(len(start.ids))))
    return ops
