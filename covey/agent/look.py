"""What the hypervisor shows, asked once for many: a look shared by those who asked before it began.

A worker that just acted must not decide on a list that was begun before its act; but a list per worker would cost the
square of the VMs. So a request shares the next list that begins after it, never one under way.

Nobody but an instance's one worker makes or removes its VMs. So what the last list showed of an instance is good
enough for a worker to begin with (`last`), unless another worker of that instance has ended since. What VMs do by
themselves the node's next look shows, which wakes their workers. What a worker has removed is not shown any more, also
not by a list that was under way then: who names it brings its claim back.
"""

import asyncio
from collections.abc import Mapping

from covey import model
from covey.agent import bell, hypervisor, records

Found = Mapping[records.Key, hypervisor.Vm]


class Look:
    """Fresh lists of one hypervisor's VMs."""

    def __init__(self, driver: hypervisor.Hypervisor) -> None:
        self._driver = driver
        self._running: asyncio.Task[Found] | None = None
        self._next: asyncio.Task[Found] | None = None
        self._last: Found | None = None  # None: the last list failed, or there was none
        self._left: set[model.InstanceId] = set()  # whose workers have ended since it began
        self._shown: dict[records.Key, hypervisor.Vm] = {}  # by the last list that did not fail
        self._removed: set[records.Key] = set()  # since the last list began

    def last(self, instance: model.InstanceId) -> dict[int, hypervisor.Vm] | None:
        """The VMs of an instance that has no worker, by epoch. None: that is to be looked at."""
        if self._last is None or instance in self._left:
            return None
        return of(self._last, instance)

    def left(self, instance: model.InstanceId) -> None:
        """Its worker, who may have made and removed VMs, has ended."""
        self._left.add(instance)

    @property
    def shown(self) -> Found:
        """What is here, as far as is known."""
        return self._shown

    def removed(self, key: records.Key) -> None:
        """It was here, and is no more."""
        self._shown.pop(key, None)
        self._removed.add(key)

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
        self._last, self._left, self._removed = None, set(), set()
        found = {(vm.instance, vm.epoch): vm for vm in await self._driver.list()}
        self._last = self._shown = {key: vm for key, vm in found.items() if key not in self._removed}
        return self._shown


def of(found: Found, instance: model.InstanceId) -> dict[int, hypervisor.Vm]:
    """The VMs of one instance by epoch."""
    return {epoch: vm for (owner, epoch), vm in found.items() if owner == instance}
