"""Work that one of several controllers does now and then: who does it, by a guarded claim, and what became of it.

For thrift: two at once do no harm. Each kind of work has one record, whose key follows from its kind.
"""

from typing import TypeVar

from covey import errors
from covey.store import base, codec, commit, schema

R = TypeVar("R", schema.Backup, schema.Defrag)

_KEYS: dict[type[schema.Backup] | type[schema.Defrag], str] = {
    schema.Backup: schema.BACKUP,
    schema.Defrag: schema.DEFRAG,
}


async def read(store: base.Store, kind: type[R]) -> tuple[R, int]:
    """The record, and the revision to guard on (0: there is none)."""
    for kv in (await store.range(_KEYS[kind])).kvs:
        try:
            return codec.decode(kv, kind).noun, kv.mod_revision
        except codec.Broken:
            return kind(), kv.mod_revision
    return kind(), 0


async def write(writer: commit.Writer, record: R, seen: int) -> int:
    """Replace the record that was seen at that revision: the new one's revision, 0 when somebody else was faster."""
    key = _KEYS[type(record)]
    txn = base.Txn(
        (writer.format_guard, base.unchanged(key, seen)),
        (base.Put(key, schema.encode(record)),),
        (base.Get(key),),
    )
    outcome = await writer.settle(txn, writer.world.boot_ns() + commit.LIMIT_NS)
    if outcome.succeeded:
        return outcome.revision
    (found,) = outcome.got
    if found is not None and found.value == schema.encode(record):  # our own first copy was applied (safety S15)
        return found.mod_revision
    return 0


async def finish(writer: commit.Writer, record: R, claimed: int) -> None:
    """Write down what became of a claim; not at all if another one has taken its place."""
    if not await write(writer, record, claimed):
        raise errors.Unavailable("another controller has claimed this meanwhile")
