"""What agents report becomes facts (safety S3): one transaction per report, all items or none."""

from collections.abc import Sequence
from typing import NamedTuple

from covey import model, wire
from covey.store import commit, view


class Applied(NamedTuple):
    """`settled`: indexes of the items that need not be sent again."""

    settled: tuple[int, ...]


class StaleSession(NamedTuple):
    """Another life of this agent has taken over, or the node was removed: answer 409 or 410."""


async def report(
    writer: commit.Writer,
    snapshot: view.Snapshot,
    node: model.NodeId,
    session: int,
    items: Sequence[wire.Item],
    until_ns: int = 0,
) -> Applied | StaleSession:
    """Apply items in their order. Not newer ones are dropped as settled (safety S3).

    GONE for epoch e says that nothing of epoch e or older is left: it releases those claims and ends the order.
    REFUSED makes the instance wait again and orders the node to clean up. Output goes to keys of its own (S26).
    """
    raise NotImplementedError
