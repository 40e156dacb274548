"""What one agent keeps open towards running VMs: the guest agent's connection, and a watch on each process's end.

Nothing here is needed to find a VM again. A process's end is read from a pidfd, which tells it whether or not the
process is a child of ours, so a VM found after a restart of the agent is watched like one just started.
"""

import asyncio
import os
from pathlib import Path

from covey import observe
from covey.agent import guest, hypervisor, qemu_disk, qemu_process

_log = observe.log("qemu")


class Live:
    """What is open towards one VM. `monitor`: QEMU's monitor takes one client at a time."""

    def __init__(self, place: qemu_disk.Place) -> None:
        self.guest = guest.Guest(place.guest, place.user)
        self.monitor = asyncio.Lock()
        self.watched: int | None = None  # pidfd


class Lives:
    """By VM. `wake` is called when a watched process has ended."""

    def __init__(self, wake: hypervisor.Wake) -> None:
        self._wake = wake
        self._lives: dict[Path, Live] = {}

    def of(self, place: qemu_disk.Place) -> Live:
        if place.path not in self._lives:
            self._lives[place.path] = Live(place)
        return self._lives[place.path]

    def watch(self, place: qemu_disk.Place) -> None:
        """Watch for the end of this VM's process, if it runs and is not watched yet."""
        live = self.of(place)
        if live.watched is not None:
            return
        pidfd = qemu_process.open_process(place.path, {place.user})
        if pidfd is not None:
            live.watched = pidfd
            asyncio.get_running_loop().add_reader(pidfd, self._readable, place)

    def forget(self, place: qemu_disk.Place) -> None:
        """Close what is open towards this VM."""
        live = self._lives.pop(place.path, None)
        if live is not None:
            _unwatch(live)
            live.guest.close()

    def close(self) -> None:
        for live in self._lives.values():
            _unwatch(live)
            live.guest.close()
        self._lives.clear()

    def _readable(self, place: qemu_disk.Place) -> None:
        live = self.of(place)
        if live.watched is not None and qemu_process.ended(live.watched):
            _unwatch(live)
            _log.info("a VM's process ended", vm=place.path.name)
            self._wake()


def _unwatch(live: Live) -> None:
    if live.watched is not None:
        asyncio.get_running_loop().remove_reader(live.watched)
        os.close(live.watched)
        live.watched = None
