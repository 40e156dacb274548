"""On hold: waiting for the own history to come back, else telling a store that was restored what this node has (S19).

An answer of foreign history is ignored while a controller of the own history answers: the server that gave it is left
for another one, and the first answer of the own history ends the hold. Only when for ten seconds every answer said
hold is the node's knowledge told: every VM on record, and what was ordered destroyed because its instance ended. All
the while nothing is launched, stopped or destroyed.

The last answer gives the view to go on from. It is on disk before it counts, and then a new session begins, so nothing
that was granted, asked or said in the lost history has any effect. A crash or a lost answer at any point means that
all is told again, which changes nothing.
"""

from collections.abc import Iterator, Sequence

from covey import failpoint, observe, wire, world
from covey.agent import hypervisor, look, records, session
from covey.decide import convergence

PATIENCE_NS = 10 * 1_000_000_000
LEAST_ANSWERS = 3  # a host that slept has heard no more than one
PAUSE_S = 2.0  # between two polls on hold, at most
_GRAVES = 500
_LAUNCHED = (convergence.Stage.LAUNCHED, convergence.Stage.BOOTED, convergence.Stage.STOPPED)

_log = observe.log("agent")


class Adoption:
    """One node's holds. `held` and `over` are told of every answer to a poll."""

    def __init__(
        self,
        clock: world.World,
        standing: session.Session,
        known: records.Records,
        look: look.Look,
        at_once: int,
    ) -> None:
        """`at_once`: so many VMs are told in one message."""
        self._clock = clock
        self._session = standing
        self._records = known
        self._look = look
        self._at_once = at_once
        self._since_ns: int | None = None
        self._answers = 0

    def over(self) -> None:
        """An answer of the own history came."""
        self._since_ns, self._answers = None, 0

    async def held(self) -> None:
        """One more answer said hold: tell what is here, if that has been so for long enough. Raises RemoteError,
        SessionLost, HypervisorError or OSError: nothing has changed then."""
        now_ns = self._clock.boot_ns()
        if self._since_ns is None:
            self._since_ns = now_ns
            _log.warning("on hold: the store's history is not the one this node knows; nothing is begun or ended here")
        self._answers += 1
        if now_ns - self._since_ns >= PATIENCE_NS and self._answers >= LEAST_ANSWERS:
            await self._tell()
            self.over()

    async def _tell(self) -> None:
        before, found = self._session.seen, await self._look.fresh()
        vms = [_held(record, self._records, found) for record in self._own()]
        graves = [_buried(tombstone) for tombstone in self._records.tombstones() if tombstone.final]
        answer: wire.Adopted | None = None
        begun = wire.Seen()
        for part, last in _parts(vms, graves, self._at_once):
            told = wire.Adopt(
                seen=before, messages=self._session.count(), vms=part[0], buried=part[1], last=last, begun=begun
            )
            answer = await self._session.call("adopt", wire.Adopted, told)
            failpoint.reach("agent.told")
            begun = begun if begun.revision else answer.seen
        if answer is not None:
            self._session.adopted(answer.seen)
            _log.warning("this node has told a restored store what it has", vms=len(vms), ended=len(graves))

    def _own(self) -> list[records.Record]:
        return [record for record in self._records.all() if record.cloud == self._session.cloud]


_Part = tuple[tuple[wire.Held, ...], tuple[wire.Buried, ...]]


def _parts(vms: Sequence[wire.Held], graves: Sequence[wire.Buried], at_once: int) -> Iterator[tuple[_Part, bool]]:
    """What has ended first, so that it is not made again from a VM that is left of it; the last part is marked."""
    pieces: list[_Part] = [((), tuple(graves[start : start + _GRAVES])) for start in range(0, len(graves), _GRAVES)]
    pieces += [(tuple(vms[start : start + at_once]), ()) for start in range(0, len(vms), at_once)]
    pieces = pieces or [((), ())]
    return ((piece, index == len(pieces) - 1) for index, piece in enumerate(pieces))


def _held(record: records.Record, known: records.Records, found: look.Found) -> wire.Held:
    vm = found.get(record.key)
    tombstone = known.tombstone(record.instance)
    return wire.Held(
        instance=record.instance,
        epoch=record.epoch,
        spec=record.spec,
        launched=record.stage in _LAUNCHED or record.launched_ns > 0,
        running=vm is not None and vm.phase is hypervisor.Phase.RUNNING,
        stopped=record.stage is convergence.Stage.STOPPED,
        buried=tombstone is not None and tombstone.epoch >= record.epoch,
        message=record.message,
        vm=record.vm if record.stage in (convergence.Stage.BOOTED, convergence.Stage.STOPPED) else None,
    )


def _buried(tombstone: records.Tombstone) -> wire.Buried:
    return wire.Buried(
        instance=tombstone.instance,
        epoch=tombstone.epoch,
        decision=tombstone.decision,
        final=tombstone.final,
        seen=tombstone.seen,
    )
