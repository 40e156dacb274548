"""Whom a pulling node may fetch its template from, out of the view of the cloud, with tickets (`covey.ticket`).

What is known already is enough: a node's last word names the templates that it holds (safety S26), and an instance in
Pulling the template that its node fetches. Nothing is written for it. A node that shares nothing is told of nobody, and
a node that holds the template is not asked about others: the way of a start that pulls nothing does not come by here.
"""

from collections.abc import Iterator, Sequence

from covey import model, ticket, wire
from covey.decide import neighbours
from covey.store import codec, view


def of(snapshot: view.Snapshot, node: model.NodeId, digest: model.Digest) -> tuple[wire.Neighbour, ...]:
    """For `node`, which was told to run something of this template."""
    own = snapshot.session(node)
    if own is None or not own.noun.facts.share_port or _holds(snapshot, node, digest):
        return ()
    shares = {session.noun.node: session.noun for session in _sharing(snapshot)}
    holders = [id for id in shares if _holds(snapshot, id, digest)]
    pulling = [id for id in _pulling(snapshot, digest) if id in shares]
    named = neighbours.name(node, digest, holders, pulling)
    return tuple(_neighbour(shares[id], node, digest, snapshot.history) for id in named)


def _holds(snapshot: view.Snapshot, node: str, digest: model.Digest) -> bool:
    word = snapshot.word(node)
    return word is not None and digest in word.noun.images


def _sharing(snapshot: view.Snapshot) -> Iterator[codec.Kept[model.Session]]:
    """Sessions of the nodes that are alive and send layers to others."""
    for node in snapshot.nodes():
        session = snapshot.session(node.noun.id)
        if session is not None and session.noun.facts.share_port and snapshot.alive(node.noun.id) is not None:
            yield session


def _pulling(snapshot: view.Snapshot, digest: model.Digest) -> Sequence[model.NodeId]:
    """Nodes by the age of the instance that they fetch the template for: the same order in every view."""
    found = [
        kept for kept in snapshot.in_state(model.State.PULLING) if kept.noun.spec.digest == digest and kept.noun.node
    ]
    return [kept.noun.node for kept in sorted(found, key=lambda kept: (kept.created, kept.noun.id))]


def _neighbour(session: model.Session, asker: model.NodeId, digest: model.Digest, nonce: str) -> wire.Neighbour:
    ip = f"[{session.facts.ip}]" if ":" in session.facts.ip else session.facts.ip
    key = ticket.key(session.secret_sha256)
    return wire.Neighbour(url=f"http://{ip}:{session.facts.share_port}", ticket=ticket.issue(key, asker, digest, nonce))
