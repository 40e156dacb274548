"""What an answer to a poll leaves out because the node knows it, and how the node makes it whole again: pure.

A node whose VMs stand must not be told all of them each time that one of them changes. So it says as of which view it
knows all that is wanted (`wire.Ask.known`), and an answer may leave out

    what lasts      keep it running, which was launched; stop it; keep it as it is
    if its instance has not been written since that view

and nothing else: orders to destroy, and what is not launched yet, are told every time. The node takes what it knew that
lasts, puts what it is told in its place, and compares the result with the answer's tag, which names all that is wanted.

Why that is right. What lasts is said by an instance alone, so what the node knew of one that was not written since is
what it would be told now. That it is still wanted, or wanted again, is not said by the instance (a claim was released,
an order ended): there the tags differ. Then nothing of the answer counts, and the node asks for all. So a node never
acts on what was put together unless it is, to the letter, what the whole answer would have said; and what is missing
from it is no order all the same (safety S2).
"""

import operator
from collections.abc import Callable, Iterable

from covey import model, wire

Verb = wire.Verb
_key: Callable[[wire.Wanted], tuple[model.InstanceId, int]] = operator.attrgetter("instance", "epoch")


def lasts(verb: Verb, *, launched: bool) -> bool:
    """Whether an answer may leave it out."""
    return verb is not Verb.DESTROY and (launched or verb is not Verb.RUN)


def whole(known: Iterable[wire.Wanted], told: Iterable[wire.Wanted]) -> tuple[wire.Wanted, ...]:
    """All that is wanted, by instance and epoch, out of what was known before and an answer that leaves some out."""
    new = {_key(want): want for want in told}
    renewed = {want.instance for want in new.values() if want.verb is not Verb.DESTROY}  # each wants one epoch at most
    kept = [
        want
        for want in known
        if want.instance not in renewed and lasts(want.verb, launched=want.launched) and _key(want) not in new
    ]
    return tuple(sorted([*kept, *new.values()], key=_key))


def is_all(wanted: Iterable[wire.Wanted], tag: str) -> bool:
    """Whether this is what the tag names."""
    return wire.tag(wanted, wire.untag(tag)[1]) == tag
