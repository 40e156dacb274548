"""Which waiting instance goes to which node: pure.

Instances are served by *turn*, then by age, in the order in which the store took them. The turn is the priority that
was asked for, divided by ten for each span of waiting that was observed (`deadlines.Kind.WAITING`), so that nobody is
overtaken for ever because of his priority: after four spans every instance stands before all that are younger.

Of the nodes that can take one, those that hold its template already come first (a pull costs minutes), then those that
refused it least; among these the emptiest wins: starts spread, so that a node's disk and network are shared by few and
its loss hits few. Ties go by node id, so that the same snapshot gives the same plan. A node that has just refused an
instance is no candidate for it during a pause (`pauses`). Whoever fits nowhere is passed over, but not for ever: a
node may be kept free for it (`reservation`).

Every instance that stays waiting has a reason that a person can act on (`explain` has the whole story).
"""

import collections
import heapq
from collections.abc import Callable, Iterable, Mapping, Sequence
from enum import StrEnum
from types import MappingProxyType
from typing import Any, NamedTuple

import msgspec

from covey import model
from covey.decide import pauses, reservation, rooms

REFUSALS = 3  # by one node, after which it gets this instance only when no other node is left
AGES = 32  # spans of waiting that are counted; from then on an instance stands as it does
_PER_AGE = 10
_AGED = 4  # spans after which it has become the first class, whatever was asked for
_SHOWN = 3
_NONE: Mapping[model.InstanceId, Any] = MappingProxyType({})
_LOOKED_AT = 64  # a newcomer does not look at more that wait: it queues


class Reason(StrEnum):
    """Why an instance waits."""

    NO_NODES = "no node has joined"
    NO_ARCH = "no node has this architecture"
    NO_GROUP = "no node is in the group asked for"
    UNKNOWN_NODE = "the node asked for is not there"
    NOT_ALIVE = "no node that could take it is alive"
    HELD = "the nodes that could take it have not yet said what they run since the store was restored"
    DRAINING = "the nodes that could take it are draining"
    TROUBLE = "the nodes that could take it are in trouble"
    TOO_LARGE = "no node is large enough"
    FULL = "all nodes that could take it are full"
    CLEANING = "what an earlier attempt left on the node must be removed first"
    RESERVED = "what is free is kept for instances that wait longer"
    REFUSED = "it was refused and is tried again after a pause"


class Place(NamedTuple):
    instance: model.InstanceId
    node: model.NodeId


class Wait(NamedTuple):
    """`reserved`: the node that is kept free for it."""

    instance: model.InstanceId
    reason: Reason
    text: str
    reserved: model.NodeId = model.NOWHERE


class Cloud(NamedTuple):
    """What is decided on beside the queue. `births`: when instances were created. `paused`: nodes that refused an
    instance a moment ago. `barred`: instances that must not be placed anywhere yet, and the whole reason (S19)."""

    hosts: Sequence[rooms.Host]
    births: rooms.Births = lambda _: 0
    paused: pauses.Paused = _NONE
    barred: Mapping[model.InstanceId, str] = _NONE


# ---- the queue ---------------------------------------------------------------------------------------------------


def turn(instance: model.Instance) -> int:
    """1 is served first: the priority asked for, and how long it has waited."""
    asked = instance.spec.priority
    for _ in range(min(instance.aged, _AGED)):
        asked //= _PER_AGE
    return max(asked, 1)


def older(instance: model.Instance, revision: int) -> model.Instance:
    """After one more span of waiting, at `revision`."""
    aged = instance.aged + 1
    return msgspec.structs.replace(
        instance, aged=aged, aged_from=revision if aged in reservation.ANEW else instance.aged_from
    )


def queue(instances: Iterable[model.Instance], births: rooms.Births = lambda _: 0) -> list[model.Instance]:
    """In the order in which they are served. `created_ns` orders those of one request: it is one controller's clock."""
    return sorted(
        instances,
        key=lambda instance: (turn(instance), births(instance.id), instance.created_ns, instance.id),
    )


# ---- the plan ----------------------------------------------------------------------------------------------------


def plan(instances: Iterable[model.Instance], cloud: Cloud) -> list[Place | Wait]:
    """A decision for every waiting instance, in the order in which they are served."""
    planning = Planning(cloud)
    return [planning.decide(instance) for instance in queue(instances, cloud.births)]


class Planning:
    """A plan in the making: `decide` for one instance after the other, in the queue's order."""

    def __init__(self, cloud: Cloud) -> None:
        self.rooms = [rooms.room(host) for host in sorted(cloud.hosts, key=_host_id)]
        self._by_id = {room.host.id: room for room in self.rooms}
        self._cloud = cloud
        self._kinds: dict[_Kind, _Candidates] = {}
        self._reasons: dict[_Kind, _Reasons] = {}
        self._reservations = reservation.Reservations(self.rooms, cloud.births)
        self._hopeless: dict[tuple[_Kind, tuple[model.NodeId, ...]], int] = {}  # since when no reservation helps
        self._left_at: dict[model.InstanceId, list[rooms.Room]] | None = None

    def decide(self, instance: model.Instance) -> Place | Wait:
        barred = self._cloud.barred.get(instance.id)
        if barred:
            return Wait(instance.id, Reason.HELD, barred)
        kind = kind_of(instance.spec)
        paused = self._cloud.paused.get(instance.id, ())
        candidates = self._kinds.get(kind)
        if candidates is None:
            candidates = self._kinds[kind] = _Candidates(self._asked_for(kind), kind)
        best = candidates.best(instance, paused)
        if best is not None:
            best.take(instance.id, kind.need)
            return Place(instance.id, best.host.id)
        reserved = self._reserve(instance, kind, paused)
        if reserved is not None:
            self._reasons.clear()  # one node more is kept
        reasons = self._reasons.get(kind)
        if reasons is None:
            reasons = self._reasons[kind] = _Reasons(self._asked_for(kind), kind)
        wait = reasons.wait(instance, paused, self._own(instance, paused))
        if reserved is None:
            return wait
        return wait._replace(reserved=reserved.host.id, text=f"{wait.text}; {reserved.host.name} is kept free for it")

    def _own(self, instance: model.Instance, paused: tuple[model.NodeId, ...]) -> list[rooms.Room]:
        """The nodes to which it is not just one of its kind: that have refused it, or still hold an older epoch."""
        if self._left_at is None:
            self._left_at = {}
            for room in self.rooms:
                for claim in room.host.claims:
                    self._left_at.setdefault(claim.instance, []).append(room)
        ids = {room.host.id for room in self._left_at.get(instance.id, ())} | set(paused) | set(instance.refused)
        return [self._by_id[id] for id in sorted(ids & self._by_id.keys())]

    def _reserve(self, instance: model.Instance, kind: "_Kind", paused: tuple[model.NodeId, ...]) -> rooms.Room | None:
        """Keep a node free for it. What helps none of its kind helps no younger one, nor one that fewer nodes may be
        given."""
        if self._reservations.exhausted or pauses.EVERYWHERE in paused:
            return None
        since = max(self._cloud.births(instance.id), instance.aged_from)
        alike = kind._replace(digest="")
        if any(since >= self._hopeless.get((alike, more), since + 1) for more in ((), paused)):
            return None
        could = (room for room in self._asked_for(kind) if verdict(room.host, kind, paused) is None)
        reserved = self._reservations.reserve(instance.id, kind.need, since, could)
        if reserved is None:
            self._hopeless[alike, paused] = since
        return reserved

    def _asked_for(self, kind: "_Kind") -> Sequence[rooms.Room]:
        """The node that it asks for, or all of them."""
        if not kind.node:
            return self.rooms
        room = self._by_id.get(model.NodeId(kind.node))
        return () if room is None else (room,)


def _host_id(host: rooms.Host) -> str:
    return host.id


class _Kind(NamedTuple):
    """Instances of one kind are interchangeable to nodes that have not refused them: they share one order of nodes."""

    arch: model.Arch
    digest: str
    node: str
    group: str
    need: rooms.Size


def kind_of(spec: model.Spec) -> _Kind:
    return _Kind(spec.arch, spec.digest, spec.node, spec.group, rooms.size(spec))


class _Candidates:
    """The nodes that can take one kind, best first: a heap whose stale entries are weighed again when they come up."""

    def __init__(self, fleet: Sequence[rooms.Room], kind: _Kind) -> None:
        self._kind = kind
        self._heap = [
            (self._weight(room), index, room.version, room)
            for index, room in enumerate(fleet)
            if room.fits(kind.need) and verdict(room.host, kind) is None
        ]
        heapq.heapify(self._heap)

    def best(self, instance: model.Instance, paused: tuple[model.NodeId, ...]) -> rooms.Room | None:
        """The best node with room; None when no candidate is left. Nodes that became full are dropped for good: while
        a plan is being made rooms only shrink. One that has refused it comes after all that have not."""
        if pauses.EVERYWHERE in paused:
            return None
        passed = []
        found: rooms.Room | None = None
        while self._heap:
            _, index, version, room = self._heap[0]
            if not room.fits(self._kind.need):
                heapq.heappop(self._heap)
            elif version != room.version:
                heapq.heapreplace(self._heap, (self._weight(room), index, room.version, room))
            elif instance.id in room.holds or room.host.id in instance.refused:
                passed.append(heapq.heappop(self._heap))
            else:
                found = room
                break
        for entry in passed:
            heapq.heappush(self._heap, entry)
        if found is not None or not instance.refused:
            return found
        refusers = (
            (self._weight(room, instance.refused.count(room.host.id)), index, room)
            for _, index, _, room in passed
            if instance.id not in room.holds and room.host.id not in paused  # an older epoch is being cleaned up there
        )
        return min(refusers, key=lambda one: one[:2], default=(None, 0, None))[2]

    def _weight(self, room: rooms.Room, refusals: int = 0) -> tuple[bool, int, float]:
        """Less is better."""
        return refusals >= REFUSALS, _missing(room.host, self._kind.digest) + 2 * refusals, room.load()


def _missing(host: rooms.Host, digest: str) -> int:
    return 0 if digest in host.images else 1


def verdict(host: rooms.Host, kind: _Kind, paused: tuple[model.NodeId, ...] = ()) -> Reason | None:
    """Why this node is no candidate whatever its room; None when it is one."""
    if kind.node and host.id != kind.node:
        return Reason.UNKNOWN_NODE
    if host.facts.arch != kind.arch:
        return Reason.NO_ARCH
    if kind.group and kind.group not in host.node.groups:
        return Reason.NO_GROUP
    if not host.alive:
        return Reason.NOT_ALIVE
    if host.held:
        return Reason.HELD
    if host.node.drain:
        return Reason.DRAINING
    if host.owed or host.trouble:
        return Reason.TROUBLE
    if paused and (host.id in paused or pauses.EVERYWHERE in paused):
        return Reason.REFUSED
    return None


def shortage(room: rooms.Room, instance: model.InstanceId | None, need: rooms.Size) -> Reason | None:
    """Why a node that is a candidate has no room for it, or for any other (None); None when it has."""
    if not room.large_enough(need):
        return Reason.TOO_LARGE
    if not room.has_room(need):
        return Reason.FULL
    if room.reserved not in (None, instance):
        return Reason.RESERVED
    return Reason.CLEANING if instance in room.holds else None


# ---- the reason --------------------------------------------------------------------------------------------------

# The reason nearest to a placement is the most telling: "full" means that waiting helps.
TELLING = (
    Reason.REFUSED,
    Reason.RESERVED,
    Reason.CLEANING,
    Reason.FULL,
    Reason.TOO_LARGE,
    Reason.TROUBLE,
    Reason.DRAINING,
    Reason.HELD,
    Reason.NOT_ALIVE,
    Reason.NO_GROUP,
    Reason.NO_ARCH,
    Reason.UNKNOWN_NODE,
)

_SHORT = {
    Reason.REFUSED: "tried again",
    Reason.RESERVED: "kept for another",
    Reason.CLEANING: "being cleaned",
    Reason.FULL: "full",
    Reason.TOO_LARGE: "too small",
    Reason.TROUBLE: "in trouble",
    Reason.DRAINING: "draining",
    Reason.HELD: "not yet heard",
    Reason.NOT_ALIVE: "not alive",
    Reason.NO_GROUP: "not in the group",
    Reason.NO_ARCH: "of another architecture",
    Reason.UNKNOWN_NODE: "not the one asked for",
}


_OF_ROOM = (Reason.FULL, Reason.TOO_LARGE, Reason.RESERVED, Reason.CLEANING)  # of nodes that are candidates


class _Reasons:
    """Why instances of one kind wait. The nodes are looked at once for all of them, and then only those to which an
    instance is not just one of its kind: thousands may wait, each refused by other nodes."""

    def __init__(self, fleet: Sequence[rooms.Room], kind: _Kind) -> None:
        self._fleet = fleet
        self._kind = kind
        self._of: dict[model.NodeId, Reason] = {room.host.id: self._why(room) for room in fleet}
        self._counts = collections.Counter(self._of.values())
        self._troubles = _troubles(room.host for room in fleet)

    def wait(self, instance: model.Instance, paused: tuple[model.NodeId, ...], own: Sequence[rooms.Room]) -> Wait:
        """`own`: the nodes to look at for this very instance."""
        if not self._fleet:
            reason = Reason.UNKNOWN_NODE if self._kind.node else Reason.NO_NODES
            return Wait(instance.id, reason, _text(instance, reason, {}, 0))
        counts = self._counts
        if own or paused:
            counts = self._counted(instance, paused, own)
        reason = next(reason for reason in TELLING if counts[reason])
        text = _text(instance, reason, counts, len(self._fleet))
        if reason == Reason.REFUSED:
            text += _refusers([room.host.name for room in own if room.host.id in instance.refused], instance.message)
        if reason == Reason.TROUBLE:
            text += self._troubles
        return Wait(instance.id, reason, text)

    def _counted(
        self, instance: model.Instance, paused: tuple[model.NodeId, ...], own: Sequence[rooms.Room]
    ) -> collections.Counter[Reason]:
        counts = self._counts.copy()
        if pauses.EVERYWHERE in paused:
            counts[Reason.REFUSED] += sum(counts.pop(reason, 0) for reason in _OF_ROOM)
            return counts
        for room in own:
            before = self._of.get(room.host.id)
            if before is not None:
                counts[before] -= 1
                counts[self._why(room, instance.id, paused)] += 1
        return counts

    def _why(
        self, room: rooms.Room, instance: model.InstanceId | None = None, paused: tuple[model.NodeId, ...] = ()
    ) -> Reason:
        kind = self._kind
        return verdict(room.host, kind, paused) or shortage(room, instance, kind.need) or Reason.FULL


def _troubles(hosts: Iterable[rooms.Host]) -> str:
    """What the nodes say of their troubles: each kind once, with the first node that says it."""
    found: dict[str, str] = {}
    for host in hosts:
        if host.trouble:
            found.setdefault(host.trouble, host.name)
    return "".join(f"; {name}: {trouble}" for trouble, name in list(found.items())[:_SHOWN])


def _refusers(names: Sequence[str], message: str) -> str:
    """Which nodes refused it, and what was last said of it."""
    told = ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
    said = f": {message}" if message else ""
    return f"; refused by {told or 'nodes that are not there any more'}{said}"


def _text(instance: model.Instance, reason: Reason, counts: Mapping[Reason, int], nodes: int) -> str:
    """A sentence with the verdicts on all nodes, the telling one first."""
    if reason == Reason.UNKNOWN_NODE:
        return f"Waiting: node {instance.spec.node} is not there"
    if reason == Reason.NO_NODES:
        return f"Waiting: {reason}"
    if reason == Reason.NO_ARCH:
        return f"Waiting: no node has the architecture {instance.spec.arch}"
    if reason == Reason.NO_GROUP:
        return f"Waiting: no node of architecture {instance.spec.arch} is in the group {instance.spec.group}"
    others = [f"{counts[other]} {_SHORT[other]}" for other in TELLING if counts.get(other)]
    return f"Waiting: {reason} (of {nodes} {'node' if nodes == 1 else 'nodes'}: {', '.join(others)})"


# ---- those about to be born --------------------------------------------------------------------------------------


def may_be_born_placed(spec: model.Spec, waiting: Iterable[model.Instance]) -> bool:
    """Whether an instance that is about to be born may be given a node at once: not when one that stands before it
    could take what there is, or has a node kept free."""
    return not any(looked_at >= _LOOKED_AT or _competes(other, spec) for looked_at, other in enumerate(waiting))


def candidates_for_new(
    kind: _Kind, fleet: Iterable[rooms.Room], preference: Callable[[model.NodeId], float]
) -> list[model.NodeId]:
    """Nodes for an instance that is about to be born, best first, to create and place it in one transaction. Of equal
    ones the one with the lower `preference` comes first: who creates at the same moment should prefer others."""
    fitting = [
        (_missing(room.host, kind.digest), room.load(), preference(room.host.id), room.host.id)
        for room in fleet
        if room.fits(kind.need) and verdict(room.host, kind) is None
    ]
    fitting.sort()
    return [id for *_, id in fitting]


def fits(host: rooms.Host, spec: model.Spec) -> bool:
    """Whether the host can take one more of this spec."""
    kind = kind_of(spec)
    return verdict(host, kind) is None and rooms.room(host).fits(kind.need)


def _competes(other: model.Instance, spec: model.Spec) -> bool:
    """Whether one that waits would be overtaken by a new one."""
    return turn(other) <= spec.priority and share_nodes(other.spec, spec)


def share_nodes(one: model.Spec, other: model.Spec) -> bool:
    """Whether there may be nodes that could take either."""
    return one.arch == other.arch and (not one.node or not other.node or one.node == other.node)
