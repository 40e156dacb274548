"""A node kept free for a request that smaller ones would pass over for ever: pure.

On nodes whose room is processors and memory, a large request at the head of the queue may fit nowhere while smaller
ones behind it take every piece of room that comes free. That is allowed as long as it costs the large one nothing:

    A node is reserved for a request as soon as the room that is free there, together with the room that was given
    there to requests created *after* it, would be enough for it. Nothing behind it in the queue is placed there
    until it fits; what is before it in the queue still is.

So nothing is counted by a clock, and nothing is stored: whoever has the same snapshot comes to the same reservation,
and it ends with the request. Of several such nodes it is the one on which the last VM that must end is the oldest.
While a node is reserved nothing younger comes to it, so this last VM never becomes a younger one: every VM that is
waited for was there when the waiting began. Once all of those have ended, the request is placed.

Some VM may run for weeks. Therefore only VMs created since `aged_from` count as VMs that will end. At first that is
all that are younger than the request. When it has waited for 2, 8 and 32 spans (`placement.older`) the attempt begins
anew, and what is there at that moment counts no more. So attempts last for 20 minutes, an hour, four hours, and then
without end. One that lasts twice as long as the VMs on a node that turns over succeeds: after once as long all of
them are younger than the attempt, so that the node is reserved, and after twice as long they have ended.

At most one request has a reservation on a node, and at most a quarter of the nodes (but one) are reserved at a time.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from covey import model
from covey.decide import rooms

ANEW = (2, 8, 32)  # spans of waiting after which an attempt begins anew
_SHARE = 4  # one node of so many may be reserved


class _Held(NamedTuple):
    """A claim: when its instance was created, and what it takes."""

    birth: int
    size: rooms.Size


class Reservations:
    """Those of one plan."""

    def __init__(self, fleet: Sequence[rooms.Room], births: rooms.Births) -> None:
        self._births = births
        self._left = _limit(fleet)
        self._held: dict[model.NodeId, list[_Held]] = {}

    @property
    def exhausted(self) -> bool:
        """Whether no further node may be reserved."""
        return self._left <= 0

    def reserve(
        self, instance: model.InstanceId, need: rooms.Size, since: int, candidates: Iterable[rooms.Room]
    ) -> rooms.Room | None:
        """Reserve one of the nodes that could take it; None when none would become free for it."""
        if self.exhausted:
            return None
        best: tuple[int, model.NodeId, rooms.Room] | None = None
        for room in candidates:
            awaited = self._awaited(room, need, since, instance)
            if awaited is not None and (best is None or (awaited, room.host.id) < best[:2]):
                best = (awaited, room.host.id, room)
        if best is None:
            return None
        self._left -= 1
        best[2].reserved = instance
        return best[2]

    def _awaited(self, room: rooms.Room, need: rooms.Size, since: int, instance: model.InstanceId) -> int | None:
        """When the last VM was created that must end before the instance fits, if the older of the younger ones end
        first; None when that would not be enough."""
        if room.reserved is not None or room.counts_vms or not room.large_enough(need) or instance in room.holds:
            return None
        vcpu, ram_mb = room.free
        last = 0
        for held in self._claims(room.host):
            if vcpu >= need.vcpu and ram_mb >= need.ram_mb:
                break
            if held.birth > since:
                vcpu, ram_mb, last = vcpu + held.size.vcpu, ram_mb + held.size.ram_mb, held.birth
        return last if vcpu >= need.vcpu and ram_mb >= need.ram_mb else None

    def _claims(self, host: rooms.Host) -> list[_Held]:
        """Those on the node's ledger, the oldest first."""
        known = self._held.get(host.id)
        if known is None:
            known = [_Held(self._births(claim.instance), rooms.size(claim)) for claim in host.claims]
            known.sort()
            self._held[host.id] = known
        return known


def _limit(fleet: Sequence[rooms.Room]) -> int:
    """How many nodes may be reserved at once."""
    counted = sum(room.host.alive and not room.counts_vms for room in fleet)
    return max(counted // _SHARE, 1) if counted else 0
