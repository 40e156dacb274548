"""A snapshot: everything decisions and answers need, as of one revision, immutable.

Taking one is cheap although the mirror changes hundreds of times a second: a `Table` is cut into shards, a snapshot
shares them, and a later change copies only the shard it falls into. Values of keys that only transactions look at
(outputs, scripts, births, idempotency records, events) are not held.
"""

import bisect
import collections
from collections.abc import Callable, Iterator, Mapping
from enum import StrEnum
from typing import Generic, TypeVar

import msgspec

from covey import model, wire
from covey.decide import permission
from covey.store import base, codec, schema

V = TypeVar("V")
N = TypeVar("N", bound=msgspec.Struct)

_SHARDS = 64
_PARTS = 64  # a label's instances are kept in so many parts: a change copies one of them
_NOTED = 8192  # changes that are remembered one by one: those of some seconds at least
_INSTANCE, _CLAIMS = "instance", "claims"
_CHANGES = {"instance": _INSTANCE, "ledger": _CLAIMS, "order": _CLAIMS}  # what is noted of a change, by kind of key
_NO_BREACH = permission.Link(0, "")


class Label(StrEnum):
    """What instances are looked up by."""

    EXTERNAL_ID = "external_id"
    TEMPLATE = "template"  # its id, or its name when the instance was started
    GROUP = "group"


class Table(Generic[V]):
    """A map of text to V whose `freeze` costs one short list copy, or nothing when it has not changed since."""

    __slots__ = ("_copy", "_owned", "_shards", "_size")

    def __init__(self) -> None:
        self._shards: list[dict[str, V]] = [{} for _ in range(_SHARDS)]
        self._owned = set(range(_SHARDS))  # the shards that no frozen copy shares
        self._size = 0
        self._copy: Table[V] | None = None  # how it is, frozen

    def freeze(self) -> "Table[V]":
        """An immutable copy: by agreement, nobody writes to it."""
        copy = self._copy
        if copy is None:
            copy = self._copy = Table.__new__(Table)
            copy._shards = self._shards.copy()
            copy._owned = set()
            copy._size = self._size
            copy._copy = None
            self._owned = set()
        return copy

    def get(self, key: str) -> V | None:
        return self._shards[hash(key) % _SHARDS].get(key)

    def put(self, key: str, value: V) -> V | None:
        """Set, and answer with what was there before."""
        shard = self._own(hash(key) % _SHARDS)
        before = shard.get(key)
        self._size += key not in shard
        shard[key] = value
        return before

    def drop(self, key: str) -> V | None:
        """Remove, and answer with what was there."""
        index = hash(key) % _SHARDS
        if key not in self._shards[index]:
            return None
        self._size -= 1
        return self._own(index).pop(key)

    def lost_since(self, before: "Table[V]") -> Iterator[str]:
        """Keys that `before` has and this one lacks. Costs what has changed: shards that both share are passed by."""
        for shard, old in zip(self._shards, before._shards, strict=True):
            if shard is not old:
                yield from old.keys() - shard.keys()

    def keys(self) -> Iterator[str]:
        for shard in self._shards:
            yield from shard

    def differing(self, other: "Table[V]") -> Iterator[str]:
        """Keys whose values are not the very same objects in both; quick when few shards are."""
        for mine, its in zip(self._shards, other._shards, strict=True):
            if mine is not its:
                for key, value in mine.items():
                    if its.get(key) is not value:
                        yield key
                yield from its.keys() - mine.keys()

    def values(self) -> Iterator[V]:
        for shard in self._shards:
            yield from shard.values()

    def __len__(self) -> int:
        return self._size

    def _own(self, index: int) -> dict[str, V]:
        self._copy = None
        if index not in self._owned:
            self._shards[index] = self._shards[index].copy()
            self._owned.add(index)
        return self._shards[index]


_Instances = dict[str, codec.Kept[model.Instance]]
_Orders = dict[str, codec.Kept[model.Order]]
_Questions = dict[str, codec.Kept[model.Question]]


class Snapshot:
    """The cloud as of `revision`. `history` is the newest nonce (safety S18); revisions compare only within it."""

    def __init__(self) -> None:
        self.revision = 0
        self.history = ""
        self.cloud = ""
        self.format = 0
        self.fence = 0  # mod revision of the format key: raised by every break, and compared by every write
        self.chain: tuple[permission.Link, ...] = ()  # the nonces of this store's history, oldest first
        self.breach = _NO_BREACH  # the newest break
        self.breach_why = ""
        self.broke: base.Kv | None = None  # its key as it is stored: what it holds names the break
        self.settled = ""  # the newest break that all nodes have answered for
        self._instances: Table[codec.Kept[model.Instance]] = Table()
        self._nodes: Table[codec.Kept[model.Node]] = Table()
        self._sessions: Table[codec.Kept[model.Session]] = Table()
        self._alive: Table[codec.Kept[schema.Alive]] = Table()
        self._words: Table[codec.Kept[model.Word]] = Table()
        self._ledgers: Table[codec.Kept[model.Ledger]] = Table()
        self._removed: Table[codec.Kept[schema.Removed]] = Table()
        self._controllers: Table[codec.Kept[schema.Controller]] = Table()
        self._orders: Table[_Orders] = Table()  # node -> instance -> order
        self._questions: Table[_Questions] = Table()  # node -> slot -> question
        self._on_node: Table[_Instances] = Table()  # node -> id -> instance; its dicts are never changed in place
        self._by_state: dict[model.State, Table[None]] = {state: Table() for state in model.State}
        self._waiting: Table[None] = Table()
        self._unacknowledged: Table[None] = Table()
        self._script_users: Table[int] = Table()
        self._labelled: Table[dict[str, None]] = Table()  # part, label, value -> ids; never changed in place
        self._adopted: Table[codec.Kept[schema.Adopted]] = Table()
        # After which revision, what, and which one has changed last. Shared by all views of one copy of the store.
        self._noted: collections.deque[tuple[int, str, str]] = collections.deque(maxlen=_NOTED)

    # ---- history

    @property
    def seen(self) -> wire.Seen:
        """This very view, as an agent remembers it (safety S18)."""
        return wire.Seen(history=self.history, revision=self.revision)

    def is_shut_out_from(self, newer: "Snapshot") -> bool:
        """Whether what is decided on this view can no longer be written where `newer` is the view: a break came between
        (safety S18), or the store's format was raised."""
        return self.fence != newer.fence or not is_same_break(self.broke, newer.broke)

    def kinship(self, seen: wire.Seen) -> permission.Kinship:
        """How what somebody saw relates to this store."""
        return permission.kinship(self.chain, self.revision, permission.View(seen.history, seen.revision))

    def adopted(self, node: str) -> codec.Kept[schema.Adopted] | None:
        return self._adopted.get(node)

    def held(self, node: str) -> bool:
        """Whether the node must tell what it has before anything is done there (safety S19)."""
        kept = self._adopted.get(node)
        return permission.held(self.breach.nonce, kept.noun.nonce if kept is not None else "")

    def awaited(self) -> list[permission.Standing]:
        """The nodes whose word is waited for since the newest break, by name."""
        if self.breach.nonce in ("", self.settled):
            return []
        return sorted(permission.awaited(self.breach, map(self._standing, self._nodes.values())), key=_by_name)

    def awaits(self, node: str) -> bool:
        """Whether this node's word is waited for: nothing is concluded from its silence (safety S19)."""
        kept = self._nodes.get(node)
        return kept is not None and self.held(node) and bool(permission.awaited(self.breach, [self._standing(kept)]))

    def may_begin(self, kept: codec.Kept[model.Instance]) -> bool:
        """Whether the instance may be placed and launched, as far as breaks matter (safety S19)."""
        noun = kept.noun
        return permission.may_begin(
            self.breach, self.settled, created=kept.created, learnt=noun.learnt, launched=noun.launched
        )

    def _standing(self, kept: codec.Kept[model.Node]) -> permission.Standing:
        id = kept.noun.id
        adopted, session = self._adopted.get(id), self._sessions.get(id)
        name = kept.noun.name or (session.noun.facts.name if session is not None else "")
        noun = adopted.noun if adopted is not None else schema.Adopted()
        return permission.Standing(id, name, noun.nonce, noun.excused)

    # ---- instances

    def instance(self, id: str) -> codec.Kept[model.Instance] | None:
        return self._instances.get(id)

    def instances(self) -> Iterator[codec.Kept[model.Instance]]:
        """All, in no particular order."""
        return self._instances.values()

    def instance_count(self, state: model.State | None = None) -> int:
        return len(self._instances) if state is None else len(self._by_state[state])

    def instances_on(self, node: str) -> Iterator[codec.Kept[model.Instance]]:
        """Those whose `node` is this one, but for Terminated ones."""
        return iter(self.by_id_on(node).values())

    def by_id_on(self, node: str) -> Mapping[str, codec.Kept[model.Instance]]:
        """The same, by their ids."""
        return self._on_node.get(node) or {}

    def in_state(self, state: model.State) -> Iterator[codec.Kept[model.Instance]]:
        return self._known(self._by_state[state].keys())

    def waiting(self) -> Iterator[codec.Kept[model.Instance]]:
        """Those that wait for a node."""
        return self._known(self._waiting.keys())

    def waiting_count(self) -> int:
        return len(self._waiting)

    def unacknowledged(self) -> Iterator[codec.Kept[model.Instance]]:
        """Placed, not launched, and their node has not named them yet (safety S10)."""
        return self._known(self._unacknowledged.keys())

    def instances_since(self, before: "Snapshot") -> set[str]:
        """Those that are not the same as in an earlier view, and perhaps some that are again."""
        noted = self._noted_since(before, _INSTANCE)
        return set(self._instances.differing(before._instances)) if noted is None else noted

    def labelled(self, label: Label, value: str) -> Iterator[codec.Kept[model.Instance]]:
        """Those that carry the label, in no particular order."""
        for part in range(_PARTS):
            yield from self._known(self._labelled.get(f"{part} {label} {value}") or ())

    def script_users(self, key: str) -> int:
        """How many instances refer to this start script."""
        return self._script_users.get(key) or 0

    # ---- nodes

    def node(self, id: str) -> codec.Kept[model.Node] | None:
        return self._nodes.get(id)

    def nodes(self) -> Iterator[codec.Kept[model.Node]]:
        return self._nodes.values()

    def session(self, node: str) -> codec.Kept[model.Session] | None:
        return self._sessions.get(node)

    def alive(self, node: str) -> codec.Kept[schema.Alive] | None:
        """The node's sign of life, bound to its session's lease; None when the lease ended."""
        return self._alive.get(node)

    def died_since(self, before: "Snapshot") -> Iterator[str]:
        """The nodes that had a sign of life then and have none now."""
        return self._alive.lost_since(before._alive)

    def alive_count(self) -> int:
        return len(self._alive)

    def word(self, node: str) -> codec.Kept[model.Word] | None:
        return self._words.get(node)

    def ledger(self, node: str) -> codec.Kept[model.Ledger] | None:
        return self._ledgers.get(node)

    def ledgers(self) -> Iterator[codec.Kept[model.Ledger]]:
        return self._ledgers.values()

    def order(self, node: str, instance: str) -> codec.Kept[model.Order] | None:
        return (self._orders.get(node) or {}).get(instance)

    def orders_on(self, node: str) -> Iterator[codec.Kept[model.Order]]:
        return iter((self._orders.get(node) or {}).values())

    def nodes_differing(self, other: "Snapshot") -> set[str]:
        """Nodes whose room may not be the same in both."""
        if self.breach != other.breach:
            return {*self._nodes.keys(), *other._nodes.keys()}
        found = set(self._nodes.differing(other._nodes))
        for mine, its in (
            (self._sessions, other._sessions),
            (self._ledgers, other._ledgers),
            (self._words, other._words),
            (self._alive, other._alive),
            (self._orders, other._orders),
            (self._adopted, other._adopted),
        ):
            found.update(mine.differing(its))  # type: ignore[arg-type]
        return found

    def claims_since(self, before: "Snapshot") -> set[str]:
        """Nodes whose ledger or orders are not the same as in an earlier view, and perhaps some whose are again."""
        noted = self._noted_since(before, _CLAIMS)
        if noted is not None:
            return noted
        return {*self._ledgers.differing(before._ledgers), *self._orders.differing(before._orders)}

    def question(self, node: str, slot: int) -> codec.Kept[model.Question] | None:
        return (self._questions.get(node) or {}).get(str(slot))

    def questions_to(self, node: str) -> Iterator[codec.Kept[model.Question]]:
        """Those that are open."""
        return iter((self._questions.get(node) or {}).values())

    def removed(self, node: str) -> codec.Kept[schema.Removed] | None:
        return self._removed.get(node)

    def removed_nodes(self) -> Iterator[str]:
        return self._removed.keys()

    def controller(self, id: str) -> codec.Kept[schema.Controller] | None:
        return self._controllers.get(id)

    def controllers(self) -> Iterator[codec.Kept[schema.Controller]]:
        return self._controllers.values()

    def controller_count(self) -> int:
        return len(self._controllers)

    def _noted_since(self, before: "Snapshot", kind: str) -> set[str] | None:
        """What was noted to have changed between an earlier view and this one; None: the notes do not say."""
        if self._noted is not before._noted or self.revision < before.revision:
            return None
        found: set[str] = set()
        for revision, what, id in reversed(self._noted):
            if revision < before.revision:
                return found
            if what == kind and revision < self.revision:
                found.add(id)
        return found if len(self._noted) != self._noted.maxlen else None

    def _known(self, ids: Iterator[str] | dict[str, None] | tuple[()]) -> Iterator[codec.Kept[model.Instance]]:
        for id in ids:
            kept = self._instances.get(id)
            if kept is not None:
                yield kept


class Draft(Snapshot):
    """The snapshot in the making. Only the mirror writes to it."""

    def __init__(self) -> None:
        super().__init__()
        self.broken: dict[str, str] = {}  # keys whose values are no nouns, shown to the operator
        self.touched: set[str] = set()  # nodes whose wanted state may have changed since the mirror last looked
        self._plain: dict[str, Callable[[str, base.Kv | None], None]] = {
            "node": lambda id, kv: self._set(self._nodes, model.Node, id, kv),
            "session": lambda id, kv: self._set(self._sessions, model.Session, id, kv),
            "alive": lambda id, kv: self._set(self._alive, schema.Alive, id, kv),
            "word": lambda id, kv: self._set(self._words, model.Word, id, kv),
            "ledger": lambda id, kv: self._set(self._ledgers, model.Ledger, id, kv),
            "removed": lambda id, kv: self._set(self._removed, schema.Removed, id, kv),
            "controller": lambda id, kv: self._set(self._controllers, schema.Controller, id, kv),
            "instance": self._set_instance,
            "order": lambda id, kv: self._set_below_node(self._orders, model.Order, id, kv),
            "ask": lambda id, kv: self._set_below_node(self._questions, model.Question, id, kv),
            "history": self._set_nonce,
            "adopted": lambda id, kv: self._set(self._adopted, schema.Adopted, id, kv),
        }
        self._wakes = {"session", "alive", "ledger", "removed", "adopted"}

    def apply(self, change: base.Change) -> None:
        """One key's change. What cannot be read counts as absent and is noted as broken."""
        if not change.key.startswith(schema.PREFIX):
            return
        kind, _, id = change.key[len(schema.PREFIX) :].partition("/")
        setter = self._plain.get(kind)
        if kind in _CHANGES:
            self._noted.append((self.revision, _CHANGES[kind], id.partition("/")[0]))
        try:
            if setter is not None:
                setter(id, change.kv)
                if kind in self._wakes:
                    self.touched.add(id)
            elif change.key == schema.CLOUD:
                self.cloud = "" if change.kv is None else codec.decode(change.kv, schema.Cloud).noun.id
            elif change.key == schema.FORMAT_KEY:
                self.fence = 0 if change.kv is None else change.kv.mod_revision
                self.format = 0 if change.kv is None else codec.decode(change.kv, schema.Format).noun.format
            elif change.key == schema.BREAK:
                self.broke = change.kv
                self._set_breach(change.kv)
            elif change.key == schema.SETTLED:
                self.settled = "" if change.kv is None else codec.decode(change.kv, schema.Settled).noun.nonce
            self.broken.pop(change.key, None)
        except codec.Broken as error:
            if setter is not None:
                setter(id, None)
            self.broken[change.key] = str(error)

    def freeze(self) -> Snapshot:
        """An immutable copy."""
        copy = Snapshot.__new__(Snapshot)
        for name, value in self.__dict__.items():
            if isinstance(value, Table):
                copy.__dict__[name] = value.freeze()
        copy._by_state = {state: table.freeze() for state, table in self._by_state.items()}
        for name in _PLAIN:
            copy.__dict__[name] = self.__dict__[name]
        return copy

    def node_ids(self) -> list[str]:
        """Every node that something is known of."""
        return [*self._sessions.keys(), *self._orders.keys(), *self._questions.keys(), *self._on_node.keys()]

    def _set(self, table: Table[codec.Kept[N]], kind: type[N], id: str, kv: base.Kv | None) -> None:
        if kv is None:
            table.drop(id)
        else:
            table.put(id, codec.decode(kv, kind))

    def _set_instance(self, id: str, kv: base.Kv | None) -> None:
        new = None if kv is None else codec.decode(kv, model.Instance)
        old = self._instances.drop(id) if new is None else self._instances.put(id, new)
        before, after = _work(old), _work(new)
        if before != after:
            self.touched.update(work[0] for work in (before, after) if work is not None)
        if old is not None:
            self._index(old.noun, None if new is None else new.noun)
        if new is not None:
            self._index_new(new, None if old is None else old.noun)
        if old is None or new is None or old.noun.external_id != new.noun.external_id:
            self._relabel(None if old is None else old.noun, None if new is None else new.noun)

    def _relabel(self, old: model.Instance | None, new: model.Instance | None) -> None:
        """Only at its birth, when it is forgotten, and when its external id changes."""
        before, after = _labels(old), _labels(new)
        for key in before ^ after:
            ids = dict(self._labelled.get(key) or {})
            if key in after and new is not None:
                ids[new.id] = None
            elif old is not None:
                ids.pop(old.id, None)
            if ids:
                self._labelled.put(key, ids)
            else:
                self._labelled.drop(key)

    def _index(self, old: model.Instance, new: model.Instance | None) -> None:
        """Take out of the indexes what `new` will not put there again."""
        id = old.id
        if new is None or new.state != old.state:
            self._by_state[old.state].drop(id)
        place = _place(old)
        if place and (new is None or _place(new) != place):
            rest = dict(self._on_node.get(place) or {})
            rest.pop(id, None)
            if rest:
                self._on_node.put(place, rest)
            else:
                self._on_node.drop(place)
        if old.waiting and not (new and new.waiting):
            self._waiting.drop(id)
        if _unacknowledged(old) and not (new and _unacknowledged(new)):
            self._unacknowledged.drop(id)
        if new is None and old.spec.script is not None:
            key = old.spec.script.key
            users = (self._script_users.get(key) or 0) - 1
            if users > 0:
                self._script_users.put(key, users)
            else:
                self._script_users.drop(key)

    def _index_new(self, kept: codec.Kept[model.Instance], old: model.Instance | None) -> None:
        new, id = kept.noun, kept.noun.id
        if old is None or old.state != new.state:
            self._by_state[new.state].put(id, None)
        place = _place(new)
        if place:
            self._on_node.put(place, {**(self._on_node.get(place) or {}), id: kept})
        if new.waiting:
            self._waiting.put(id, None)
        if _unacknowledged(new):
            self._unacknowledged.put(id, None)
        if old is None and new.spec.script is not None:
            key = new.spec.script.key
            self._script_users.put(key, (self._script_users.get(key) or 0) + 1)

    def _set_below_node(
        self, table: Table[dict[str, codec.Kept[N]]], kind: type[N], id: str, kv: base.Kv | None
    ) -> None:
        """A key <node>/<name>: the node's dict is made anew, because snapshots share it."""
        node, _, name = id.partition("/")
        below = dict(table.get(node) or {})
        if kv is None:
            below.pop(name, None)
        else:
            below[name] = codec.decode(kv, kind)
        if below:
            table.put(node, below)
        else:
            table.drop(node)
        self.touched.add(node)

    def _set_nonce(self, id: str, kv: base.Kv | None) -> None:
        if kv is None:
            self.chain = tuple(link for link in self.chain if link.nonce != id)
        else:  # never written twice, and listed in no particular order
            link = permission.Link(kv.create_revision, id)
            at = bisect.bisect_left(self.chain, link)
            if self.chain[at : at + 1] != (link,):
                self.chain = (*self.chain[:at], link, *self.chain[at:])
        self.history = self.chain[-1].nonce if self.chain else ""

    def _set_breach(self, kv: base.Kv | None) -> None:
        noun = None if kv is None else codec.decode(kv, schema.Break).noun
        if kv is None or noun is None:
            self.breach, self.breach_why = _NO_BREACH, ""
        else:
            self.breach, self.breach_why = permission.Link(kv.mod_revision, noun.nonce), noun.why
        self.touched.update(self._nodes.keys())


# As plain text: an Enum's own way into a text costs more than all the rest of a lookup, and each instance needs some.
_EXTERNAL_ID, _TEMPLATE, _GROUP = (str.__str__(label) for label in Label)
_PLAIN = (
    "revision",
    "history",
    "cloud",
    "format",
    "fence",
    "chain",
    "breach",
    "breach_why",
    "broke",
    "settled",
    "_noted",
)


def is_same_break(one: base.Kv | None, other: base.Kv | None) -> bool:
    """By what the key holds, a random nonce: two restores of one backup may enter their breaks at the same revision."""
    return (one and one.value) == (other and other.value)


def _by_name(one: permission.Standing) -> tuple[str, str]:
    return one.name, one.node


def _work(kept: codec.Kept[model.Instance] | None) -> tuple[str, int, model.State] | None:
    """What an instance gives its node to do, as far as its node must be told at once (see `controller.wanted`)."""
    if kept is None or kept.noun.node == model.NOWHERE or kept.noun.state == model.State.TERMINATED:
        return None
    state = kept.noun.state
    return kept.noun.node, kept.noun.epoch, model.State.PULLING if state == model.State.STARTED else state


def _place(instance: model.Instance) -> str:
    """The node under which an instance is listed."""
    return "" if instance.state == model.State.TERMINATED else instance.node


def _unacknowledged(instance: model.Instance) -> bool:
    return (
        instance.state == model.State.PULLING
        and instance.node != model.NOWHERE
        and not instance.acknowledged
        and not instance.launched
    )


def _labels(instance: model.Instance | None) -> set[str]:
    """The keys under which an instance is looked up."""
    if instance is None:
        return set()
    spec, part = instance.spec, hash(instance.id) % _PARTS
    pairs = (
        (_EXTERNAL_ID, instance.external_id),
        (_TEMPLATE, spec.template),
        (_TEMPLATE, spec.template_name),
        (_GROUP, spec.group),
    )
    return {f"{part} {label} {value}" for label, value in pairs if value}
