"""Which nodes were heard of lately: what users see as Offline or "not communicating".

A node's sign of life ends with its lease, 30 s after its last message; users are told later, after the time-outs they
set. Those spans are observed on this process's own clock, never computed from stored times (safety S9). For display
only: what is done about a lost node is decided from the store (`controller.loop`).
"""

from covey import model, wire, world
from covey.store import view


class Presence:
    """When this controller last saw each node alive."""

    def __init__(self, world: world.World) -> None:
        self._world = world
        self._seen_ns: dict[str, int] = {}

    def look(self, snapshot: view.Snapshot) -> None:
        """Note who is alive. Called every second."""
        now_ns = self._world.boot_ns()
        known: set[str] = {kept.noun.id for kept in snapshot.nodes()}
        for id in known:
            if snapshot.alive(id) is not None:
                self._seen_ns[id] = now_ns
        for id in self._seen_ns.keys() - known:
            del self._seen_ns[id]

    def silent_s(self, node: model.NodeId) -> float | None:
        """For how long a node whose lease has ended was not heard of; None: this controller never saw it alive."""
        seen_ns = self._seen_ns.get(node)
        return None if seen_ns is None else (self._world.boot_ns() - seen_ns) / 1e9 + wire.LEASE_TTL_S

    def present(self, snapshot: view.Snapshot, node: model.NodeId, timeout_s: float) -> bool:
        """Whether the node was heard of in the last `timeout_s`; one that was never seen alive from here was not."""
        if snapshot.alive(node) is not None:
            self._seen_ns[node] = self._world.boot_ns()
            return True
        seen_ns = self._seen_ns.get(node)
        if seen_ns is None:
            return False
        return (self._world.boot_ns() - seen_ns) / 1e9 <= timeout_s - wire.LEASE_TTL_S
