"""Which waiting instance goes to which node: pure.

A node's room is what its *ledger* leaves (promise I3): every claim counts, also of VMs that nobody wants any more and
of placements that were withdrawn, until the node says that nothing of them is left. Instances are served by priority,
then by age, in the order in which the store took them. Of the nodes that can take one, those that hold its template
already come first (a pull costs minutes), then those that refused it least; among these the emptiest wins: starts
spread, so that a node's disk and network are shared by few and its loss hits few. Ties go by node id, so that the same
snapshot gives the same plan. A node that has just refused an instance is no candidate for it during a pause (`pauses`).

Every instance that stays waiting has a reason that a person can act on.
"""

import heapq
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from types import MappingProxyType
from typing import Any, NamedTuple

from covey import model
from covey.decide import pauses

REFUSALS = 3  # by one node, after which it gets this instance only when no other node is left
_TROUBLES_SHOWN = 3
_NONE: Mapping[model.InstanceId, Any] = MappingProxyType({})

Births = Mapping[model.InstanceId, int]


class Reason(StrEnum):
    """Why an instance waits."""

    NO_NODES = "no node has joined"
    NO_ARCH = "no node has this architecture"
    UNKNOWN_NODE = "the node asked for is not there"
    NOT_ALIVE = "no node that could take it is alive"
    DRAINING = "the nodes that could take it are draining"
    TROUBLE = "the nodes that could take it are in trouble"
    TOO_LARGE = "no node is large enough"
    FULL = "all nodes that could take it are full"
    REFUSED = "a node refused it and is tried again after a pause"


class Place(NamedTuple):
    instance: model.InstanceId
    node: model.NodeId


class Wait(NamedTuple):
    instance: model.InstanceId
    reason: Reason
    text: str


class Host(model.Noun, frozen=True, kw_only=True):
    """A node as placement sees it. `owed`: it has an order for a withdrawn placement and gets nothing new (S10)."""

    node: model.Node
    facts: model.Facts
    claims: tuple[model.Claim, ...] = ()
    images: frozenset[str] = frozenset()
    alive: bool = True
    owed: bool = False
    trouble: str = ""

    @property
    def id(self) -> model.NodeId:
        return self.node.id

    @property
    def name(self) -> str:
        return self.node.name or self.facts.name


@dataclass(slots=True)
class Room:
    """What is left on a host while a plan is being made."""

    host: Host
    slots: int
    cores: int
    ram_mb: int
    holds: set[model.InstanceId]
    version: int = 0
    size: tuple[int, int, int] = field(default=(0, 0, 0))

    def fits(self, spec: model.Spec) -> bool:
        if self.host.node.capacity_mode == model.CapacityMode.NUMBER:
            return self.slots > 0
        return self.cores >= spec.vcpu and self.ram_mb >= spec.vram_mb

    def load(self) -> float:
        """0 empty … 1 full."""
        if self.host.node.capacity_mode == model.CapacityMode.NUMBER:
            return 1.0 - self.slots / max(self.size[0], 1)
        return 1.0 - min(self.cores / max(self.size[1], 1), self.ram_mb / max(self.size[2], 1))

    def take(self, instance: model.Instance) -> None:
        self.slots -= 1
        self.cores -= instance.spec.vcpu
        self.ram_mb -= instance.spec.vram_mb
        self.holds.add(instance.id)
        self.version += 1


def capacity(node: model.Node, facts: model.Facts) -> tuple[int, int, int]:
    """(VMs, processors, MiB of memory) that a node offers, as configured or as the host says."""
    return node.max_vms or facts.slots, node.vcpu_override or facts.cpu_count, node.ram_mb_override or facts.ram_mb


def room(host: Host) -> Room:
    """What the host's ledger leaves."""
    slots, cores, ram_mb = capacity(host.node, host.facts)
    return Room(
        host=host,
        slots=slots - len(host.claims),
        cores=cores - sum(claim.vcpu for claim in host.claims),
        ram_mb=ram_mb - sum(claim.vram_mb for claim in host.claims),
        holds={claim.instance for claim in host.claims},
        size=(slots, cores, ram_mb),
    )


def queue(instances: Iterable[model.Instance], births: Births = _NONE) -> list[model.Instance]:
    """In the order in which they are served. `created_ns` orders those of one request: it is one controller's clock."""
    return sorted(
        instances,
        key=lambda instance: (instance.spec.priority, births.get(instance.id, 0), instance.created_ns, instance.id),
    )


def plan(
    instances: Iterable[model.Instance], hosts: Sequence[Host], births: Births = _NONE, paused: pauses.Paused = _NONE
) -> list[Place | Wait]:
    """A decision for every waiting instance, in the order in which they are served. `births`: the revision at which
    each was created. `paused`: nodes that refused it a moment ago."""
    rooms = [room(host) for host in sorted(hosts, key=lambda host: host.id)]
    kinds: dict[_Kind, _Candidates] = {}
    reasons: dict[_Kind, Wait] = {}
    decisions: list[Place | Wait] = []
    for instance in queue(instances, births):
        kind = _kind(instance, paused.get(instance.id, ()))
        candidates = kinds.get(kind)
        if candidates is None:
            candidates = kinds[kind] = _Candidates(rooms, kind)
        best = candidates.best(instance)
        if best is None:
            if kind not in reasons:
                reasons[kind] = _wait(instance, rooms, kind.paused)
            decisions.append(reasons[kind]._replace(instance=instance.id))
        else:
            best.take(instance)
            decisions.append(Place(instance.id, best.host.id))
    return decisions


class _Kind(NamedTuple):
    """Instances of one kind are interchangeable to nodes: they share one ordering of them."""

    arch: model.Arch
    digest: str
    node: str
    vcpu: int
    vram_mb: int
    refused: tuple[str, ...]
    paused: tuple[str, ...]
    said: str  # by the node that refused it last: a part of why it waits


def _kind(instance: model.Instance, paused: tuple[model.NodeId, ...]) -> _Kind:
    spec = instance.spec
    refused = tuple(sorted(instance.refused))
    said = instance.message if paused else ""
    return _Kind(spec.arch, spec.digest, spec.node, spec.vcpu, spec.vram_mb, refused, paused, said)


class _Candidates:
    """The nodes that can take one kind, best first: a heap whose stale entries are weighed again when they come up."""

    def __init__(self, rooms: Sequence[Room], kind: _Kind) -> None:
        self._kind = kind
        self._heap = [
            (self._weight(room), index, room.version, room)
            for index, room in enumerate(rooms)
            if _verdict(room.host, kind.arch, kind.node, kind.paused) is None
        ]
        heapq.heapify(self._heap)

    def best(self, instance: model.Instance) -> Room | None:
        """The best node with room; None when no candidate is left. Nodes that became full are dropped for good: while
        a plan is being made rooms only shrink."""
        passed = []
        found: Room | None = None
        while self._heap:
            _, index, version, room = self._heap[0]
            if not room.fits(instance.spec):
                heapq.heappop(self._heap)
            elif version != room.version:
                heapq.heapreplace(self._heap, (self._weight(room), index, room.version, room))
            elif instance.id in room.holds:  # an older epoch of it is still being cleaned up there
                passed.append(heapq.heappop(self._heap))
            else:
                found = room
                break
        for entry in passed:
            heapq.heappush(self._heap, entry)
        return found

    def _weight(self, room: Room) -> tuple[bool, int, float]:
        """Less is better."""
        refusals = self._kind.refused.count(room.host.id)
        return refusals >= REFUSALS, _missing(room.host, self._kind.digest) + 2 * refusals, room.load()


def _missing(host: Host, digest: str) -> int:
    return 0 if digest in host.images else 1


def _verdict(host: Host, arch: model.Arch, pinned: str, paused: Collection[str] = ()) -> Reason | None:
    """Why this node is no candidate whatever its room; None when it is one."""
    if pinned and host.id != pinned:
        return Reason.UNKNOWN_NODE
    if host.facts.arch != arch:
        return Reason.NO_ARCH
    if not host.alive:
        return Reason.NOT_ALIVE
    if host.node.drain:
        return Reason.DRAINING
    if host.owed or host.trouble:
        return Reason.TROUBLE
    if host.id in paused:
        return Reason.REFUSED
    return None


# The reason nearest to a placement is the most telling: "full" means that waiting helps.
_TELLING = (
    Reason.REFUSED,
    Reason.FULL,
    Reason.TOO_LARGE,
    Reason.TROUBLE,
    Reason.DRAINING,
    Reason.NOT_ALIVE,
    Reason.NO_ARCH,
    Reason.UNKNOWN_NODE,
)


def _wait(instance: model.Instance, rooms: Sequence[Room], paused: Collection[str] = ()) -> Wait:
    if not rooms:
        return Wait(instance.id, Reason.NO_NODES, f"Waiting: {Reason.NO_NODES}")
    counts: dict[Reason, int] = {}
    for room in rooms:
        verdict = _verdict(room.host, instance.spec.arch, instance.spec.node, paused)
        reason = verdict or _shortage(room, instance.spec)
        counts[reason] = counts.get(reason, 0) + 1
    reason = next(reason for reason in _TELLING if reason in counts)
    text = _text(instance, reason, counts, len(rooms))
    if reason == Reason.REFUSED:
        text += _refusers((room.host for room in rooms if room.host.id in paused), instance.message)
    if reason == Reason.TROUBLE:
        text += _troubles(room.host for room in rooms if not instance.spec.node or room.host.id == instance.spec.node)
    return Wait(instance.id, reason, text)


def _troubles(hosts: Iterable[Host]) -> str:
    """What the nodes say of their troubles: each kind once, with the first node that says it."""
    found: dict[str, str] = {}
    for host in hosts:
        if host.trouble:
            found.setdefault(host.trouble, host.name)
    return "".join(f"; {name}: {trouble}" for trouble, name in list(found.items())[:_TROUBLES_SHOWN])


def _refusers(hosts: Iterable[Host], said: str) -> str:
    """Which nodes are tried again, and what was last said of it."""
    names = ", ".join(host.name for host in list(hosts)[:_TROUBLES_SHOWN])
    return f"; refused by {names}" + (f": {said}" if said else "")


def _shortage(room: Room, spec: model.Spec) -> Reason:
    resource = room.host.node.capacity_mode == model.CapacityMode.RESOURCE
    if resource and (spec.vcpu > room.size[1] or spec.vram_mb > room.size[2]):
        return Reason.TOO_LARGE
    return Reason.FULL


def _text(instance: model.Instance, reason: Reason, counts: Mapping[Reason, int], nodes: int) -> str:
    """A sentence with the verdicts on all nodes, the telling one first."""
    if reason == Reason.UNKNOWN_NODE:
        return f"Waiting: node {instance.spec.node} is not there"
    if reason == Reason.NO_ARCH:
        return f"Waiting: no node has the architecture {instance.spec.arch}"
    others = [
        f"{count} {_SHORT[other]}" for other, count in sorted(counts.items(), key=lambda item: _TELLING.index(item[0]))
    ]
    return f"Waiting: {reason} (of {nodes} {'node' if nodes == 1 else 'nodes'}: {', '.join(others)})"


_SHORT = {
    Reason.REFUSED: "tried again",
    Reason.FULL: "full",
    Reason.TOO_LARGE: "too small",
    Reason.TROUBLE: "in trouble",
    Reason.DRAINING: "draining",
    Reason.NOT_ALIVE: "not alive",
    Reason.NO_ARCH: "of another architecture",
    Reason.UNKNOWN_NODE: "not the one asked for",
}


def candidates_for_new(
    spec: model.Spec, rooms: Iterable[Room], waiting: Iterable[model.Instance], taken: Collection[str]
) -> list[Room]:
    """Nodes for an instance that is about to be born, best first, to create and place it in one transaction; none
    when it should rather queue: because no node fits, or because one that waits already could take what there is.
    `taken`: nodes that another start of this process is using at this moment."""
    if any(_competes(other, spec) for other in waiting):
        return []
    fitting = [
        room
        for room in rooms
        if room.fits(spec) and room.host.id not in taken and _verdict(room.host, spec.arch, spec.node) is None
    ]
    fitting.sort(key=lambda room: (_missing(room.host, spec.digest), room.load(), room.host.id))
    return fitting


def fits(host: Host, spec: model.Spec) -> bool:
    """Whether the host can take one more of this spec."""
    return _verdict(host, spec.arch, spec.node) is None and room(host).fits(spec)


def _competes(other: model.Instance, spec: model.Spec) -> bool:
    """Whether one that waits would be overtaken by a new one."""
    same_nodes = not other.spec.node or not spec.node or other.spec.node == spec.node
    return other.spec.arch == spec.arch and same_nodes and other.spec.priority <= spec.priority
