"""Closing the door on a start whose caller was told "unsure" (safety S15): it comes to nothing, or stays for a repeat.

    not stored                    its births are closed: a copy that arrives late does nothing
    with an Idempotency-Key       stays: a repeat may find it at any time
    with external_id and name     stays if a repeat was answered with it, and so left its mark in the record of the two.
                                  Else the record goes, so that no repeat finds it from here on, and it is ended
    with neither                  is ended

A restore takes marks away, and brings records back (safety S18). So of a start that may be repeated nothing is closed
or removed unless the store is proved, a second before at most, to be the one in which the start began: it takes longer
to stop and restore one. After a break everything stays, as for all that anybody knows somebody was answered with it: it
is listed under its names, and the cloud's history says why. What a node still tells of it is not shut out either; a
late copy is, by the break itself.
"""

import asyncio
from enum import Enum, auto
from typing import NamedTuple

from covey import errors, lifecycle, model, observe
from covey.store import base, commit, commit_cloud, commit_instances, schema, spans, view

_PAUSE_S = 1.0
_LIMIT_NS = 60_000_000_000
_PROOF_NS = 1_000_000_000
_WHY_STAYS = "the reply to the start request was lost, and then the store was restored: a repeat may have been answered"

_log = observe.log("door")


class GivenUp(NamedTuple):
    """A start whose outcome its caller was not told."""

    ids: tuple[model.InstanceId, ...]
    keyed: bool  # it had an Idempotency-Key
    twin: str  # the key of its record by external_id and name, or ""
    breach: str  # the newest break when it began


class _Came(Enum):
    """What came of it."""

    NOTHING = auto()
    STAYS = auto()
    UNWANTED = auto()


async def close(writer: commit.Writer, start: GivenUp) -> None:
    """Try until it is settled."""
    while True:
        try:
            came = await settle(writer, start)
            break
        except (errors.Unsure, errors.Unavailable):
            await asyncio.sleep(_PAUSE_S)
        except errors.StoreError as error:
            _log.error("a start whose reply was lost could not be settled", ids=start.ids, error=str(error))
            return
    if came is not _Came.NOTHING:
        _log.warning("a start whose reply was lost had happened", ids=start.ids, kept=came is _Came.STAYS)


async def settle(writer: commit.Writer, start: GivenUp) -> _Came:
    """Raises Unsure or Unavailable: look again. Of a start that cannot be repeated it rests on nothing that was seen
    before, so a break does not shut it out."""
    snapshot, began_ns, span_ns, restored = view.Snapshot(), writer.world.boot_ns(), _LIMIT_NS, False
    if start.keyed or start.twin:
        past = await commit_cloud.prove(writer.store)
        past.guard(snapshot)
        span_ns, restored = _PROOF_NS, past.newest_break != start.breach

    def rule(reading: commit.Reading) -> commit.Write[_Came] | _Came:
        return _verdict(reading, start, writer.who, restored=restored)

    came = await writer.run(snapshot, rule, until_ns=began_ns + span_ns, sure=True)
    if came is _Came.UNWANTED:
        for id in start.ids:
            await end(writer, start, id)
    return came


def _verdict(reading: commit.Reading, start: GivenUp, who: str, *, restored: bool) -> commit.Write[_Came] | _Came:
    born = [reading.born(id) for id in start.ids]
    if born[0] is None:  # all or none: one stands for all
        return _Came.NOTHING if restored else _closed(reading, start)
    if born[0].noun.closed:
        return _Came.NOTHING
    if restored:
        decision = model.Decision(who=who, why=_WHY_STAYS)
        event = reading.event("kept", start.ids[0], decision, count=str(len(start.ids)))
        return commit.Write((event,), lambda _: _Came.STAYS)
    if start.keyed:
        return _Came.STAYS
    if not start.twin:
        return _Came.UNWANTED
    record = reading.remembered(start.twin)
    if record is None or record.noun.ids != start.ids:  # another start has its place: only to prove
        return commit.Write((), lambda _: _Came.UNWANTED)
    if record.noun.tx != born[0].noun.tx:  # a repeat was answered with these instances
        return _Came.STAYS
    return commit.Write((base.Delete(start.twin),), lambda _: _Came.UNWANTED)


def _closed(reading: commit.Reading, start: GivenUp) -> commit.Write[_Came]:
    born = schema.encode(schema.Born(tx=reading.tx, closed=True))
    puts = tuple(base.Put(schema.born(id), born, spans.DAY) for id in start.ids)
    return commit.Write(puts, lambda _: _Came.NOTHING)


async def end(writer: commit.Writer, start: GivenUp, id: model.InstanceId) -> None:
    """Terminate one that nobody was answered with, nor can be: its record is gone, and stays so."""
    decision = model.Decision(who=writer.who, why="the reply to the start request was lost", at_ns=0)

    def rule(reading: commit.Reading) -> commit.Write[commit_instances.Ended] | commit_instances.Outcome:
        record = reading.remembered(start.twin) if start.twin else None
        if record is not None and record.noun.ids == start.ids:
            raise errors.Unavailable("the store was restored meanwhile")
        old = reading.instance(id)
        if old is None:
            return commit.Missing()
        return commit_instances.ended(reading, old, lifecycle.Event.TERMINATE, decision)

    until_ns = writer.world.boot_ns() + _LIMIT_NS
    await writer.run(view.Snapshot(), rule, until_ns=until_ns, sure=True)
