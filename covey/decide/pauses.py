"""How long a node that refused an instance is left alone with it: pure.

What a node refuses now it may take in a moment: its disk is full, its hypervisor is being replaced, it cannot reach
the registry. Asked again at once, it would refuse at once, and an instance that only had to wait would end in Error.
So the pause after a refusal doubles with each one by the same node. Other nodes get the instance at once.

When a third refusal has come, the cause is probably a common one, such as a registry that is away, and every node of a
large cloud would refuse in turn within seconds. From then on nobody is asked during a pause that doubles with every
refusal, whoever it was by. So a start outlives a cause that lasts for as long as `LIMIT` refusals take, which is more
than twenty minutes; after that many it ends in Error.

As in `deadlines`, no clock is compared with another one (safety S9): a controller observes when it first saw a number
of refusals. One that begins anew is late, never early.
"""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from covey import model

LIMIT = 50  # refusals after which an instance goes to Error
EVERYWHERE = model.NodeId("*")  # as a node: all of them
_S = 1_000_000_000
_FIRST_NS = 1 * _S
_LONGEST_NS = 30 * _S
_COMMON = 3  # refusals by whomever, from which on there is a pause everywhere


class Refusal(NamedTuple):
    """`node` may be EVERYWHERE."""

    instance: model.InstanceId
    node: model.NodeId


class Since(NamedTuple):
    """So many refusals by this node, and when that many were first seen."""

    refusals: int
    first_ns: int


Observed = dict[Refusal, Since]
Paused = Mapping[model.InstanceId, tuple[model.NodeId, ...]]


def observe(before: Mapping[Refusal, Since], waiting: Iterable[model.Instance], now_ns: int) -> Observed:
    """The refusals of all that wait, each with when that many of them were first seen."""
    after: Observed = {}
    for instance in waiting:
        for node, count in _counts(instance.refused):
            refusal = Refusal(instance.id, node)
            since = before.get(refusal)
            after[refusal] = since if since is not None and since.refusals == count else Since(count, now_ns)
    return after


def _counts(refused: tuple[model.NodeId, ...]) -> Iterable[tuple[model.NodeId, int]]:
    """How often each node refused, and all together once they are many."""
    for node in set(refused):
        yield node, refused.count(node)
    if len(refused) >= _COMMON:
        yield EVERYWHERE, len(refused) - _COMMON + 1


def pause_ns(count: int) -> int:
    """How long a node is left alone after its refusal number `count`."""
    return min(_FIRST_NS << min(count - 1, 10), _LONGEST_NS)


def paused(observed: Mapping[Refusal, Since], now_ns: int) -> Paused:
    """The nodes that may not be given an instance yet."""
    found: dict[model.InstanceId, tuple[model.NodeId, ...]] = {}
    for refusal, since in sorted(observed.items()):
        if _end_ns(since) > now_ns:
            found[refusal.instance] = (*found.get(refusal.instance, ()), refusal.node)
    return found


def left_ns(observed: Mapping[Refusal, Since], instance: model.Instance, now_ns: int) -> dict[model.NodeId, int]:
    """How long each pause of one instance still lasts."""
    found: dict[model.NodeId, int] = {}
    for node, _ in _counts(instance.refused):
        since = observed.get(Refusal(instance.id, node))
        if since is not None and _end_ns(since) > now_ns:
            found[node] = _end_ns(since) - now_ns
    return found


def next_end_ns(observed: Mapping[Refusal, Since], now_ns: int) -> int | None:
    """When the next of the pauses that last still is over, on the observer's clock."""
    ends = (_end_ns(since) for since in observed.values())
    return min((end_ns for end_ns in ends if end_ns > now_ns), default=None)


def _end_ns(since: Since) -> int:
    return since.first_ns + pause_ns(since.refusals)
