"""Which nodes were heard of lately: what users see as Offline or "not communicating".

A node's sign of life ends with its lease, 30 s after its last message; users are told later, after the time-outs they
set. Those spans are observed on this process's own clock, never computed from stored times (safety S9). For display
only: what is done about a lost node is decided from the store (`controller.loop`).
"""

from covey import model, wire, world
from covey.store import view


class Presence:
    """When this controller last saw each node alive. Of those that are alive nothing is noted: a look costs what has
    changed since the one before, however many nodes there are."""

    def __init__(self, world: world.World) -> None:
        self._world = world
        self._last: view.Snapshot | None = None  # as of the last look …
        self._looked_ns = 0  # … and when that was
        self._seen_ns: dict[str, int] = {}  # of those whose lease has ended: when they were last seen alive

    def look(self, snapshot: view.Snapshot) -> None:
        """Note who is alive. Called several times a second."""
        if self._last is not None:
            for id in snapshot.died_since(self._last):
                self._seen_ns[id] = max(self._looked_ns, self._seen_ns.get(id, 0))
        back = [id for id in self._seen_ns if snapshot.alive(id) is not None or snapshot.node(id) is None]
        for id in back:
            del self._seen_ns[id]
        self._last, self._looked_ns = snapshot, self._world.boot_ns()

    def silent_s(self, node: model.NodeId) -> float | None:
        """For how long a node whose lease has ended was not heard of; None: this controller never saw it alive."""
        seen_ns = self._last_seen_ns(node)
        return None if seen_ns is None else (self._world.boot_ns() - seen_ns) / 1e9 + wire.LEASE_TTL_S

    def present(self, snapshot: view.Snapshot, node: model.NodeId, timeout_s: float) -> bool:
        """Whether the node was heard of in the last `timeout_s`; one that was never seen alive from here was not."""
        if snapshot.alive(node) is not None:
            self._seen_ns[node] = self._world.boot_ns()  # until the next look
            return True
        seen_ns = self._last_seen_ns(node)
        if seen_ns is None:
            return False
        return (self._world.boot_ns() - seen_ns) / 1e9 <= timeout_s - wire.LEASE_TTL_S

    def _last_seen_ns(self, node: model.NodeId) -> int | None:
        noted_ns = self._seen_ns.get(node)
        if self._last is None or self._last.alive(node) is None:
            return noted_ns
        return max(self._looked_ns, noted_ns or 0)
