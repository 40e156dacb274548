"""Where nodes' polls wait, and for how many there is room: two of each node, the newest.

An agent parks one poll at a time; a second is there when it asked again because it believed the first one lost. Of any
more, the oldest is answered at once with what it knows, so polls cannot pile up, however often a node asks.
"""

import asyncio
import contextlib
from collections import deque
from collections.abc import Iterator

from covey import model

SPOTS = 2


class Parking:
    """The polls that are parked, by node, oldest first."""

    def __init__(self) -> None:
        self._parked: dict[model.NodeId, deque[asyncio.Event]] = {}

    @contextlib.contextmanager
    def spot(self, node: model.NodeId) -> Iterator[asyncio.Event]:
        """A spot for one poll. The event is set when a newer poll wants it."""
        mine = asyncio.Event()
        parked = self._parked.setdefault(node, deque())
        if len(parked) >= SPOTS:
            parked.popleft().set()
        parked.append(mine)
        try:
            yield mine
        finally:
            if mine in parked:
                parked.remove(mine)
            if not parked and self._parked.get(node) is parked:
                del self._parked[node]

    def __len__(self) -> int:
        return sum(map(len, self._parked.values()))
