"""How much work a server takes on at once: beyond it requests are refused before they cost anything."""

import contextlib
from collections.abc import Iterator

from covey import answer


class Gate:
    """`limit` requests at once; the next is told to come again."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._inside = 0

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        """Raises Fault 503 when there is no room."""
        if self._inside >= self._limit:
            raise answer.Fault(503, "this server has too much to do; try again", headers={"Retry-After": "1"})
        self._inside += 1
        try:
            yield
        finally:
            self._inside -= 1
