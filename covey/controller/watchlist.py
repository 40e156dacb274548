"""What stands under observation in a snapshot, for `decide.deadlines`: pure.

While a node's word is waited for after a restore, nothing is concluded from its silence, nor done about what the store
believes to be there (safety S19).
"""

from collections.abc import Container, Iterable, Iterator

from covey import model
from covey.decide import deadlines, placement
from covey.store import codec, commit_instances, view

Kind = deadlines.Kind
Thing = deadlines.Thing
State = model.State

_MAY_END = (State.SCHEDULING, State.PULLING, State.TERMINATED, State.ERROR)
_MAY_BE_LOST = (State.PULLING, State.STARTED, State.STOPPING, State.STOPPED)


def things(snapshot: view.Snapshot) -> Iterator[tuple[Thing, int]]:
    """Everything whose time may soon run out, with the revision that must stand still meanwhile."""
    awaited = _awaited(snapshot)
    if is_awaiting(snapshot):
        yield Thing(Kind.BREAK, snapshot.breach.nonce), snapshot.breach.revision
    for state in _MAY_END:
        for kept in snapshot.in_state(state):
            yield from of_instance(snapshot, kept, awaited)
    yield from _unwanted(snapshot, snapshot.ledgers(), awaited)


def is_awaiting(snapshot: view.Snapshot) -> bool:
    """Whether the store was restored and not all nodes have told since what they have."""
    return snapshot.breach.nonce not in ("", snapshot.settled)


def of_instance(
    snapshot: view.Snapshot, kept: codec.Kept[model.Instance], awaited: Container[str] = ()
) -> Iterator[tuple[Thing, int]]:
    """What may run out for one instance; all but `awaited` nodes and breaks follows from the instance."""
    noun = kept.noun
    match noun.state:
        case State.TERMINATED:
            yield Thing(Kind.TERMINATED, noun.id), kept.revision
        case State.ERROR if noun.node not in awaited:
            yield Thing(Kind.ERROR, noun.id), kept.revision
        case State.SCHEDULING | State.PULLING if noun.waiting:
            if noun.aged < placement.AGES:
                yield Thing(Kind.WAITING, noun.id), kept.revision
        case State.PULLING if not noun.launched and noun.node not in awaited:
            if not noun.acknowledged:
                yield Thing(Kind.UNACKNOWLEDGED, noun.id), kept.revision
            elif noun.claimed and snapshot.may_begin(kept):
                yield Thing(Kind.STALLED, noun.id), kept.revision


def on_node(snapshot: view.Snapshot, node: str) -> tuple[bool, list[tuple[Thing, int]]]:
    """The claims of one node that no instance wants, while no word is waited for; and whether what is so of this node
    may change without a change of its ledger, its orders, or an instance that is or was on it."""
    ledger = snapshot.ledger(node)
    if ledger is None:
        return False, []
    here = snapshot.by_id_on(node)
    odd = any(_is_odd(here.get(claim.instance), claim) for claim in ledger.noun.claims)
    return odd, list(_unwanted(snapshot, [ledger], ())) if odd else []


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


def _is_odd(here: codec.Kept[model.Instance] | None, claim: model.Claim) -> bool:
    """Whether the claim is anything else than that of an instance which is on the node in this epoch, and lives."""
    return here is None or here.noun.released or here.noun.epoch != claim.epoch


def _unwanted(
    snapshot: view.Snapshot, ledgers: Iterable[codec.Kept[model.Ledger]], awaited: Container[str]
) -> Iterator[tuple[Thing, int]]:
    """Claims that no instance wants and that no order covers yet (promise I3). What must stand still is the instance
    key: its revision, or its absence."""
    for ledger in ledgers:
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
