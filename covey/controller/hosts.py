"""Nodes as placement sees them, and homes for instances that are being born.

The fastest start is created and placed in one transaction. Several starts at once must then not choose the same node:
each rewrites the node's ledger, and all but one would lose. `Homes` lets one start of this process at a time use a
node, until the mirror shows what it wrote. Nothing rests on that but speed: the transaction's guards decide.
"""

from collections.abc import Iterator
from types import TracebackType
from typing import NamedTuple, Self

from covey import model, world
from covey.decide import permission, placement, rooms
from covey.store import codec, view

_REFRESH_NS = 10_000_000  # candidates may be this old; the chosen node is looked at anew
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
    """A node as it was worked out last, and what that rests on."""

    rests_on: tuple[object, ...]
    host: rooms.Host
    room: rooms.Room


class Fleet:
    """Every node that has joined. Only those that have changed since the last look are worked out anew."""

    def __init__(self) -> None:
        self.silent: frozenset[str] = frozenset()  # kept up to date by the loop (safety S8)
        self._known: dict[str, _Known] = {}

    def look(self, snapshot: view.Snapshot) -> None:
        before, self._known = self._known, {}
        for kept in snapshot.nodes():
            id = kept.noun.id
            rests_on = (kept, *_parts(snapshot, id), id in self.silent)
            known = before.get(id)
            if known is None or any(new is not old for new, old in zip(rests_on, known.rests_on, strict=True)):
                found = host(snapshot, id, self.silent)
                known = None if found is None else _Known(rests_on, found, rooms.room(found))
            if known is not None:
                self._known[id] = known

    def hosts(self, snapshot: view.Snapshot) -> list[rooms.Host]:
        self.look(snapshot)
        return [known.host for known in self._known.values()]

    def rooms(self) -> Iterator[rooms.Room]:
        """As of the last look: not to be written to."""
        return (known.room for known in self._known.values())


def _parts(snapshot: view.Snapshot, id: str) -> tuple[object, ...]:
    """What a node's room rests on; the snapshot hands out the very same objects as long as they are unchanged."""
    return (
        snapshot.session(id),
        snapshot.ledger(id),
        snapshot.word(id),
        snapshot.alive(id),
        snapshot.orders_key(id),
        snapshot.held(id),
    )


class Homes:
    """Chooses nodes for instances that are being born, one start per node at a time."""

    def __init__(self, world: world.World) -> None:
        self.fleet = Fleet()
        self._world = world
        self._looked_ns = -_REFRESH_NS
        self._in_use: dict[str, int | None] = {}  # node -> revision that the mirror must show first; None: not known

    def reserve(self, snapshot: view.Snapshot, spec: model.Spec, count: int) -> "Reservation":
        """Use as ``with homes.reserve(…) as reservation:``, create at `reservation.nodes` (empty: let them queue), and
        tell it the revision of the creation."""
        self._release(snapshot.revision)
        nodes: list[model.NodeId] = []
        if count <= _BORN_TOGETHER:
            waiting = (kept.noun for kept in snapshot.waiting())
            for room in placement.candidates_for_new(spec, self._rooms(snapshot), waiting, self._in_use.keys()):
                if len(nodes) == count:
                    break
                found = host(snapshot, room.host.id, self.fleet.silent)
                if found is not None and placement.fits(found, spec):
                    nodes.append(found.id)
        if len(nodes) < count:
            nodes = []
        self._in_use.update(dict.fromkeys(nodes))
        return Reservation(self, tuple(nodes))

    def release(self, nodes: tuple[model.NodeId, ...], revision: int) -> None:
        """The nodes are free for the next start once the mirror shows `revision`."""
        for node in nodes:
            self._in_use[node] = revision

    def _release(self, revision: int) -> None:
        for node in [node for node, until in self._in_use.items() if until is not None and until <= revision]:
            del self._in_use[node]

    def _rooms(self, snapshot: view.Snapshot) -> Iterator[rooms.Room]:
        """The nodes' rooms, a moment old."""
        now_ns = self._world.boot_ns()
        if now_ns - self._looked_ns > _REFRESH_NS:
            self._looked_ns = now_ns
            self.fleet.look(snapshot)
        return self.fleet.rooms()


class Reservation:
    """Nodes that one start may use. `revision`: set it to the creation's; 0 frees them at once."""

    def __init__(self, homes: Homes, nodes: tuple[model.NodeId, ...]) -> None:
        self._homes = homes
        self.nodes = nodes
        self.revision = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._homes.release(self.nodes, self.revision)
