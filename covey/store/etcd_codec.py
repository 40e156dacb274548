"""From the store's words to etcd's messages and back.

A transaction has three shapes on the wire:

    plain     compares → then | otherwise
    chunked   compares → [chunk, chunk, …] | […]        more operations than one level takes; a chunk is a nested
                                                        transaction without compares, so it always runs
    batch     shared → [transaction, transaction, …]    group commit (safety S23); each keeps its own outcome. What all
                                                        compare first is compared once for all: when it does not hold,
                                                        none of them happens

etcd evaluates the compares of all levels before the first write, and everything gets one revision.

A plain one without any operation is only a question. etcd takes a transaction for linearizable by the reads in it, and
answers one that has none from what the member at hand has applied, which may lack what was answered elsewhere (server
v3_server.go, `isTxnSerializable`, 3.4 and 3.5). So it is given a read of its first compare, for the case that it loses.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol

from covey.store import base, limits
from covey.store.etcdpb import etcd_pb2 as pb


def txn(txn: base.Txn) -> pb.TxnRequest:
    """Plain or chunked."""
    request = pb.TxnRequest()
    _fill(request, txn)
    if _is_question(txn):
        request.failure.add().request_range.key = base.to_bytes(
            txn.compares[0].key if txn.compares else base.EVERYTHING
        )
    return request


def batch(txns: Sequence[base.Txn]) -> pb.TxnRequest:
    """Independent transactions as one."""
    shared = _shared(txns)
    request = pb.TxnRequest()
    for compare in shared:
        _fill_compare(request.compare.add(), compare)
    for one in txns:
        _fill(request.success.add().request_txn, one, len(shared))
    return request


def _shared(txns: Sequence[base.Txn]) -> tuple[base.Compare, ...]:
    """What all of them compare first; nothing when one of them has something to do should it not hold."""
    first = txns[0].compares[:1]
    return () if any(one.otherwise or one.compares[:1] != first for one in txns) else first


def answered(answer: pb.TxnResponse, txn: base.Txn) -> base.Outcome:
    """What a transaction that travelled alone gave."""
    if _is_question(txn):
        return base.Outcome(answer.succeeded, answer.header.revision)
    return outcome(answer, answer.header.revision)


def _is_question(txn: base.Txn) -> bool:
    return not (txn.then or txn.otherwise)


def outcomes(answer: pb.TxnResponse, count: int) -> list[base.Outcome]:
    """What each of a batch's `count` transactions gave."""
    revision = answer.header.revision
    if not answer.succeeded:
        return [base.Outcome(False, revision)] * count
    return [outcome(response.response_txn, revision) for response in answer.responses]


def outcome(answer: pb.TxnResponse, revision: int) -> base.Outcome:
    """What a transaction gave; `revision` is that of the outermost answer."""
    return base.Outcome(answer.succeeded, revision, tuple(_got(answer.responses)))


def kv(message: pb.KeyValue) -> base.Kv:
    return base.Kv(
        base.to_text(message.key), message.value, message.create_revision, message.mod_revision, message.lease
    )


def change(event: pb.Event) -> base.Change:
    if event.type == pb.Event.DELETE:
        return base.Change(base.to_text(event.kv.key), None)
    return base.Change(base.to_text(event.kv.key), kv(event.kv))


# Messages are filled where they stand: one that is made first and then put into another is copied, level by level.


def _fill(request: pb.TxnRequest, txn: base.Txn, skipped: int = 0) -> None:
    """`txn` without its first `skipped` compares."""
    request.SetInParent()  # also when there is nothing to say
    for compare in txn.compares[skipped:]:
        _fill_compare(request.compare.add(), compare)
    chunk = limits.chunk_size(txn)
    _fill_branch(request.success, txn.then, chunk)
    _fill_branch(request.failure, txn.otherwise, chunk)


def _fill_compare(to: pb.Compare, compare: base.Compare) -> None:
    to.key = base.to_bytes(compare.key)
    match compare.target:
        case base.Target.CREATE:
            to.target = pb.Compare.CREATE
            to.create_revision = compare.revision
        case base.Target.MOD:
            to.target = pb.Compare.MOD
            to.mod_revision = compare.revision
        case base.Target.VALUE:
            to.target = pb.Compare.VALUE
            to.value = compare.value


class _Ops(Protocol):
    """A branch of a transaction."""

    def add(self) -> pb.RequestOp: ...


def _fill_branch(branch: _Ops, ops: Sequence[base.Op], chunk: int) -> None:
    if len(ops) <= limits.MAX_OPS:
        _fill_ops(branch, ops)
        return
    for start in range(0, len(ops), chunk):
        _fill_ops(branch.add().request_txn.success, ops[start : start + chunk])


def _fill_ops(branch: _Ops, ops: Sequence[base.Op]) -> None:
    for op in ops:
        to, key = branch.add(), base.to_bytes(op.key)
        match op:
            case base.Put():
                put = to.request_put
                put.key, put.value, put.lease = key, op.value, op.lease
            case base.Delete():
                to.request_delete_range.key = key
                to.request_delete_range.range_end = base.to_bytes(op.end)
            case base.Get():
                to.request_range.key = key


def _got(responses: Iterable[pb.ResponseOp]) -> Iterator[base.Kv | None]:
    """The answers of the Gets, in order, whatever chunk they travelled in."""
    for response in responses:
        if response.HasField("response_range"):
            kvs = response.response_range.kvs
            yield kv(kvs[0]) if kvs else None
        elif response.HasField("response_txn"):
            yield from _got(response.response_txn.responses)
