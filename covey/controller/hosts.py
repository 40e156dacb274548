"""Nodes as placement sees them, and homes for instances that are being born.

The fastest start is created and placed in one transaction. Several starts at once must then not choose the same node:
each rewrites the node's ledger, and all but one would lose. `Homes` lets one start of this process at a time use a
node, until the mirror shows what it wrote, and of equal nodes each controller prefers its own share. Nothing rests on
that but speed: the transaction's guards decide.
"""

import hashlib
from collections import deque
from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import NamedTuple, Self

import msgspec

from covey import model, world
from covey.decide import permission, placement, rooms
from covey.store import codec, view

_REFRESH_NS = 50_000_000  # a row of candidates may be this old; the chosen node is looked at anew
_KINDS = 64  # rows that are kept
_BORN_TOGETHER = 8  # more instances of one request than this queue: their transaction would be very large
_NO_LEDGER = "what it holds cannot be read from the store"  # no placement there could be written down


def host(snapshot: view.Snapshot, id: str, silent: frozenset[str] = frozenset()) -> rooms.Host | None:
    """One node; None when it never joined. `silent`: nodes that this controller has found silent (safety S8)."""
    node, session = snapshot.node(id), snapshot.session(id)
    if node is None or session is None:
        return None
    ledger, word, alive = snapshot.ledger(id), snapshot.word(id), snapshot.alive(id)
    trouble = word.noun.trouble if word is not None and word.noun.session == session.noun.counter else ""
    return rooms.Host(
        node=node.noun,
        facts=session.noun.facts,
        claims=ledger.noun.claims if ledger is not None else (),
        images=_images(word),
        alive=alive is not None and alive.noun.session == session.noun.counter and id not in silent,
        owed=any(order.noun.withdrawn for order in snapshot.orders_on(id)),
        trouble=_NO_LEDGER if ledger is None else trouble,
        held=permission.HELD if snapshot.held(id) else "",
    )


_NONE: frozenset[str] = frozenset()


def _images(word: codec.Kept[model.Word] | None) -> frozenset[str]:
    return frozenset(word.noun.images) if word is not None and word.noun.images else _NONE


class _Known(NamedTuple):
    """A node as it was worked out last."""

    host: rooms.Host
    room: rooms.Room


class Fleet:
    """Every node that has joined. Only those that have changed since the last look are worked out anew."""

    def __init__(self) -> None:
        self.silent: frozenset[str] = frozenset()  # kept up to date by the loop (safety S8)
        self._known: dict[str, _Known] = {}
        self._looked_at = view.Snapshot()
        self._silent_then: frozenset[str] = frozenset()

    def look(self, snapshot: view.Snapshot) -> None:
        changed = snapshot.nodes_differing(self._looked_at) | (self.silent ^ self._silent_then)
        self._looked_at, self._silent_then = snapshot, self.silent
        for id in changed:
            found = host(snapshot, id, self.silent)
            if found is None:
                self._known.pop(id, None)
            else:
                self._known[id] = _Known(found, rooms.room(found))

    def hosts(self, snapshot: view.Snapshot) -> list[rooms.Host]:
        self.look(snapshot)
        return [self._known[kept.noun.id].host for kept in snapshot.nodes() if kept.noun.id in self._known]

    def rooms(self) -> Iterator[rooms.Room]:
        """As of the last look: not to be written to."""
        return (known.room for known in self._known.values())


@dataclass(slots=True)
class _Row:
    """Nodes for one kind of instance, best first, as they were a moment ago."""

    made_ns: int
    nodes: deque[model.NodeId]


class Homes:
    """Chooses nodes for instances that are being born, one start per node at a time. `me`: this controller's id."""

    def __init__(self, world: world.World, me: str) -> None:
        self.fleet = Fleet()
        self._world = world
        self._rows: dict[Hashable, _Row] = {}
        self._in_use: dict[str, int | None] = {}  # node -> revision that the mirror must show first; None: not known
        self._me = me
        self._others: frozenset[str] = frozenset()  # controllers, as of `_likings`
        self._likings: dict[str, int] = {}

    def reserve(self, snapshot: view.Snapshot, spec: model.Spec, count: int) -> "Reservation":
        """Use as ``with homes.reserve(…) as reservation:``, create at `reservation.nodes` (empty: let them queue), and
        tell it the revision of the creation."""
        self._release(snapshot.revision)
        nodes: list[model.NodeId] = []
        waiting = (kept.noun for kept in snapshot.waiting())
        if count <= _BORN_TOGETHER and placement.may_be_born_placed(spec, waiting):
            nodes = self._chosen(snapshot, spec, count)
        self._in_use.update(dict.fromkeys(nodes))
        return Reservation(self, tuple(nodes), snapshot, spec)

    def _chosen(self, snapshot: view.Snapshot, spec: model.Spec, count: int) -> list[model.NodeId]:
        """So many nodes, or none. Those at the front of a row that was made a moment ago are looked at anew; when they
        do not do, a new row is made."""
        now_ns, kind = self._world.boot_ns(), placement.kind_of(spec)
        row = self._rows.get(kind)
        if row is not None and now_ns - row.made_ns < _REFRESH_NS:
            nodes = self._first(snapshot, spec, row, count)
            if len(nodes) == count:
                return nodes
        if len(self._rows) > _KINDS:
            self._rows.clear()
        self.fleet.look(snapshot)
        self._meet(snapshot)
        found = placement.candidates_for_new(kind, self.fleet.rooms(), self._liking)
        row = self._rows[kind] = _Row(now_ns, deque(found))
        nodes = self._first(snapshot, spec, row, count)
        return nodes if len(nodes) == count else []

    def _first(self, snapshot: view.Snapshot, spec: model.Spec, row: _Row, count: int) -> list[model.NodeId]:
        """Take up to `count` nodes off the row: those that are free and still fit."""
        nodes: list[model.NodeId] = []
        while row.nodes and len(nodes) < count:
            id = row.nodes.popleft()
            found = None if id in self._in_use else host(snapshot, id, self.fleet.silent)
            if found is not None and placement.fits(found, spec):
                nodes.append(id)
        return nodes

    def _meet(self, snapshot: view.Snapshot) -> None:
        others = frozenset(kept.noun.id for kept in snapshot.controllers()) - {self._me}
        if others != self._others:
            self._others, self._likings = others, {}

    def _liking(self, node: model.NodeId) -> int:
        """Of equal nodes a controller takes those first for which it has the lowest lot of all controllers, then those
        for which one has a lower lot, and so on: so they seldom meet at one."""
        known = self._likings.get(node)
        if known is None:
            mine = _lot(self._me, node)
            before = sum(_lot(other, node) < mine for other in self._others)
            known = self._likings[node] = (before << 32) + mine
        return known

    def release(self, nodes: tuple[model.NodeId, ...], revision: int) -> None:
        """The nodes are free for the next start once the mirror shows `revision`."""
        for node in nodes:
            self._in_use[node] = revision

    def _release(self, revision: int) -> None:
        for node in [node for node, until in self._in_use.items() if until is not None and until <= revision]:
            del self._in_use[node]


class Reservation:
    """Nodes that one start may use. `revision`: set it to the creation's; 0 frees them at once."""

    def __init__(
        self, homes: Homes, nodes: tuple[model.NodeId, ...], snapshot: view.Snapshot, spec: model.Spec
    ) -> None:
        self._homes = homes
        self._snapshot = snapshot
        self._spec = spec
        self.nodes = nodes
        self.revision = 0

    def fits(self, node: model.NodeId, ledger: model.Ledger) -> bool:
        """Whether a node has room beside these claims, other ones than it was chosen by."""
        found = host(self._snapshot, node, self._homes.fleet.silent)
        return found is not None and placement.fits(msgspec.structs.replace(found, claims=ledger.claims), self._spec)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._homes.release(self.nodes, self.revision)


def _lot(controller: str, node: str) -> int:
    return int.from_bytes(hashlib.blake2b(f"{controller} {node}".encode(), digest_size=4).digest(), "big")
