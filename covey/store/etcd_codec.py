"""From the store's words to etcd's messages and back.

A transaction has three shapes on the wire:

    plain     compares → then | otherwise
    chunked   compares → [chunk, chunk, …] | […]        more operations than one level takes; a chunk is a nested
                                                        transaction without compares, so it always runs
    batch     shared → [transaction, transaction, …]    group commit (safety S23); each keeps its own outcome. What all
                                                        compare first is compared once for all: when it does not hold,
                                                        none of them happens

etcd evaluates the compares of all levels before the first write, and everything gets one revision.
"""

from collections.abc import Iterable, Iterator, Sequence

from covey.store import base, limits
from covey.store.etcdpb import etcd_pb2 as pb


def txn(txn: base.Txn, skipped: int = 0) -> pb.TxnRequest:
    """Plain or chunked, without the first `skipped` compares."""
    chunk = limits.chunk_size(txn)
    return pb.TxnRequest(
        compare=[_compare(compare) for compare in txn.compares[skipped:]],
        success=_branch(txn.then, chunk),
        failure=_branch(txn.otherwise, chunk),
    )


def batch(txns: Sequence[base.Txn]) -> pb.TxnRequest:
    """Independent transactions as one."""
    shared = _shared(txns)
    return pb.TxnRequest(
        compare=[_compare(compare) for compare in shared],
        success=[pb.RequestOp(request_txn=txn(one, len(shared))) for one in txns],
    )


def _shared(txns: Sequence[base.Txn]) -> tuple[base.Compare, ...]:
    """What all of them compare first; nothing when one of them has something to do should it not hold."""
    first = txns[0].compares[:1]
    return () if any(one.otherwise or one.compares[:1] != first for one in txns) else first


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


def _compare(compare: base.Compare) -> pb.Compare:
    key = base.to_bytes(compare.key)
    match compare.target:
        case base.Target.CREATE:
            return pb.Compare(key=key, target=pb.Compare.CREATE, create_revision=compare.revision)
        case base.Target.MOD:
            return pb.Compare(key=key, target=pb.Compare.MOD, mod_revision=compare.revision)
        case base.Target.VALUE:
            return pb.Compare(key=key, target=pb.Compare.VALUE, value=compare.value)


def _branch(ops: Sequence[base.Op], chunk: int) -> list[pb.RequestOp]:
    requests = [_op(op) for op in ops]
    if len(requests) <= limits.MAX_OPS:
        return requests
    chunks = (requests[start : start + chunk] for start in range(0, len(requests), chunk))
    return [pb.RequestOp(request_txn=pb.TxnRequest(success=some)) for some in chunks]


def _op(op: base.Op) -> pb.RequestOp:
    key = base.to_bytes(op.key)
    match op:
        case base.Put():
            return pb.RequestOp(request_put=pb.PutRequest(key=key, value=op.value, lease=op.lease))
        case base.Delete():
            end = base.to_bytes(op.end)
            return pb.RequestOp(request_delete_range=pb.DeleteRangeRequest(key=key, range_end=end))
        case base.Get():
            return pb.RequestOp(request_range=pb.RangeRequest(key=key))


def _got(responses: Iterable[pb.ResponseOp]) -> Iterator[base.Kv | None]:
    """The answers of the Gets, in order, whatever chunk they travelled in."""
    for response in responses:
        if response.HasField("response_range"):
            kvs = response.response_range.kvs
            yield kv(kvs[0]) if kvs else None
        elif response.HasField("response_txn"):
            yield from _got(response.response_txn.responses)
