"""Whether an agent must hold, and taking what it tells then (safety S18, S19; docs/agent-protocol.md).

An agent holds, that is it launches, stops and destroys nothing, while the store's history is not the one that it acted
on. Two things say so: a break that came after the node last told what it has; and what the agent has seen. A view that
this store cannot have had is moreover a proof that the store was restored: the break is entered before anything else
is decided, for all nodes.
"""

from covey import answer, errors, model, observe, wire
from covey.decide import permission
from covey.store import commit, commit_adopt, commit_cloud, commit_reports, view

STALE = "this session is not the newest of its node: join again"

log = observe.log("agents")


async def must_hold(writer: commit.Writer, snapshot: view.Snapshot, node: str, seen: wire.Seen) -> str:
    """Why the agent of this node must hold; "" when it may go on."""
    kin = snapshot.kinship(seen) if seen.revision else permission.Kinship.OWN
    proof = kin in (permission.Kinship.FOREIGN, permission.Kinship.AHEAD)
    if proof and not snapshot.held(node) and not _repeated(snapshot, node, seen):
        why = f"node {node} has seen revision {seen.revision}, {kin}"
        await commit_cloud.add_nonce(writer, why, snapshot.chain)
    if snapshot.held(node):
        return "the store was restored, and this node has not yet told what it runs"
    return "" if kin is permission.Kinship.OWN else f"what was seen is {kin}"


def _repeated(snapshot: view.Snapshot, node: str, seen: wire.Seen) -> bool:
    """Whether the node comes with the view that it adopted from: the answer to that was lost, and nothing is new."""
    kept = snapshot.adopted(node)
    return kept is not None and kept.noun.history == seen.history and seen.revision <= kept.noun.revision


async def adopt(
    writer: commit.Writer,
    snapshot: view.Snapshot,
    life: model.Session,
    told: wire.Adopt,
    until_ns: int,
) -> None:
    """Take a part of what an agent tells. Raises Fault 409 when its session is not the newest, and Unavailable when
    it must begin anew."""
    taken = await commit_adopt.adopt(writer, snapshot, life.node, life.counter, told, until_ns)
    if isinstance(taken, commit_reports.StaleSession):
        raise answer.Fault(409, STALE)
    if isinstance(taken, commit_adopt.Torn):
        raise errors.Unavailable("the store was restored again meanwhile: tell everything anew")
    if told.last:
        log.info("a node has told what it runs", node=life.node, restored=snapshot.breach_why)
