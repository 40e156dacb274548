"""Why instances wait, worked out when somebody asks: from the snapshot, and so the same on every replica.

The plan that the loop would commit says it of all instances at once; it is shared by the loop and by all who ask, and
made anew only when something has changed that it rests on: most of what happens on a full fleet (launches, boots, ends)
is nothing to those that wait. While the store changes faster than plans can be made, an answer about an instance that
the last plan already knew may rest on that one, but only for a few times as long as it took: small clouds see every
change at once, and large ones never spend more than a fifth of their time on telling.

What only a process can observe is kept here too: since when a node refuses an instance (`decide.pauses`). A replica
that saw it later asks later; what it tells is true of itself.
"""

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from covey import model
from covey import world as worlds
from covey.controller import hosts
from covey.decide import deadlines, explain, pauses, permission, placement
from covey.store import codec, view

Decision = placement.Place | placement.Wait

_TOLD_AGAIN = 4  # a plan may be told again for so many times as long as it took to make
_STANDS_STILL_S = deadlines.Spans().silent_ns / 1e9
_MIN_NS = 1_000_000  # plans quicker than this are always made anew


class Plan(NamedTuple):
    """As of one revision, and on what it rests beside that."""

    decisions: list[Decision]
    by_instance: Mapping[model.InstanceId, Decision]
    cloud: placement.Cloud
    waiting: Sequence[codec.Kept[model.Instance]]
    snapshot: view.Snapshot
    silent: frozenset[str]
    made_ns: int
    took_ns: int
    pause_ends_ns: int | None


class Waiting:
    """One per controller, shared by its loop and its API. `silent_s`: since when a node was not heard of."""

    def __init__(
        self,
        world: worlds.World,
        fleet: hosts.Fleet,
        silent_s: Callable[[model.NodeId], float | None] = lambda _: None,
    ) -> None:
        self.fleet = fleet
        self._world = world
        self._silent_s = silent_s
        self._refusals: pauses.Observed = {}
        self._plan: Plan | None = None

    def forget(self) -> None:
        """This controller was not ready: what it has observed starts over (safety S9)."""
        self._refusals = {}
        self._plan = None

    def plan(self, snapshot: view.Snapshot) -> Plan:
        """The plan for this very snapshot."""
        now_ns = self._world.boot_ns()
        last = self._plan
        paused = last is not None and (last.pause_ends_ns is None or now_ns < last.pause_ends_ns)
        stands = last if last is not None and paused and self._stands(last, snapshot) else None
        if stands is not None and stands.snapshot.revision == snapshot.revision:
            return stands
        kept = list(snapshot.waiting())
        if stands is not None and _holds(stands, snapshot, kept):
            self._plan = stands._replace(snapshot=snapshot, made_ns=now_ns)
            return self._plan
        waiting = [one.noun for one in kept]
        self._refusals = pauses.observe(self._refusals, waiting, now_ns)
        cloud = placement.Cloud(
            hosts=self.fleet.hosts(snapshot),
            births=_Births(snapshot),
            paused=pauses.paused(self._refusals, now_ns),
            barred=_barred(snapshot),
        )
        decisions = placement.plan(waiting, cloud)
        self._plan = Plan(
            decisions=decisions,
            by_instance={decision.instance: decision for decision in decisions},
            cloud=cloud,
            waiting=kept,
            snapshot=snapshot,
            silent=self.fleet.silent,
            made_ns=now_ns,
            took_ns=self._world.boot_ns() - now_ns,
            pause_ends_ns=pauses.next_end_ns(self._refusals, now_ns),
        )
        return self._plan

    def why(self, snapshot: view.Snapshot, instance: model.InstanceId) -> str:
        """Why this instance waits for a node, or may not begin on the one it has; "" when nothing holds it up."""
        kept = snapshot.instance(instance)
        if kept is not None and not kept.noun.waiting:
            held_back = kept.noun.state is model.State.PULLING and not snapshot.may_begin(kept)
            return f"Waiting: {permission.why_held_back(snapshot.awaited())}" if held_back else ""
        plan = self._recent(snapshot)
        decision = None if plan is None else plan.by_instance.get(instance)
        if plan is None or decision is None:
            plan = self.plan(snapshot)
            decision = plan.by_instance.get(instance)
        if isinstance(decision, placement.Place):
            return explain.placing(plan.cloud, decision)
        return "" if decision is None else decision.text

    def story(self, snapshot: view.Snapshot, kept: codec.Kept[model.Instance], *, talking: bool) -> explain.Story:
        """All there is to tell of one instance. `talking`: whether its node is heard of."""
        instance = kept.noun
        if not instance.waiting and instance.state is model.State.PULLING and not snapshot.may_begin(kept):
            return explain.Story(text=f"Waiting: {permission.why_held_back(snapshot.awaited())}")
        if not instance.waiting:
            silent_s = self._silent_for_s(instance.node)
            return explain.placed(instance, _name(snapshot, instance.node), talking=talking, silent_s=silent_s)
        cloud = self.plan(snapshot).cloud
        queue = placement.queue((one.noun for one in snapshot.waiting()), cloud.births)
        left_ns = pauses.left_ns(self._refusals, instance, self._world.boot_ns())
        return explain.waiting(instance, queue, cloud, explain.Observed(self._silent_for_s, left_ns))

    def _silent_for_s(self, node: model.NodeId) -> float | None:
        """At least for so long: of one whose lease lives, the span after which that counts no more (safety S8)."""
        return _STANDS_STILL_S if node in self.fleet.silent else self._silent_s(node)

    def _recent(self, snapshot: view.Snapshot) -> Plan | None:
        """The last plan, if it may be told again: also when a pause is over meanwhile, of which there may be more than
        plans can be made."""
        last, now_ns = self._plan, self._world.boot_ns()
        if last is None or last.took_ns < _MIN_NS or not self._stands(last, snapshot):
            return None
        return last if now_ns - last.made_ns < _TOLD_AGAIN * last.took_ns else None

    def _stands(self, plan: Plan, snapshot: view.Snapshot) -> bool:
        """Whether nothing but the revision, and the ends of pauses, may have changed since it was made."""
        return plan.snapshot.history == snapshot.history and plan.silent == self.fleet.silent


def _holds(plan: Plan, snapshot: view.Snapshot, waiting: Sequence[codec.Kept[model.Instance]]) -> bool:
    """Whether the plan would come out the same from this snapshot, in which these wait."""
    then = plan.snapshot
    alike = len(waiting) == len(plan.waiting) and all(map(operator.is_, waiting, plan.waiting))
    return alike and then.settled == snapshot.settled and not snapshot.nodes_differing(then)


def _barred(snapshot: view.Snapshot) -> Mapping[model.InstanceId, str]:
    """Instances that may not begin before all nodes have told what they run (safety S19)."""
    if snapshot.breach.nonce in ("", snapshot.settled):
        return {}
    why = permission.why_held_back(snapshot.awaited())
    return {kept.noun.id: why for kept in snapshot.waiting() if not snapshot.may_begin(kept)}


class _Births:
    """When instances were created, by the store's order."""

    def __init__(self, snapshot: view.Snapshot) -> None:
        self._snapshot = snapshot

    def __call__(self, instance: model.InstanceId) -> int:
        kept = self._snapshot.instance(instance)
        return 0 if kept is None else kept.created


def _name(snapshot: view.Snapshot, node: model.NodeId) -> str:
    kept, session = snapshot.node(node), snapshot.session(node)
    return (kept.noun.name if kept else "") or (session.noun.facts.name if session else "") or node
