"""What a controller observes (`decide.deadlines`), kept up by what has changed between two looks.

Twice a second everything whose time may run out is noted anew. Most of it stands as it stood: claims of instances that
run, and thousands of instances that are over and wait to be forgotten. So a look goes through what differs from the
view before, and comes to what `deadlines.observe` makes of `watchlist.things`.

    an instance differs       what may run out for it follows from it alone
    a ledger or order differs, or an instance that is or was there
                              the claims of that node that nobody wants; nodes with odd claims are looked at each time
    a break is not settled    nothing follows from changes alone: everything is gone through

What is observed is held by kind, in the order in which it was first seen as it is: the first that is not ripe is the
last that is looked at.
"""

from collections.abc import Iterator

from covey.controller import watchlist
from covey.decide import deadlines
from covey.store import view

Kind = deadlines.Kind
Since = deadlines.Since
Thing = deadlines.Thing


class Observation:
    """`look` at each view, then ask what is `ripe`; `forget` when this controller was not ready all the while."""

    def __init__(self) -> None:
        self._observed: dict[Kind, dict[Thing, Since]] = {}
        self._before: view.Snapshot | None = None
        self._odd: dict[str, list[tuple[Thing, int]]] = {}  # nodes with odd claims, and those that nobody wants

    def forget(self) -> None:
        """Every span starts over."""
        self._observed, self._before, self._odd = {kind: {} for kind in Kind}, None, {}

    def since(self, thing: Thing) -> Since | None:
        return self._observed.get(thing.kind, {}).get(thing)

    def __iter__(self) -> Iterator[Thing]:
        for observed in self._observed.values():
            yield from observed

    def look(self, snapshot: view.Snapshot, now_ns: int) -> None:
        """Note what stands now."""
        before, self._before = self._before, snapshot
        if before is None or watchlist.is_awaiting(before) or watchlist.is_awaiting(snapshot):
            self._look_at_all(snapshot, now_ns)
        elif before is not snapshot:
            self._look_at_changes(before, snapshot, now_ns)

    def ripe(self, spans: deadlines.Spans, now_ns: int, patience_ns: int = 0) -> list[Thing]:
        """As `deadlines.ripe`."""
        over: list[Thing] = []
        for kind, observed in self._observed.items():
            limit_ns = now_ns - spans.of(kind) - patience_ns
            for thing, since in observed.items():
                if since.first_ns > limit_ns:
                    break
                over.append(thing)
        return sorted(over)

    def _look_at_all(self, snapshot: view.Snapshot, now_ns: int) -> None:
        before = {thing: since for observed in self._observed.values() for thing, since in observed.items()}
        after = deadlines.observe(before, watchlist.things(snapshot), now_ns)
        self._observed = {kind: {} for kind in Kind}
        for thing, since in sorted(after.items(), key=_first_ns):
            self._observed[thing.kind][thing] = since
        self._odd = {}
        if not watchlist.is_awaiting(snapshot):
            for ledger in snapshot.ledgers():
                self._look_at_node(snapshot, ledger.noun.node, now_ns)

    def _look_at_changes(self, before: view.Snapshot, snapshot: view.Snapshot, now_ns: int) -> None:
        nodes = {*self._odd, *snapshot.claims_since(before)}
        for id in snapshot.instances_since(before):
            old, new = before.instance(id), snapshot.instance(id)
            was = [] if old is None else list(watchlist.of_instance(before, old))
            stands = [] if new is None else list(watchlist.of_instance(snapshot, new))
            self._replace(was, stands, now_ns)
            nodes.update(kept.noun.node for kept in (old, new) if kept is not None)
        for node in nodes:
            self._look_at_node(snapshot, node, now_ns)

    def _look_at_node(self, snapshot: view.Snapshot, node: str, now_ns: int) -> None:
        odd, stands = watchlist.on_node(snapshot, node)
        self._replace(self._odd.pop(node, []), stands, now_ns)
        if odd:
            self._odd[node] = stands

    def _replace(self, was: list[tuple[Thing, int]], stands: list[tuple[Thing, int]], now_ns: int) -> None:
        """What is observed of one instance or node."""
        if was:
            still = {thing for thing, _ in stands}
            for thing, _ in was:
                if thing not in still:
                    self._observed[thing.kind].pop(thing, None)
        for thing, revision in stands:
            observed = self._observed[thing.kind]
            since = observed.get(thing)
            if since is None or since.revision != revision:
                observed.pop(thing, None)  # it goes to the end
                observed[thing] = Since(revision, now_ns)


def _first_ns(one: tuple[Thing, Since]) -> int:
    return one[1].first_ns
