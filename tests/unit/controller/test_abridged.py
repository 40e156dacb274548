"""Answers that leave out what the node knows: it never acts on another list than the whole one (safety S2)."""

import random

import pytest

from covey import model, wire
from covey.controller import wanted
from covey.decide import abridged
from covey.store import view
from tests.support import cloud, jumble, nouns

Said = wire.ReportEvent


class Reader:
    """A node, as far as it knows what is wanted."""

    def __init__(self, node: str) -> None:
        self.node = node
        self.known = wire.Seen()
        self.wants: tuple[wire.Wanted, ...] = ()
        self.told = self.left_out = self.mismatches = 0

    def asks(self, snapshot: view.Snapshot) -> None:
        answer = wanted.for_node(snapshot, self.node)
        since = wanted.known_since(snapshot, self.known)
        told = answer.since(since)
        wants = abridged.whole(self.wants, told) if since else told
        if not abridged.is_all(wants, answer.tag):
            self.mismatches += 1
            wants = told = answer.wanted
        assert wants == answer.wanted
        self.told += len(told)
        self.left_out += len(wants) - len(told)
        self.wants, self.known = wants, snapshot.seen

    def hears_of_an_end(self) -> None:
        """That it said so was settled before the answer came: it takes the order for done."""
        self.wants = tuple(want for want in self.wants if want.verb is not wire.Verb.DESTROY)


@pytest.mark.parametrize("seed", range(20))
def test_put_together_it_is_the_whole_answer_whatever_came_between(seed: int) -> None:
    chance = random.Random(seed)
    store = jumble.Jumble(chance)
    readers = [Reader(node) for node in jumble.NODES]
    for _ in range(2000):
        store.change()
        if chance.random() < 0.02:
            store.list_again()
        for reader in readers:
            if chance.random() < 0.2:
                reader.asks(store.snapshot())
            if chance.random() < 0.1:
                reader.hears_of_an_end()
    assert all(reader.left_out > reader.mismatches > 0 for reader in readers), "both ways were gone"


async def test_a_life_beside_one_that_stands_is_told_without_it() -> None:
    """Nor does the node ever have to ask twice."""
    async with cloud.running() as c:
        node = await c.join(facts=nouns.facts(slots=4))
        (stands,) = await c.create(homes=[node])
        await c.started(node, stands)
        reader = Reader(node)
        reader.asks(await c.look())
        for _ in range(3):
            (id,) = await c.create(homes=[node])
            reader.asks(await c.look())
            await c.started(node, id)
            reader.asks(await c.look())
            await c.terminate(id)
            reader.asks(await c.look())
            await c.report(node, nouns.item(Said.GONE, model.InstanceId(id)))
            reader.hears_of_an_end()
            reader.asks(await c.look())
        assert (reader.told, reader.left_out, reader.mismatches) == (1 + 3 * 3, 3 * 4, 0)


async def test_what_was_known_of_another_history_counts_for_nothing() -> None:
    """Safety S18, S22: nor does a view that is newer than this one."""
    async with cloud.running() as c:
        snapshot = await c.look()
        assert wanted.known_since(snapshot, snapshot.seen) == snapshot.revision
        assert wanted.known_since(snapshot, wire.Seen()) == 0
        other = wire.Seen(history="another", revision=snapshot.revision)
        assert wanted.known_since(snapshot, other) == 0
        newer = wire.Seen(history=snapshot.history, revision=snapshot.revision + 1)
        assert wanted.known_since(snapshot, newer) == 0
