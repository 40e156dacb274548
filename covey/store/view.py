"""A snapshot: everything decisions and answers need, as of one revision, immutable.

Taking one is cheap although the mirror changes hundreds of times a second: a `Table` is cut into shards, a snapshot
shares them, and a later change copies only the shard it falls into. Values of keys that only transactions look at
(outputs, scripts, births, idempotency records, events) are not held.
"""

from collections.abc import Iterator
from typing import Generic, TypeVar

from covey import model
from covey.store import base, codec, schema

V = TypeVar("V")

_SHARDS = 128


class Table(Generic[V]):
    """A map of text to V whose `freeze` costs one list copy."""

    __slots__ = ("_owned", "_shards", "_size")

    def __init__(self) -> None:
        self._shards: list[dict[str, V]] = [{} for _ in range(_SHARDS)]
        self._owned = [True] * _SHARDS
        self._size = 0

    def freeze(self) -> "Table[V]":
        """An immutable copy: by agreement, nobody writes to it."""
        copy: Table[V] = Table.__new__(Table)
        copy._shards = self._shards.copy()
        copy._owned = [False] * _SHARDS
        copy._size = self._size
        self._owned = [False] * _SHARDS
        return copy

    def get(self, key: str) -> V | None:
        return self._shards[hash(key) % _SHARDS].get(key)

    def put(self, key: str, value: V) -> V | None:
        """Set and answer with what was there before."""
        shard = self._own(key)
        before = shard.get(key)
        self._size += key not in shard
        shard[key] = value
        return before

    def drop(self, key: str) -> V | None:
        """Remove and answer with what was there."""
        if key not in self._shards[hash(key) % _SHARDS]:
            return None
        self._size -= 1
        return self._own(key).pop(key)

    def items(self) -> Iterator[tuple[str, V]]:
        for shard in self._shards:
            yield from shard.items()

    def values(self) -> Iterator[V]:
        for shard in self._shards:
            yield from shard.values()

    def __len__(self) -> int:
        return self._size

    def __contains__(self, key: str) -> bool:
        return key in self._shards[hash(key) % _SHARDS]

    def _own(self, key: str) -> dict[str, V]:
        index = hash(key) % _SHARDS
        if not self._owned[index]:
            self._shards[index] = self._shards[index].copy()
            self._owned[index] = True
        return self._shards[index]


Instances = dict[str, codec.Kept[model.Instance]]


class Snapshot:
    """The cloud as of `revision`. `history` is the newest nonce (safety S18); revisions compare only within it."""

    __slots__ = (
        "_alive",
        "_by_node",
        "_by_state",
        "_controllers",
        "_instances",
        "_ledgers",
        "_nodes",
        "_orders",
        "_removed",
        "_sessions",
        "_waiting",
        "_words",
        "cloud",
        "format",
        "history",
        "revision",
    )

    def __init__(self) -> None:
        self.revision = 0
        self.history = ""
        self.cloud = ""
        self.format = 0
        self._instances: Table[codec.Kept[model.Instance]] = Table()
        self._nodes: dict[str, codec.Kept[model.Node]] = {}

    def instance(self, id: str) -> codec.Kept[model.Instance] | None: ...

    def instances(self) -> Iterator[codec.Kept[model.Instance]]:
        """All, in no particular order."""
        ...

    def instances_on(self, node: str) -> Iterator[codec.Kept[model.Instance]]:
        """Those whose `node` is this one, whatever their state."""
        ...

    def in_state(self, state: model.State) -> Iterator[codec.Kept[model.Instance]]: ...

    def waiting(self) -> Iterator[codec.Kept[model.Instance]]:
        """Those that wait for a node: in Scheduling, or in Pulling after a placement was withdrawn."""
        ...

    def node(self, id: str) -> codec.Kept[model.Node] | None: ...

    def nodes(self) -> Iterator[codec.Kept[model.Node]]: ...

    def session(self, node: str) -> codec.Kept[model.Session] | None: ...

    def alive(self, node: str) -> codec.Kept[schema.Alive] | None:
        """The node's sign of life, bound to its session's lease; None when the lease ended."""
        ...

    def word(self, node: str) -> codec.Kept[model.Word] | None: ...

    def ledger(self, node: str) -> codec.Kept[model.Ledger] | None: ...

    def order(self, node: str, instance: str) -> codec.Kept[model.Order] | None: ...

    def orders_on(self, node: str) -> Iterator[codec.Kept[model.Order]]: ...

    def removed(self, node: str) -> codec.Kept[schema.Removed] | None: ...

    def controllers(self) -> Iterator[codec.Kept[schema.Controller]]: ...
