"""Scheduled backups among controllers: one makes each, by a guarded claim. For thrift: two at once do no harm."""

from covey import errors
from covey.store import base, codec, commit, schema


async def read(store: base.Store) -> tuple[schema.Backup, int]:
    """The record, and the revision to guard on (0: there is none)."""
    for kv in (await store.range(schema.BACKUP)).kvs:
        try:
            return codec.decode(kv, schema.Backup).noun, kv.mod_revision
        except codec.Broken:
            return schema.Backup(), kv.mod_revision
    return schema.Backup(), 0


async def write(writer: commit.Writer, record: schema.Backup, seen: int) -> int:
    """Replace the record that was seen at that revision: the new one's revision, 0 when somebody else was faster."""
    txn = base.Txn(
        (writer.format_guard, base.unchanged(schema.BACKUP, seen)),
        (base.Put(schema.BACKUP, schema.encode(record)),),
        (base.Get(schema.BACKUP),),
    )
    outcome = await writer.settle(txn, writer.world.boot_ns() + commit.LIMIT_NS)
    if outcome.succeeded:
        return outcome.revision
    (found,) = outcome.got
    if found is not None and found.value == schema.encode(record):  # our own first copy was applied (safety S15)
        return found.mod_revision
    return 0


async def finish(writer: commit.Writer, record: schema.Backup, claimed: int) -> None:
    """Write down what became of a claim; not at all if another one has taken its place."""
    if not await write(writer, record, claimed):
        raise errors.Unavailable("another controller has claimed the backup meanwhile")
