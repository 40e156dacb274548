"""The hypervisor: what an agent needs of QEMU, Tart, Anka or the synthetic one. Seven verbs for VMs, two for the start
script inside one.

Order of calls for one (instance, epoch):

    prepare → [the agent obtains launch] → start → info … (run a script once, read its output) … stop → destroy

* A VM lives in one directory, `vm_dir(root, instance, epoch)`: directory, lock and guest job id are functions of
  (instance, epoch), so that whatever a crash leaves behind is found again (safety S5).
* Every verb is idempotent: called again after a crash at any step it completes what was begun or does nothing.
* `start` makes the marker ``forking`` durable, takes an flock on ``vm.lock``, and lets the hypervisor process inherit
  it, *before* it runs guest code. Afterwards: lock held → it runs; marker without holder → it ended (phase ENDED). A
  VM with a marker is never started again.
* `list` = directories + what the system really runs: also a process whose directory is gone.
* VMs that Covey did not make, or that carry another cloud's id, are never touched (safety S12).
* The agent calls verbs of one VM one after the other (safety S6); of different VMs at once.

Faults are HypervisorError with a text for the user. Every verb ends by its own deadline; none hangs for ever.
"""

from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import Protocol

from covey import model


class Phase(StrEnum):
    """How a VM stands, by what is on disk and what runs."""

    PREPARED = "prepared"  # directory and disks exist; no marker: guest code never ran
    RUNNING = "running"  # its process lives (guest agent up or not)
    STOPPED = "stopped"  # stopped on request; may be started under a new epoch
    ENDED = "ended"  # marker without a living process: crashed, killed, or powered itself off


class Image(model.Noun, frozen=True, kw_only=True):
    """A template on this node's disk, verified. Layers base first; pinned while in use."""

    digest: model.Digest
    layers: tuple[str, ...]  # absolute paths, read-only
    config: dict[str, str | int | bool] = {}  # the template's VM configuration: vcpu, ram_mb, arch, kernel, …
    files: dict[str, str] = {}  # other files by their title: kernel, initrd, nvram


class Plan(model.Noun, frozen=True, kw_only=True):
    """One VM to be."""

    instance: model.InstanceId
    epoch: int
    cloud: str
    name: str
    spec: model.Spec
    image: Image
    host_ip: str  # where forwarded ports listen, and what users connect to


class Vm(model.Noun, frozen=True, kw_only=True):
    """One VM as found."""

    instance: model.InstanceId
    epoch: int
    phase: Phase
    cloud: str = ""
    why: str = ""  # for ENDED: what is known of the cause


class Job(model.Noun, frozen=True, kw_only=True):
    """A start script. Run at most once per (instance, epoch); a repeat follows the first run to its end."""

    text: str
    timeout_s: float
    after_network: bool = True


class JobResult(model.Noun, frozen=True, kw_only=True):
    """`return_code` -1: timed out and killed, with its whole process group. Output is the last 64 KiB of each stream;
    the VM's directory keeps the last 16 MiB (safety S26)."""

    return_code: int
    did_timeout: bool = False
    stdout: bytes = b""
    stderr: bytes = b""
    errors: str = ""


class Scripts(Protocol):
    """The start script of a VM: it runs inside, its output is kept outside."""

    async def run(self, instance: model.InstanceId, epoch: int, job: Job) -> JobResult:
        """Run the start script in the guest and follow it to its end (which may take long)."""
        ...

    async def output(
        self, instance: model.InstanceId, epoch: int, stream: str, offset: int, limit: int
    ) -> model.Output:
        """A part of what the start script wrote to stdout or stderr so far, from `offset` on (negative: from the
        end), out of the last 16 MiB, as long as the VM is not destroyed. Changes nothing; raises when it is absent."""
        ...


class Hypervisor(Scripts, Protocol):
    """VMs on this host, and their start scripts."""

    async def facts(self) -> model.Facts:
        """The host as it is now. Raises HypervisorError with the remedy when VMs cannot run here (QEMU missing)."""
        ...

    async def list(self) -> list[Vm]:
        """Every VM of Covey's on this host."""
        ...

    async def prepare(self, plan: Plan) -> None:
        """Make directory and disks. Nothing runs. After a crash: the directory is whole, or is made anew."""
        ...

    async def start(self, instance: model.InstanceId, epoch: int) -> None:
        """Run guest code. Only for a prepared VM for which launch was just granted. Raises when the marker exists."""
        ...

    async def info(self, instance: model.InstanceId, epoch: int) -> model.VmInfo | None:
        """The running VM's vminfo once the guest answers; None while it boots. Raises when it ended."""
        ...

    async def stop(self, instance: model.InstanceId, epoch: int) -> None:
        """Shut down, politely at first, then by force after a limit. Harmless when it does not run."""
        ...

    async def destroy(self, instance: model.InstanceId, epoch: int) -> None:
        """Kill it and remove every trace. When it returns nothing is left: process, overlay, directory."""
        ...


Wake = Callable[[], None]  # called when a VM may have changed by itself; wakes the agent's loop, carries no fact


def vm_dir(root: Path, instance: model.InstanceId, epoch: int) -> Path:
    """The directory of one VM."""
    return root / f"{instance}.{epoch}"
