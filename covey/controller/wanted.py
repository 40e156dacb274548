"""What one node shall do, from the view of the whole cloud: pure.

    claim on the node's ledger, instance there in that epoch     its state says the verb
    instance in Terminating, or an order key                      DESTROY, with who and why (safety S2)
    anything else                                                 nothing is said, and so nothing is done

An answer carries no verb for a VM that nobody wants: silence is never an order. Such a VM is found by its claim
(safety S11) and gets an order of its own when its time is ripe.
"""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from covey import model, wire
from covey.store import view

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


class NodeWants(NamedTuple):
    """`tag` is the same as long as there is nothing new to do. That a placement was acknowledged or launched is no
    news to its node, so it does not change the tag; who asks with another tag is told everything."""

    wanted: tuple[wire.Wanted, ...]
    tag: str
    questions: tuple[model.Question, ...] = ()

    def news_for(self, tag: str) -> bool:
        """Whether somebody who was answered with `tag` does not know all of this. That a question is open no longer is
        no news."""
        if tag == self.tag:
            return False
        work, known = wire.untag(tag)
        mine, open_ = wire.untag(self.tag)
        return work != mine or not set(open_) <= set(known)


def for_node(snapshot: view.Snapshot, node: str) -> NodeWants:
    """Everything `node` shall see to, ordered by instance and epoch."""
    wants = {(order.instance, order.epoch): order for order in _orders(snapshot, node)}
    ledger = snapshot.ledger(node)
    for claim in ledger.noun.claims if ledger is not None else ():
        kept = snapshot.instance(claim.instance)
        if kept is None or kept.noun.node != node or kept.noun.epoch != claim.epoch:
            continue  # what nobody wants is ordered away in its time, never by silence
        verb = _VERBS.get(kept.noun.state)
        if verb is not None and (claim.instance, claim.epoch) not in wants:
            wants[claim.instance, claim.epoch] = _want(kept.noun, verb)
    wanted = tuple(wants[key] for key in sorted(wants))
    questions = tuple(sorted((kept.noun for kept in snapshot.questions_to(node)), key=lambda noun: noun.nonce))
    return NodeWants(wanted, wire.tag(wanted, (question.nonce for question in questions)), questions)


def _orders(snapshot: view.Snapshot, node: str) -> Iterable[wire.Wanted]:
    for kept in snapshot.orders_on(node):
        order = kept.noun
        instance = snapshot.instance(order.instance)
        yield wire.Wanted(
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
