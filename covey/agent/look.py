"""What the hypervisor shows, asked once for many: a look shared by those who asked before it began.

A worker that just acted must not decide on a list that was begun before its act; but a list per worker would cost the
square of the VMs. So a request shares the next list that begins after it, never one under way.
"""

import asyncio
from collections.abc import Mapping

from covey.agent import bell, hypervisor, records

Found = Mapping[records.Key, hypervisor.Vm]


class Look:
    """Fresh lists of one hypervisor's VMs."""

    def __init__(self, driver: hypervisor.Hypervisor) -> None:
        self._driver = driver
        self._running: asyncio.Task[Found] | None = None
        self._next: asyncio.Task[Found] | None = None

    async def fresh(self) -> Found:
        """The VMs, listed after this call. Raises HypervisorError."""
        if self._next is None:
            self._next = asyncio.create_task(self._after(self._running))
        mine = self._next
        await bell.end_of(mine)
        return mine.result()

    async def _after(self, before: "asyncio.Task[Found] | None") -> Found:
        if before is not None:
            await bell.end_of(before)
        self._running, self._next = self._next, None
        return {(vm.instance, vm.epoch): vm for vm in await self._driver.list()}
