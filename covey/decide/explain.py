"""Why an instance stands where it stands, told so that a person can act on it: pure.

Of one that waits for a node: its place in the queue, who before it competes for the same nodes, and a verdict of each
node with its numbers. Of any other: what it waits for now, and from whom. The same snapshot gives the same story,
except for what only the teller has observed: how long a node has been silent, and when one that refused is asked again.
"""

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

from covey import model
from covey.decide import pauses, placement, rooms

Reason = placement.Reason
State = model.State

NAMED = 10  # of those before it in the queue
_S = 1_000_000_000
_NOBODY: Mapping[model.NodeId, int] = MappingProxyType({})


class Observed(NamedTuple):
    """What the teller has seen for himself. `silent_s`: since when a node was not heard of; None: he does not know.
    `left_ns`: how long nodes that refused the instance are not asked."""

    silent_s: Callable[[model.NodeId], float | None] = lambda _: None
    left_ns: Mapping[model.NodeId, int] = _NOBODY


class Verdict(NamedTuple):
    """What one node has to say. `reason` None: it can take the instance."""

    node: model.NodeId
    name: str
    reason: Reason | None
    text: str


class Story(NamedTuple):
    """`position` counts from 1 among the `waiting`; 0: it does not wait for a node. `before`: the first of the
    `competitors`, those that stand before it and may want the same nodes."""

    text: str
    position: int = 0
    waiting: int = 0
    competitors: int = 0
    before: tuple[model.InstanceId, ...] = ()
    verdicts: tuple[Verdict, ...] = ()


# ---- those that wait for a node ----------------------------------------------------------------------------------


def waiting(instance: model.Instance, queue: Sequence[model.Instance], cloud: placement.Cloud, seen: Observed) -> Story:
    """Of one that waits. `queue`: all that wait, in their order."""
    planning = placement.Planning(cloud)
    ahead: list[model.Instance] = []
    for other in queue:
        if other.id == instance.id:
            break
        planning.decide(other)
        ahead.append(other)
    rivals = [other.id for other in ahead if placement.share_nodes(other.spec, instance.spec)]
    teller = _Teller(instance, cloud, seen)
    hosts = {host.id: rooms.room(host) for host in cloud.hosts}
    verdicts = [teller.verdict(room, hosts[room.host.id]) for room in planning.rooms]
    verdicts.sort(key=lambda one: (-1 if one.reason is None else placement.TELLING.index(one.reason), one.name))
    decision = planning.decide(instance)
    return Story(
        text=decision.text if isinstance(decision, placement.Wait) else placing(cloud, decision),
        position=len(ahead) + 1,
        waiting=len(queue),
        competitors=len(rivals),
        before=tuple(rivals[:NAMED]),
        verdicts=tuple(verdicts),
    )


def placing(cloud: placement.Cloud, place: placement.Place) -> str:
    """Of one that waits no longer than until the decision is written down."""
    name = next((host.name for host in cloud.hosts if host.id == place.node), place.node)
    return f"Waiting: it is being placed on {name}"


class _Teller:
    """Verdicts of nodes on one instance."""

    def __init__(self, instance: model.Instance, cloud: placement.Cloud, seen: Observed) -> None:
        self._instance = instance
        self._kind = placement.kind_of(instance.spec)
        self._paused = cloud.paused.get(instance.id, ())
        self._seen = seen
        self._barred = instance.id in cloud.barred

    def verdict(self, room: rooms.Room, before: rooms.Room) -> Verdict:
        """`room`: as those before it in the queue leave it; `before`: as it is now."""
        host = room.host
        reason = placement.verdict(host, self._kind, self._paused)
        reason = reason or placement.shortage(room, self._instance.id, self._kind.need)
        if reason is None and self._barred:
            return Verdict(host.id, host.name, Reason.HELD, "has room, but the instance may not begin anywhere yet")
        return Verdict(host.id, host.name, reason, self._text(reason, room, before))

    def _text(self, reason: Reason | None, room: rooms.Room, before: rooms.Room) -> str:
        host, spec = room.host, self._instance.spec
        match reason:
            case Reason.UNKNOWN_NODE:
                return f"the start asks for node {spec.node}"
            case Reason.NO_ARCH:
                return f"its architecture is {host.facts.arch}, the template's is {spec.arch}"
            case Reason.NO_GROUP:
                groups = ", ".join(host.node.groups)
                return f"is not in the group {spec.group}" + (f", but in {groups}" if groups else "")
            case Reason.NOT_ALIVE:
                return self._silence(host)
            case Reason.HELD:
                return host.held
            case Reason.DRAINING:
                return f"takes nothing new; {_count(len(host.claims), 'VM')} still there"
            case Reason.TROUBLE:
                return host.trouble or _OWED
            case Reason.REFUSED:
                return self._refused(host)
            case Reason.TOO_LARGE:
                return _lack(self._kind.need, room.whole)
            case Reason.FULL if before.has_room(self._kind.need):
                return f"{_free(before)}, which instances before this one in the queue will take"
            case Reason.FULL:
                return _full(room, self._kind.need)
            case Reason.RESERVED:
                return f"is kept free for instance {room.reserved}, which stands before this one in the queue"
            case Reason.CLEANING:
                return "still has to remove an earlier VM of this instance"
        return self._can(room)

    def _can(self, room: rooms.Room) -> str:
        times = self._instance.refused.count(room.host.id)
        cached = self._instance.spec.digest in room.host.images
        return (
            _free(room)
            + ("" if cached else "; would pull the template first")
            + (f"; has refused it {_times(times)}" if times else "")
        )

    def _silence(self, host: rooms.Host) -> str:
        silent_s = self._seen.silent_s(host.id)
        if silent_s is None:
            return "no word since before this controller started"
        return f"no word for {_span(silent_s)}"

    def _refused(self, host: rooms.Host) -> str:
        """By itself, or by so many that none is asked now."""
        times, instance = self._instance.refused.count(host.id), self._instance
        left = [self._seen.left_ns[node] for node in (host.id, pauses.EVERYWHERE) if node in self._seen.left_ns]
        again = f"asked again in {_span(max(left) / _S)}" if left else "asked again after a pause"
        if times:
            return f"refused it {_times(times)}" + (f": {instance.message}" if instance.message else "") + f"; {again}"
        return f"{_count(len(instance.refused), 'refusal')} in all point to a common cause; {again}"


_OWED = "still has to remove a placement that it did not acknowledge; it gets nothing new before"


def _full(room: rooms.Room, need: rooms.Size) -> str:
    if room.counts_vms and room.slots == 1:
        return "its only slot is taken"
    if room.counts_vms:
        return f"{len(room.host.claims)} of {_count(room.slots, 'slot')} are taken"
    lacks = []
    if room.free.vcpu < need.vcpu:
        lacks.append(f"needs {_vcpu(need.vcpu)}, {max(room.free.vcpu, 0)} of {room.whole.vcpu} are free")
    if room.free.ram_mb < need.ram_mb:
        lacks.append(f"needs {need.ram_mb} MiB of memory, {max(room.free.ram_mb, 0)} of {room.whole.ram_mb} are free")
    return "; ".join(lacks)


def _lack(need: rooms.Size, whole: rooms.Size) -> str:
    lacks = []
    if whole.vcpu < need.vcpu:
        lacks.append(f"needs {_vcpu(need.vcpu)}, it has {whole.vcpu}")
    if whole.ram_mb < need.ram_mb:
        lacks.append(f"needs {need.ram_mb} MiB of memory, it has {whole.ram_mb}")
    return "; ".join(lacks)


def _free(room: rooms.Room) -> str:
    if room.counts_vms:
        return f"{room.free_slots} of {_count(room.slots, 'slot')} free"
    return (
        f"{room.free.vcpu} of {_vcpu(room.whole.vcpu)} and {room.free.ram_mb} of {room.whole.ram_mb} MiB of memory free"
    )


# ---- those that wait for something else --------------------------------------------------------------------------


def placed(instance: model.Instance, node: str, talking: bool, silent_s: float | None) -> Story:
    """Of one that has a node, or needs none any more. `node`: the node's name; `talking`: whether it is heard of."""
    text = _placed(instance, node)
    if not talking and instance.claimed and instance.state is not State.TERMINATED:
        silence = "for longer than this controller runs" if silent_s is None else f"for {_span(silent_s)}"
        text += f". Node {node} has been silent {silence}: {_AWAY[_Away.of(instance)]}"
    return Story(text=text)


class _Away(NamedTuple):
    """What a silent node means for an instance."""

    state: State
    launched: bool

    @classmethod
    def of(cls, instance: model.Instance) -> "_Away":
        if instance.state is State.PULLING:
            return cls(instance.state, instance.launched)
        return cls(State.TERMINATING if instance.state is State.TERMINATING else State.STARTED, launched=True)


_AWAY: Mapping[_Away, str] = {
    _Away(State.PULLING, launched=False): "the instance is placed on another node as soon as its lease has ended",
    _Away(State.PULLING, launched=True): (
        "its VM may run, so it is started nowhere else; terminate the instance, or remove the node, if it will not "
        "come back"
    ),
    _Away(State.STARTED, launched=True): (
        "its VM may run on; the instance is as it was when the node is back; terminate it, or remove the node, if it "
        "will not come back"
    ),
    _Away(State.TERMINATING, launched=True): "remove the node if it will not come back",
}


def _placed(instance: model.Instance, node: str) -> str:
    match instance.state:
        case State.PULLING:
            return _pulling(instance, node)
        case State.STARTED:
            return f"It runs on node {node} and waits for nothing"
        case State.STOPPING:
            return f"Waits for node {node} to say that the VM has stopped"
        case State.STOPPED:
            return f"It is stopped on node {node} and waits for a start"
        case State.PUSHING:
            return f"Waits for node {node} to push it to the registry"
        case State.TERMINATING:
            why = f" ({instance.ended.who}: {instance.ended.why})" if instance.ended else ""
            return f"Waits for node {node} to say that nothing of the VM is left{why}"
        case State.TERMINATED:
            return "It is over; its record goes in a while"
        case State.ERROR:
            kept = f"; node {node} keeps its VM for inspection" if instance.claimed else ""
            return f"It failed: {instance.message or 'nobody said why'}{kept}. It is terminated after a day"
    return "Waits for a node"


def _pulling(instance: model.Instance, node: str) -> str:
    if instance.launched:
        script = instance.spec.script
        then = " and its start script to end" if script is not None and script.monitored else ""
        return f"Node {node} has leave to boot it: waits for the guest to answer{then}"
    if not instance.acknowledged:
        return f"Placed on node {node}, which has not acknowledged it yet; if it does not, another node gets it"
    if 0 < instance.progress < 1:
        return f"Node {node} pulls the template: {instance.progress:.0%}"
    return f"Node {node} has acknowledged it and prepares its VM"


# ---- words -------------------------------------------------------------------------------------------------------


def _count(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def _vcpu(count: int) -> str:
    return _count(count, "processor")


def _times(count: int) -> str:
    return {1: "once", 2: "twice"}.get(count, f"{count} times")


def _span(seconds: float) -> str:
    """1 s … 119 s, 2 min … 119 min, 2 h …"""
    whole = max(round(seconds), 1)
    if whole < 120:
        return f"{whole} s"
    return f"{whole // 60} min" if whole < 7200 else f"{whole // 3600} h"
