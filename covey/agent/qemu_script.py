"""The start script of one VM: begun at most once per (instance, epoch), followed by whoever asks (safety S5).

``job.json`` on the host is durable before the launch; in the guest `mkdir` decides who launches. Together they hold
also when the guest reboots in between, which empties its temporary directories: the marker names the guest's boot.
The time-out counts from that marker, by the host's clock, whatever agents come and go (safety S9).
"""

import asyncio
import functools
from collections.abc import Awaitable, Callable
from typing import TypeVar

from covey import failpoint, world
from covey.agent import guest, hypervisor, qemu_disk, qmp, tail

_T = TypeVar("_T")
_READY_S = 120.0  # from the first try until the guest answers, and has an address if the script needs one
_INTERRUPTED = -1


async def run(
    place: qemu_disk.Place, inside: guest.Guest, job: hypervisor.Job, clock: world.World
) -> hypervisor.JobResult:
    """Launch the script unless that was done before, and follow it to its end."""
    boot = await _patiently(functools.partial(_ready, inside, network=job.after_network))
    begun = place.begun()
    if begun is None:
        begun = qemu_disk.Begun(at_boot_ns=clock.boot_ns(), guest_boot=boot)
        place.begin(begun)
    elif begun.guest_boot != boot:
        return hypervisor.JobResult(
            return_code=_INTERRUPTED, errors="the start script was interrupted: the guest rebooted"
        )
    failpoint.reach("qemu.job")
    directory = await _patiently(functools.partial(guest.launch, inside, place.path.name, job.text))
    failpoint.reach("qemu.launched")
    left_s = job.timeout_s - (clock.boot_ns() - begun.at_boot_ns) / 1e9
    code, trouble = await _follow(guest.Follower(inside, directory, place.job_out, place.job_err), left_s)
    return hypervisor.JobResult(
        return_code=_INTERRUPTED if code is None else code,
        did_timeout=code is None and not trouble,
        stdout=tail.last(place.job_out),
        stderr=tail.last(place.job_err),
        errors=trouble,
    )


async def _follow(follower: guest.Follower, timeout_s: float) -> tuple[int | None, str]:
    try:
        return await follower.wait(timeout_s), ""
    except guest.Interrupted as fault:
        return None, str(fault)


async def _ready(inside: guest.Guest, *, network: bool) -> str:
    """The guest's boot id, once it is up as far as asked."""
    if network and not await inside.address():
        raise qmp.NoAnswer("the guest got no network address, so the start script was not run")
    return await inside.boot_id()


async def _patiently(ask: Callable[[], Awaitable[_T]]) -> _T:
    """Ask until there is an answer: the guest agent may be starting, or restarting."""
    end = asyncio.get_running_loop().time() + _READY_S
    while True:
        try:
            return await ask()
        except qmp.NoAnswer:
            if asyncio.get_running_loop().time() > end:
                raise
        await asyncio.sleep(0.1)
