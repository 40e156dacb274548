"""From whom a node that pulls a template fetches it: pure.

    those that hold it      one chain begins at each; at the registry, if nobody holds it
    those that pull it      in the order in which they were told to; each fetches from the one before it in its chain,
                            which passes on what it receives

So one copy leaves the registry, or one each holder, and every node sends about as much as it receives, however many
pull at once. A chain costs a moment per link and no throughput. Named are a few: the first is the one to use, the
others are for when it does not help.
"""

import hashlib
from collections.abc import Sequence

from covey import model

NAMED = 3


def name(
    asker: model.NodeId,
    template: model.Digest,
    holders: Sequence[model.NodeId],
    pulling: Sequence[model.NodeId],
) -> tuple[model.NodeId, ...]:
    """At most `NAMED` nodes, the best first; none: fetch from the registry. `pulling`: in the order of their starts."""
    kept = sorted(holder for holder in {*holders} if holder != asker)
    order = [node for node in dict.fromkeys(pulling) if node == asker or node not in kept]
    place = order.index(asker) if asker in order else len(order)
    chains = max(len(kept), 1)
    before = [order[index] for index in range(place - chains, -1, -chains)]
    ranked = _ranked(kept, template, place)
    first = before[: NAMED - 1] if ranked else before[:NAMED]
    return (*first, *ranked)[:NAMED]


def _ranked(kept: Sequence[model.NodeId], template: model.Digest, place: int) -> list[model.NodeId]:
    """The holders, beginning with that of the chain that this place belongs to. Templates begin at different ones."""
    if not kept:
        return []
    turned = sorted(kept, key=lambda node: hashlib.blake2b(f"{node} {template}".encode(), digest_size=8).digest())
    start = place % len(turned)
    return turned[start:] + turned[:start]
