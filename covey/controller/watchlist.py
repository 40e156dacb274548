"""What stands under observation in a snapshot, for `decide.deadlines`: pure.

While a node's word is waited for after a restore, nothing is concluded from its silence, nor done about what the store
believes to be there (safety S19).
"""

from collections.abc import Iterable, Iterator

from covey import model
from covey.decide import deadlines, placement
from covey.store import codec, commit_instances, view

Kind = deadlines.Kind
Thing = deadlines.Thing
State = model.State

_MAY_BE_LOST = (State.PULLING, State.STARTED, State.STOPPING, State.STOPPED)


def things(snapshot: view.Snapshot) -> Iterator[tuple[Thing, int]]:
    """Everything whose time may soon run out, with the revision that must stand still meanwhile."""
    awaited = _awaited(snapshot)
    if snapshot.breach.nonce not in ("", snapshot.settled):
        yield Thing(Kind.BREAK, snapshot.breach.nonce), snapshot.breach.revision
    for kept in snapshot.unacknowledged():
        if kept.noun.node not in awaited:
            yield Thing(Kind.UNACKNOWLEDGED, kept.noun.id), kept.revision
    for kept in snapshot.in_state(State.PULLING):
        stalls = kept.noun.claimed and kept.noun.acknowledged and not kept.noun.launched
        if stalls and kept.noun.node not in awaited and snapshot.may_begin(kept):
            yield Thing(Kind.STALLED, kept.noun.id), kept.revision
    for kept in snapshot.waiting():
        if kept.noun.aged < placement.AGES:
            yield Thing(Kind.WAITING, kept.noun.id), kept.revision
    for kept in snapshot.in_state(State.TERMINATED):
        yield Thing(Kind.TERMINATED, kept.noun.id), kept.revision
    for kept in snapshot.in_state(State.ERROR):
        if kept.noun.node in awaited:
            continue
        yield Thing(Kind.ERROR, kept.noun.id), kept.revision
    yield from _unwanted(snapshot, awaited)


def nodes(snapshot: view.Snapshot, silent: Iterable[str]) -> Iterator[tuple[Thing, int]]:
    """Every node that is alive, and what runs on those that are not: there are thousands, and their spans are long."""
    away: set[str] = set(silent)
    for node in snapshot.nodes():
        id: str = node.noun.id
        if alive(snapshot, id):
            word, session = snapshot.word(id), snapshot.session(id)
            revisions = [kept.revision for kept in (word, session) if kept is not None]
            yield Thing(Kind.SILENT, id), max(revisions, default=0)
        else:
            away.add(id)
    for lost in away - _awaited(snapshot):
        for kept in snapshot.instances_on(lost):
            if kept.noun.launched and kept.noun.state in _MAY_BE_LOST:
                yield Thing(Kind.LOST, kept.noun.id), kept.revision


def _awaited(snapshot: view.Snapshot) -> set[str]:
    return {one.node for one in snapshot.awaited()}


def alive(snapshot: view.Snapshot, node: str) -> bool:
    """Whether the node's present session still has its lease."""
    sign, session = snapshot.alive(node), snapshot.session(node)
    return sign is not None and session is not None and sign.noun.session == session.noun.counter


def _unwanted(snapshot: view.Snapshot, awaited: set[str]) -> Iterator[tuple[Thing, int]]:
    """Claims that no instance wants and that no order covers yet (promise I3). What must stand still is the instance
    key: its revision, or its absence."""
    for ledger in snapshot.ledgers():
        node = ledger.noun.node
        for claim in ledger.noun.claims if node not in awaited else ():
            kept = snapshot.instance(claim.instance)
            if kept is not None and commit_instances.owns(kept.noun, node, claim.epoch):
                continue
            order = snapshot.order(node, claim.instance)
            if order is None or order.noun.epoch < claim.epoch:
                thing = Thing(Kind.UNWANTED, claim.instance, node, claim.epoch)
                yield thing, kept.revision if kept is not None else 0


def stranded(snapshot: view.Snapshot, silent: Iterable[str]) -> Iterator[codec.Kept[model.Instance]]:
    """Un-launched instances whose node is lost: they can be placed again at once, since launch is a commit on the
    same key (safety S1)."""
    quiet, awaited = set(silent), _awaited(snapshot)
    for kept in snapshot.in_state(State.PULLING):
        node = kept.noun.node
        lost = node != model.NOWHERE and node not in awaited and (node in quiet or not alive(snapshot, node))
        if lost and kept.noun.claimed and not kept.noun.launched and snapshot.removed(node) is None:
            yield kept


def hopeless(snapshot: view.Snapshot) -> Iterator[codec.Kept[model.Instance]]:
    """Instances that wait for a certain node, which was removed: they would wait for ever (promise I1)."""
    for kept in snapshot.waiting():
        if kept.noun.spec.node and snapshot.removed(kept.noun.spec.node) is not None:
            yield kept


def unfinished_removals(snapshot: view.Snapshot) -> list[str]:
    """Removed nodes whose claims are not all dealt with: a crash came between (safety S12)."""
    return [node for node in snapshot.removed_nodes() if snapshot.ledger(node) is not None]
