"""What a version was when it was last started: for starts while no registry can say (safety S14).

Written by whoever asked a registry, read only by who got no answer. The newest writer wins: a record says what some
registry answered not long ago, and nothing more is promised. It lives for a month after it was last written.
"""

from typing import NamedTuple

from covey.store import base, codec, commit, schema, spans, view


class Asked(NamedTuple):
    """A version in a start's words; "" and None for what was not given."""

    template: str
    tag: str
    version: int | None


async def learn(writer: commit.Writer, snapshot: view.Snapshot, asked: Asked, pin: schema.Pin) -> None:
    """Raises StoreError: then it is not known whether it was written."""
    await _write(writer, snapshot, base.Put(schema.pin(*asked), schema.encode(pin), spans.MONTH))


async def recall(store: base.Store, asked: Asked) -> schema.Pin | None:
    """Raises StoreError."""
    for kv in (await store.range(schema.pin(*asked))).kvs:
        try:
            return codec.decode(kv, schema.Pin).noun
        except codec.Broken:
            return None
    return None


async def forget(writer: commit.Writer, snapshot: view.Snapshot, asked: Asked) -> None:
    """A registry said that there is no such version. Reads before it writes, since most of those were never known.
    Raises StoreError."""
    key = schema.pin(*asked)
    if (await writer.store.range(key)).kvs:
        await _write(writer, snapshot, base.Delete(key))


async def _write(writer: commit.Writer, snapshot: view.Snapshot, op: base.Op) -> None:
    def rule(_: commit.Reading) -> commit.Write[int] | int:
        return commit.Write((op,), lambda revision: revision)

    await writer.run(snapshot, rule)
