"""Questions to nodes about output that only they keep, and the answers, by way of the store (safety S26).

    ask      controller A puts ask/<node>/<slot>; every controller's mirror shows it, and so the node's poll, wherever
             that is parked, is answered with it
    answer   the node tells controller B, which puts answer/<nonce> and deletes the question in one transaction
    take     A sees the question go, reads the answer, and deletes it

So reader and node may use different controllers. A node has few slots, each created only where there was none: more
questions than that are never open at once, whoever asks. What is abandoned at any step ends with its lease.
"""

import contextlib
from typing import NamedTuple

import msgspec

from covey import errors, model
from covey.store import base, codec, commit, commit_reports, schema, spans, view


class Asked(NamedTuple):
    """The question as it stands, and where."""

    question: codec.Kept[model.Question]
    slot: int


class Busy(NamedTuple):
    """All slots of the node are taken."""


class Answered(NamedTuple):
    """`taken` False: nobody waits for this answer any more."""

    taken: bool


async def ask(
    writer: commit.Writer, snapshot: view.Snapshot, node: model.NodeId, question: model.Question, until_ns: int = 0
) -> Asked | Busy:
    """Put a question to a node; its nonce is given here."""

    def rule(reading: commit.Reading) -> commit.Write[Asked | Busy] | Asked | Busy:
        slot = next((slot for slot in range(schema.ASK_SLOTS) if reading.question(node, slot) is None), None)
        if slot is None:
            return Busy()
        own = msgspec.structs.replace(question, nonce=reading.tx)
        put = reading.put(schema.ask(node, slot), own, spans.MINUTE)
        return commit.Write((put,), lambda revision: Asked(commit.kept(own, revision), slot))

    return await writer.run(snapshot, rule, until_ns=until_ns, sure=True)


async def answer(
    writer: commit.Writer,
    snapshot: view.Snapshot,
    node: model.NodeId,
    session: int,
    nonce: str,
    output: model.Output | None,
    fault: str,
    until_ns: int = 0,
) -> Answered | commit_reports.StaleSession:
    """The node's answer to a question that is still open; the question ends with it."""

    def rule(
        reading: commit.Reading,
    ) -> commit.Write[Answered | commit_reports.StaleSession] | Answered | commit_reports.StaleSession:
        life = reading.session(node)
        if life is None or life.noun.counter != session:
            return commit_reports.StaleSession()
        slot = _slot(reading, node, nonce)
        if slot is None or reading.answer(nonce) is not None:
            return Answered(False)
        noun = schema.Answer(output=output, fault=fault, tx=reading.tx)
        ops = (
            reading.put(schema.answer(nonce), noun, spans.MINUTE),
            base.Delete(schema.ask(node, slot)),
        )
        return commit.Write(ops, lambda _: Answered(True))

    return await writer.run(snapshot, rule, until_ns=until_ns)


async def take(writer: commit.Writer, nonce: str) -> schema.Answer | None:
    """The answer, which is then removed from the store; None when there is none."""
    key = schema.answer(nonce)
    page = await writer.store.range(key)
    if not page.kvs:
        return None
    kept = codec.decode(page.kvs[0], schema.Answer)
    writer.soon(_remove(writer, key, kept.revision))
    return kept.noun


async def withdraw(writer: commit.Writer, node: model.NodeId, asked: Asked) -> None:
    """Nobody waits any more: the question goes, if it is still there, and so does an answer that has just come."""
    await _remove(writer, schema.ask(node, asked.slot), asked.question.revision)
    with contextlib.suppress(errors.StoreError):
        await take(writer, asked.question.noun.nonce)


async def _remove(writer: commit.Writer, key: str, revision: int) -> None:
    """Delete a key if it is as it was. When that fails its lease will do it."""

    def rule(reading: commit.Reading) -> commit.Write[None] | None:
        reading.guards[key] = base.unchanged(key, revision)
        return None if reading.again else commit.Write((base.Delete(key),), lambda _: None)

    with contextlib.suppress(errors.StoreError):
        await writer.run(view.Snapshot(), rule)


def _slot(reading: commit.Reading, node: model.NodeId, nonce: str) -> int | None:
    """Where the question stands, by the snapshot and then by the guard."""
    for slot in range(schema.ASK_SLOTS):
        known = reading.snapshot.question(node, slot)
        if known is not None and known.noun.nonce == nonce:
            found = reading.question(node, slot)
            return slot if found is not None and found.noun.nonce == nonce else None
    return None
