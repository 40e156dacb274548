"""Whom a pulling node may fetch its template from, out of the view of the cloud, with tickets (`covey.ticket`).

What is known already is enough: a node's last word names the templates that it holds (safety S26), and an instance in
Pulling the template that its node fetches. Nothing is written for it. A node that shares nothing is told of nobody, and
a node that holds the template is not asked about others: the way of a start that pulls nothing does not come by here.
"""

from covey import model, ticket, wire
from covey.decide import neighbours
from covey.store import codec, view


def of(snapshot: view.Snapshot, node: model.NodeId, digest: model.Digest) -> tuple[wire.Neighbour, ...]:
    """For `node`, which was told to run something of this template."""
    own = snapshot.session(node)
    if own is None or not own.noun.facts.share_port or _holds(snapshot, node, digest):
        return ()
    holders = [id for id in map(_id, snapshot.nodes()) if _holds(snapshot, id, digest) and _shares(snapshot, id)]
    pulling = [id for id in _pulling(snapshot, digest) if _shares(snapshot, id)]
    named = map(snapshot.session, neighbours.name(node, digest, holders, pulling))
    return tuple(_neighbour(kept.noun, node, digest, snapshot.history) for kept in named if kept is not None)


def _id(kept: codec.Kept[model.Node]) -> model.NodeId:
    return kept.noun.id


def _holds(snapshot: view.Snapshot, node: str, digest: model.Digest) -> bool:
    word = snapshot.word(node)
    return word is not None and digest in word.noun.images


def _shares(snapshot: view.Snapshot, node: str) -> bool:
    """Whether it is alive and sends layers to others."""
    session = snapshot.session(node)
    return session is not None and bool(session.noun.facts.share_port) and snapshot.alive(node) is not None


def _pulling(snapshot: view.Snapshot, digest: model.Digest) -> list[model.NodeId]:
    """Nodes by the age of the instance that they fetch the template for: the same order in every view."""
    found = [
        kept
        for kept in snapshot.in_state(model.State.PULLING)
        if kept.noun.spec.digest == digest and kept.noun.node != model.NOWHERE
    ]
    return [kept.noun.node for kept in sorted(found, key=lambda kept: (kept.created, kept.noun.id))]


def _neighbour(session: model.Session, asker: model.NodeId, digest: model.Digest, nonce: str) -> wire.Neighbour:
    ip = f"[{session.facts.ip}]" if ":" in session.facts.ip else session.facts.ip
    key = ticket.key(session.secret_sha256)
    return wire.Neighbour(url=f"http://{ip}:{session.facts.share_port}", ticket=ticket.issue(key, asker, digest, nonce))
