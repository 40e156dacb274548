"""What all workers of one node share. Made by `agent.Agent`; nothing here decides."""

from collections.abc import Callable
from dataclasses import dataclass

from covey import model, world
from covey.agent import hypervisor, images, look, records, reports, session


class Limits(model.Noun, frozen=True, kw_only=True):
    """The agent's own patience, in seconds."""

    boot_s: float = 600.0  # from launch until the guest answers
    quick_s: float = 0.5  # a preparation that takes longer is acknowledged by a report of its own (safety S10)
    told_at_once: int = 100  # VMs, no patience: of which one message tells a restored store (safety S19)
    jump_s: float = 5.0  # a launch older than this is asked for again before it is used (safety S9)


@dataclass(frozen=True)
class Parts:
    """One node's pieces."""

    clock: world.World
    driver: hypervisor.Hypervisor
    images: images.Images
    records: records.Records
    session: session.Session
    outbox: reports.Outbox
    look: look.Look
    limits: Limits
    changed: Callable[[], None]  # a VM is no longer as the last look showed it
    host_ip: Callable[[], str]
    suspect: Callable[[], None]  # this host may not be able to run VMs now
