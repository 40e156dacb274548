"""What a transaction may hold: etcd's limits, kept by every store so that all refuse the same.

    etcd counts per level   max(compares, then, otherwise) ≤ 128 − what the levels above it took   (--max-txn-ops)
    and per request         1.5 MiB                                                                (--max-request-bytes)

A `base.Txn` with more writes than one level takes is sent as one level of chunks (`chunk_size`): its compares stay
outside and guard all of them. That makes room for some 120 compares and about a thousand writes.
"""

from collections.abc import Sequence
from typing import NamedTuple

from covey import errors
from covey.store import base

MAX_OPS = 128  # etcd's default of --max-txn-ops
MAX_BYTES = 1_500_000  # etcd's default of --max-request-bytes is 1,572,864; the rest is for its own envelope


class Weight(NamedTuple):
    """What a transaction takes of a batch: operations of its level (more than there are when it needs chunks), and an
    upper estimate of its bytes on the wire."""

    ops: int
    size_bytes: int


def check(txn: base.Txn) -> Weight:
    """What `txn` weighs. Raises Rejected when no store takes it."""
    if len(txn.compares) > MAX_OPS:
        raise errors.Rejected(f"{len(txn.compares)} compares in one transaction; {MAX_OPS} are the limit")
    size = 64
    try:
        for compare in txn.compares:
            size += _key_size(compare.key) + len(compare.value)
        for op in (*txn.then, *txn.otherwise):
            size += _key_size(op.key)
            if isinstance(op, base.Put):
                size += len(op.value)
            elif isinstance(op, base.Delete) and op.end:
                size += len(base.to_bytes(op.end))
    except UnicodeEncodeError as fault:
        raise errors.Rejected(f"a key cannot be written as bytes: {fault}") from None
    if size > MAX_BYTES:
        raise errors.Rejected(f"the transaction has {size} bytes; {MAX_BYTES} are the limit")
    chunk_size(txn)
    for branch in (txn.then, txn.otherwise):
        if len(branch) > 1:
            _check_written_once(branch)
    return Weight(max(len(txn.compares), len(txn.then), len(txn.otherwise)), size)


def chunk_size(txn: base.Txn) -> int:
    """How many operations of a branch that one level does not take travel in one chunk; 0 when both branches fit.
    Raises Rejected when nothing fits."""
    branches = [len(txn.then), len(txn.otherwise)]
    largest = max(branches)
    if largest <= MAX_OPS:
        return 0
    beside = max(len(txn.compares), min(branches) if min(branches) <= MAX_OPS else 0)
    for chunks in range(2, MAX_OPS):
        room = MAX_OPS - max(chunks, beside)
        if chunks * room >= largest:
            return room
    raise errors.Rejected(f"{largest} operations beside {beside} others are too many for one transaction")


def _key_size(key: str) -> int:
    if not key:
        raise errors.Rejected("a key is empty")
    return len(key) + 48 if key.isascii() else len(base.to_bytes(key)) + 48


def _check_written_once(branch: Sequence[base.Op]) -> None:
    put: set[str] = set()
    for op in branch:
        if isinstance(op, base.Put):
            if op.key in put:
                raise errors.Rejected(f"duplicate key in one transaction: {op.key}")
            put.add(op.key)
    for op in branch:
        if isinstance(op, base.Delete):
            hit = next((key for key in put if base.within(key, op.key, op.end)), None) if op.end else op.key
            if hit in put:
                raise errors.Rejected(f"duplicate key in one transaction: {hit}")
