"""Where nodes' polls wait, for how many there is room, and who is woken when.

An agent parks one poll at a time; a second is there when it asked again because it believed the first one lost. Of any
more, the oldest is answered at once with what it knows, so polls cannot pile up, however often a node asks.

A change wakes the polls of the nodes that it concerns, and no other. What concerns them all (the controller turns red,
goes down, or a restore of the store was found) wakes a slice of them at a time: to answer thousands in one turn of the
loop would keep everything else from running, and a loop that stood still drops its connections (safety S24).
"""

import asyncio
import contextlib
from collections import deque
from collections.abc import Collection, Iterator

from covey import model

SPOTS = 2
SLICE = 64
PAUSE_S = 0.01  # between two slices: for those that were woken, and for everybody else


class Spot:
    """One poll's place. `gives_way`: a newer poll of its node wants it."""

    __slots__ = ("_woken", "gives_way")

    def __init__(self) -> None:
        self._woken: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.gives_way = False

    def wake(self) -> None:
        if not self._woken.done():
            self._woken.set_result(None)

    async def wait(self, limit_s: float) -> None:
        """Until it is woken, or time is up."""
        timer = asyncio.get_running_loop().call_later(max(limit_s, 0), self.wake)
        try:
            await self._woken
        finally:
            timer.cancel()


class Parking:
    """The polls that are parked, by node, oldest first. `alarmed`: the controller is red or goes down."""

    def __init__(self) -> None:
        self._parked: dict[model.NodeId, deque[Spot]] = {}
        self._due: deque[str] = deque()  # nodes whose polls are woken by and by
        self._timer: asyncio.TimerHandle | None = None
        self.alarmed = False

    @contextlib.contextmanager
    def spot(self, node: model.NodeId) -> Iterator[Spot]:
        """A spot for one poll."""
        mine = Spot()
        parked = self._parked.setdefault(node, deque())
        if len(parked) >= SPOTS:
            oldest = parked.popleft()
            oldest.gives_way = True
            oldest.wake()
        parked.append(mine)
        try:
            yield mine
        finally:
            if mine in parked:
                parked.remove(mine)
            if not parked and self._parked.get(node) is parked:
                del self._parked[node]

    def changed(self, nodes: Collection[str]) -> None:
        """What these nodes shall do may have changed."""
        if len(nodes) <= SLICE:
            for node in nodes:
                self._wake(node)
        else:
            self._wake_by_and_by(nodes)

    def alarm(self, on: bool) -> None:
        """While it is on nobody stays parked."""
        self.alarmed = on
        if on:
            self._wake_by_and_by(self._parked)

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def __len__(self) -> int:
        return sum(map(len, self._parked.values()))

    def _wake(self, node: str) -> None:
        for one in self._parked.get(model.NodeId(node), ()):
            one.wake()

    def _wake_by_and_by(self, nodes: Collection[str]) -> None:
        self._due.extend(node for node in nodes if node in self._parked)
        if self._timer is None:
            self._wake_slice()

    def _wake_slice(self) -> None:
        for _ in range(min(SLICE, len(self._due))):
            self._wake(self._due.popleft())
        self._timer = asyncio.get_running_loop().call_later(PAUSE_S, self._wake_slice) if self._due else None
