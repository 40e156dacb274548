"""What one node shall do, from the view of the whole cloud: pure.

    claim on the node's ledger, instance there in that epoch     its state says the verb
    instance in Terminating, or an order key                      DESTROY, with who and why (safety S2)
    anything else                                                 nothing is said, and so nothing is done

An answer carries no verb for a VM that nobody wants: silence is never an order. Such a VM is found by its claim
(safety S11) and gets an order of its own when its time is ripe.

Most looks at a node's work find nothing new for it, and most of what is new concerns one VM of many: so the tag is made
first, of the least that it needs, and the answer only when there is one.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from covey import model, wire
from covey.decide import abridged, permission
from covey.store import codec, view

State = model.State
Verb = wire.Verb

_VERBS: Mapping[State, Verb] = {
    State.PULLING: Verb.RUN,
    State.STARTED: Verb.RUN,
    State.STOPPING: Verb.STOP,
    State.STOPPED: Verb.KEEP,
    State.PUSHING: Verb.KEEP,
    State.ERROR: Verb.KEEP,
    State.TERMINATING: Verb.DESTROY,
}


# One thing to see to, and what says so: an order, ready to be sent, or the instance. Plain, as there are many of them.
_Piece = tuple[model.InstanceId, int, Verb, wire.Wanted | codec.Kept[model.Instance]]


class NodeWants(NamedTuple):
    """`tag` is the same as long as there is nothing new to do. That a placement was acknowledged or launched is no
    news to its node, so it does not change the tag; who asks with another tag is told everything it does not know."""

    pieces: Sequence[_Piece]
    tag: str
    questions: tuple[model.Question, ...] = ()

    @property
    def wanted(self) -> tuple[wire.Wanted, ...]:
        """Everything, ordered by instance and epoch."""
        return self.since(0)

    def since(self, revision: int) -> tuple[wire.Wanted, ...]:
        """The same, less what lasts and was not written after this revision: see `decide.abridged`."""
        return tuple(_said(piece) for piece in self.pieces if not revision or _is_news(piece, revision))

    def news_for(self, tag: str) -> bool:
        """Whether somebody who was answered with `tag` does not know all of this. That a question is open no longer is
        no news."""
        if tag == self.tag:
            return False
        work, known = wire.untag(tag)
        mine, open_ = wire.untag(self.tag)
        return work != mine or not set(open_) <= set(known)


def for_node(snapshot: view.Snapshot, node: str) -> NodeWants:
    """Everything `node` shall see to."""
    pieces = sorted(_pieces(snapshot, node))  # no two are of one instance and epoch, so nothing else is compared
    lines = [wire.tag_line(instance, epoch, verb) for instance, epoch, verb, _ in pieces]
    questions = tuple(sorted((kept.noun for kept in snapshot.questions_to(node)), key=lambda noun: noun.nonce))
    return NodeWants(pieces, wire.tag_of(lines, (question.nonce for question in questions)), questions)


def known_since(snapshot: view.Snapshot, known: wire.Seen) -> int:
    """The revision of a view that a node had of this very store, which an answer may rest on; 0: it must be whole."""
    own = known.revision > 0 and snapshot.kinship(known) is permission.Kinship.OWN
    return known.revision if own else 0


def _pieces(snapshot: view.Snapshot, node: str) -> Iterable[_Piece]:
    found: dict[tuple[str, int], _Piece] = {}
    for kept in snapshot.orders_on(node):
        order = kept.noun
        said = _ordered(order, snapshot.instance(order.instance))
        found[order.instance, order.epoch] = (order.instance, order.epoch, Verb.DESTROY, said)
    ledger, here = snapshot.ledger(node), snapshot.by_id_on(node)
    for claim in ledger.noun.claims if ledger is not None else ():
        instance = here.get(claim.instance)
        if instance is None or instance.noun.released or instance.noun.epoch != claim.epoch:
            continue  # what nobody wants is ordered away in its time, never by silence
        verb = _VERBS.get(instance.noun.state)
        key = (claim.instance, claim.epoch)
        if verb is not None and key not in found:
            found[key] = (claim.instance, claim.epoch, verb, instance)
    return found.values()


def _is_news(piece: _Piece, since: int) -> bool:
    _, _, verb, says = piece
    if isinstance(says, wire.Wanted) or not abridged.lasts(verb, launched=says.noun.launched):
        return True
    return says.revision > since


def _said(piece: _Piece) -> wire.Wanted:
    _, _, verb, says = piece
    return says if isinstance(says, wire.Wanted) else _want(says.noun, verb)


def _ordered(order: model.Order, instance: codec.Kept[model.Instance] | None) -> wire.Wanted:
    return wire.Wanted(
        instance=order.instance,
        epoch=order.epoch,
        verb=Verb.DESTROY,
        decision=order.decision,
        acknowledged=True,
        final=instance is None or instance.noun.state in (State.TERMINATING, State.TERMINATED),
    )


def _want(instance: model.Instance, verb: Verb) -> wire.Wanted:
    if verb == Verb.DESTROY:
        return wire.Wanted(
            instance=instance.id,
            epoch=instance.epoch,
            verb=verb,
            launched=instance.launched,
            decision=instance.ended or model.Decision(who="", why="the instance is terminating"),
            acknowledged=True,
            final=True,
        )
    return wire.Wanted(
        instance=instance.id,
        epoch=instance.epoch,
        verb=verb,
        launched=instance.launched,
        spec=instance.spec,
        acknowledged=instance.acknowledged,
    )
