"""The cloud itself: bootstrap, the chain of history nonces (safety S18), controllers, sweeping what is left over."""

from collections.abc import Iterable
from typing import NamedTuple

import msgspec

from covey.store import base, commit, schema, view

_DELETES = 100  # per transaction


class Cloud(NamedTuple):
    id: str
    history: str  # the nonce just added


class WrongFormat(NamedTuple):
    """The store's data has another format than this program writes."""

    found: str


async def start(writer: commit.Writer) -> Cloud | WrongFormat:
    """At each controller start, before anything else: writes format and cloud id once, and adds a history nonce."""
    wanted = schema.encode(schema.Format(format=schema.FORMAT))
    cloud = schema.encode(schema.Cloud(id=writer.world.uuid()))
    txn = base.Txn(
        (base.absent(schema.FORMAT_KEY), base.absent(schema.CLOUD)),
        (base.Put(schema.FORMAT_KEY, wanted), base.Put(schema.CLOUD, cloud)),
        (base.Get(schema.FORMAT_KEY), base.Get(schema.CLOUD)),
    )
    outcome = await writer.settle(txn, writer.world.boot_ns() + commit.LIMIT_NS)
    if not outcome.succeeded:
        found, named = outcome.got
        if found is None or found.value != wanted or named is None:
            return WrongFormat("none" if found is None else found.value.decode("utf-8", "replace"))
        cloud = named.value
    id = msgspec.json.decode(cloud, type=schema.Cloud).id
    return Cloud(id, await add_nonce(writer))


async def add_nonce(writer: commit.Writer) -> str:
    """Lengthen the history chain (at each start, hourly, and after each backup)."""
    nonce = writer.world.token()

    def rule(reading: commit.Reading) -> commit.Write[str] | str:
        value = schema.encode(schema.Nonce(at_ns=reading.now_ns))
        return commit.Write((base.Put(schema.nonce(nonce), value, commit.MONTH),), lambda _: nonce)

    return await writer.run(view.Snapshot(), rule)


async def announce(writer: commit.Writer, controller: schema.Controller, lease: base.Lease) -> None:
    """This controller is there as long as `lease` lives. Its key is its own: nothing is compared."""

    def rule(_reading: commit.Reading) -> commit.Write[int] | int:
        value = schema.encode(controller)
        return commit.Write((base.Put(schema.controller(controller.id), value, lease.id),), lambda revision: revision)

    await writer.run(view.Snapshot(), rule)


async def sweep(writer: commit.Writer, leftovers: Iterable[base.Kv]) -> int:
    """Delete keys that nothing refers to (scripts, outputs, remembered requests beyond the limit), each guarded on
    being as it was seen. Answers with how many went."""
    done = 0
    batch = list(leftovers)
    for start in range(0, len(batch), _DELETES):
        part = batch[start : start + _DELETES]
        compares = (writer.format_guard, *(base.unchanged(kv.key, kv.mod_revision) for kv in part))
        txn = base.Txn(compares, tuple(base.Delete(kv.key) for kv in part))
        outcome = await writer.settle(txn, writer.world.boot_ns() + commit.LIMIT_NS)
        done += len(part) if outcome.succeeded else 0
    return done
