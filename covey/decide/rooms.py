"""What is left on a node: pure.

A node's room is what its *ledger* leaves (promise I3): every claim counts, also of VMs that nobody wants any more and
of placements that were withdrawn, until the node says that nothing of them is left. It is counted in VMs, or in
processors and memory, as the operator chose. A VM whose size nobody said counts with what the hypervisor gives it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from covey import model

Births = Callable[[model.InstanceId], int]
"""The revision of the store at which an instance was created; 0 when it is not known."""


class Size(NamedTuple):
    vcpu: int
    ram_mb: int


def size(of: model.Spec | model.Claim) -> Size:
    """What a VM takes of its node."""
    return Size(of.vcpu or model.DEFAULT_VCPU, of.vram_mb or model.DEFAULT_RAM_MB)


class Host(model.Noun, frozen=True, kw_only=True):
    """A node as placement sees it. `owed`: it has an order for a withdrawn placement and gets nothing new (S10).
    `held`: why nothing may be placed there until it has said what it runs (S19); "" when something may."""

    node: model.Node
    facts: model.Facts
    claims: tuple[model.Claim, ...] = ()
    images: frozenset[str] = frozenset()
    alive: bool = True
    owed: bool = False
    trouble: str = ""
    held: str = ""

    @property
    def id(self) -> model.NodeId:
        return self.node.id

    @property
    def name(self) -> str:
        return self.node.name or self.facts.name or self.node.id


@dataclass(slots=True)
class Room:
    """What is left on a host while a plan is being made. `counts_vms`: every VM takes one slot, whatever its size.
    `slots`, `whole`: all that it has. `reserved`: the instance that it is kept free for."""

    host: Host
    counts_vms: bool
    slots: int
    whole: Size
    free_slots: int
    free: Size
    holds: set[model.InstanceId]
    version: int = 0
    reserved: model.InstanceId | None = None

    def fits(self, need: Size) -> bool:
        return self.reserved is None and self.has_room(need)

    def has_room(self, need: Size) -> bool:
        """As `fits`, but whoever it is reserved for."""
        if self.counts_vms:
            return self.free_slots > 0
        return self.free.vcpu >= need.vcpu and self.free.ram_mb >= need.ram_mb

    def large_enough(self, need: Size) -> bool:
        """Whether it would fit if the node were empty."""
        return self.counts_vms or (self.whole.vcpu >= need.vcpu and self.whole.ram_mb >= need.ram_mb)

    def load(self) -> float:
        """0 empty … 1 full."""
        if self.counts_vms:
            return 1.0 - self.free_slots / max(self.slots, 1)
        return 1.0 - min(self.free.vcpu / max(self.whole.vcpu, 1), self.free.ram_mb / max(self.whole.ram_mb, 1))

    def take(self, instance: model.InstanceId, need: Size) -> None:
        self.free_slots -= 1
        self.free = Size(self.free.vcpu - need.vcpu, self.free.ram_mb - need.ram_mb)
        self.holds.add(instance)
        self.version += 1


def room(host: Host) -> Room:
    """What the host's ledger leaves."""
    slots, whole = capacity(host)
    vcpu, ram_mb = whole
    for claim in host.claims:
        vcpu -= claim.vcpu or model.DEFAULT_VCPU
        ram_mb -= claim.vram_mb or model.DEFAULT_RAM_MB
    return Room(
        host=host,
        counts_vms=host.node.capacity_mode == model.CapacityMode.NUMBER,
        slots=slots,
        whole=whole,
        free_slots=slots - len(host.claims),
        free=Size(vcpu, ram_mb),
        holds={claim.instance for claim in host.claims},
    )


def capacity(host: Host) -> tuple[int, Size]:
    """VMs, and processors and memory, that a node offers: as configured, or as the host says."""
    node, facts = host.node, host.facts
    whole = Size(node.vcpu_override or facts.cpu_count, node.ram_mb_override or facts.ram_mb)
    return node.max_vms or facts.slots, whole
