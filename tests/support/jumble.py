"""A store's view under random changes: of instances, ledgers and orders, likely ones and others.

For rules that say what a view shows by what has changed in it: whatever comes, they must say the same as those that
look at everything.
"""

import collections
import random

import msgspec

from covey import model
from covey.store import base, codec, schema, view
from tests.support import nouns

NODES = tuple(map(model.NodeId, ("a", "b", "c")))
_IDS = tuple(model.InstanceId(f"i{number}") for number in range(6))
_CHAIN = "n1"


class Jumble:
    """Each `change` is one revision."""

    def __init__(self, chance: random.Random) -> None:
        self._chance = chance
        self._kvs: dict[str, base.Kv] = {}
        self._draft = self._new_draft()
        self._instances: dict[str, model.Instance] = {}
        self._claims: dict[str, set[tuple[model.InstanceId, int]]] = {node: set() for node in NODES}
        self._orders: set[tuple[str, str]] = set()
        self._put(schema.HISTORY + _CHAIN, b"{}")
        for node in NODES:
            self._put(schema.node(node), codec.encode(model.Node(id=node, created_ns=1)))

    def snapshot(self) -> view.Snapshot:
        return self._draft.freeze()

    def change(self) -> None:
        self._chance.choice((self._change_instance, self._change_instance, self._change_ledger, self._change_order))()

    def list_again(self) -> None:
        """The copy is made anew of the same store."""
        draft = self._new_draft()
        for key, kv in self._kvs.items():
            draft.apply(base.Change(key, kv))
        draft.revision = self._draft.revision
        self._draft = draft

    def _new_draft(self) -> view.Draft:
        draft = view.Draft()
        draft._noted = collections.deque(maxlen=self._chance.choice((3, 10, 1000)))  # so that it does not always do
        return draft

    def restore(self) -> None:
        """A break: nothing may be concluded from the silence of nodes that were known."""
        nonce = f"break {self._draft.revision}"
        self._put(schema.BREAK, codec.encode(schema.Break(nonce=nonce, why="the test says so", at_ns=1)))

    def settle(self) -> None:
        """All of them have told what they have."""
        self._put(schema.SETTLED, codec.encode(schema.Settled(nonce=self._draft.breach.nonce)))

    def _change_instance(self) -> None:
        id = self._chance.choice(_IDS)
        old = self._instances.get(id)
        if old is not None and self._chance.random() < 0.1:
            del self._instances[id]
            self._put(schema.instance(id), None)
            return
        noun = old or nouns.instance(id=id, node=self._chance.choice(NODES), epoch=1, state=model.State.PULLING)
        changes: dict[str, object] = {"state": self._chance.choice(list(model.State))}
        if old is not None and self._chance.random() < 0.3:
            changes = {"node": self._chance.choice((*NODES, model.NOWHERE)), "epoch": old.epoch + 1}
        elif self._chance.random() < 0.5:
            changes = {
                "state": model.State.STARTED,
                "launch": model.Launch(node=noun.node, session=1, epoch=noun.epoch, nonce="x"),
            }
        self._instances[id] = noun = msgspec.structs.replace(noun, **changes)
        self._put(schema.instance(id), codec.encode(noun))
        if noun.node and self._chance.random() < 0.9:
            self._claims[noun.node].add((id, noun.epoch))
            self._put_ledger(noun.node)

    def _change_ledger(self) -> None:
        node = self._chance.choice(NODES)
        claim = (self._chance.choice(_IDS), self._chance.randint(1, 3))
        self._claims[node] ^= {claim}
        self._put_ledger(node)

    def _change_order(self) -> None:
        node, id = self._chance.choice(NODES), self._chance.choice(_IDS)
        if (node, id) in self._orders:
            self._orders.discard((node, id))
            self._put(schema.order(node, id), None)
            return
        self._orders.add((node, id))
        who = model.Decision(who="test", why="the test says so")
        epoch = self._chance.randint(1, 3)
        self._put(schema.order(node, id), codec.encode(model.Order(node=node, instance=id, epoch=epoch, decision=who)))

    def _put_ledger(self, node: model.NodeId) -> None:
        claims = tuple(model.Claim(instance=id, epoch=epoch) for id, epoch in sorted(self._claims[node]))
        self._put(schema.ledger(node), codec.encode(model.Ledger(node=node, claims=claims)))

    def _put(self, key: str, value: bytes | None) -> None:
        revision = self._draft.revision + 1
        kv = None if value is None else base.Kv(key, value, 1, revision)
        self._kvs.pop(key, None)
        if kv is not None:
            self._kvs[key] = kv
        self._draft.apply(base.Change(key, kv))
        self._draft.revision = revision
