"""The agents' protocol, version 1: what travels between an agent and any controller (docs/agent-protocol.md).

Every call is a POST below /agent/v1/ with one of these as JSON body, answered in the API's envelope. The caller is
named by the header ``Authorization: Covey <node id>.<session counter>.<secret>`` (not on join). HTTP status beside 200:

    409  the session is not the newest of this node: start nothing, destroy nothing, join again (safety S7);
         or `seen` names a view that this store cannot have (safety S22): hold
    410  the node was removed: hold (safety S12)
    503  ask another controller; nothing was decided

Each call from a live session renews the node's lease once (safety S8). The agent may believe in its lease until
(its clock when it sent) + ttl_s − age_s − margin_s.
"""

import hashlib
from collections.abc import Iterable
from enum import StrEnum

import msgspec

from covey import model

LEASE_TTL_S = 30
LEASE_MARGIN_S = 5
POLL_LIMIT_S = LEASE_TTL_S / 3  # a poll parks at most a third of the TTL
HEARTBEAT_S = 5.0
WORD_S = 60.0  # a node says its word at least so often (safety S26)
ACKNOWLEDGE_S = 3.0  # safety S10


class Seen(model.Noun, frozen=True, kw_only=True):
    """The newest view an agent was answered from (safety S18, S22). Revisions compare only within one history."""

    history: str = ""
    revision: int = 0


class LeaseTerms(model.Noun, frozen=True, kw_only=True):
    """`age_s`: how long before this answer's request arrived the renewal it rests on was sent (0: after)."""

    ttl_s: float = LEASE_TTL_S
    margin_s: float = LEASE_MARGIN_S
    age_s: float = 0.0


class Join(model.Noun, frozen=True, kw_only=True):
    """POST join. `secret` is the next session's secret, on the agent's disk before it is sent; `last_secret` that of
    the last session known. `explicit`: an operator typed `covey join` (needed without the last secret, and then only
    after the old lease has ended)."""

    host_key: str
    secret: str
    facts: model.Facts
    node: model.NodeId = model.NOWHERE  # "" at the very first join: the controller chooses
    last_secret: str = ""
    explicit: bool = False
    cloud: str = ""  # the cloud the agent belongs to; another one is refused
    last_session: int = 0  # the new one's number is higher, also when the store has forgotten that one (safety S19)


class Joined(model.Noun, frozen=True, kw_only=True):
    node: model.NodeId
    session: int
    cloud: str
    seen: Seen
    lease: LeaseTerms
    heartbeat_s: float
    registries: tuple[str, ...]  # where this node pulls templates from
    name: str


class Verb(StrEnum):
    """What the node shall do about one (instance, epoch). Absence from an answer is no order (safety S2)."""

    RUN = "run"  # prepare, obtain launch, boot; or keep running when `launched`
    STOP = "stop"
    KEEP = "keep"  # leave it as it is (stopped, or in error for inspection)
    DESTROY = "destroy"  # explicit order: `decision` says who and why


class Neighbour(model.Noun, frozen=True, kw_only=True):
    """A node that has layers of a template, or is about to, and leave to fetch them there (`covey.ticket`)."""

    url: str
    ticket: str


class Wanted(model.Noun, frozen=True, kw_only=True):
    """One thing this node shall see to. For DESTROY: this epoch and every older one of the instance."""

    instance: model.InstanceId
    epoch: int
    verb: Verb
    launched: bool = False
    spec: model.Spec | None = None
    decision: model.Decision | None = None
    vm_name: str = ""  # name_template expanded
    acknowledged: bool = False
    final: bool = False  # DESTROY: the instance itself ends, not only this placement of it (safety S19)
    neighbours: tuple[Neighbour, ...] = ()  # RUN: where to fetch the template from, rather than the registry


class Ask(model.Noun, frozen=True, kw_only=True):
    """POST wanted: answered when the node's wanted state differs from the one tagged `tag`, else after `wait_s`.

    `items` and `word` are a report that rides along: it is taken first, and `tag` is what the node expects after it.
    Only for controllers that take it (`WantedState.takes_reports`); another one does as if there were none.
    `known`: the view as of which the node knows all that is wanted, so that the answer may leave it out (see
    `decide.abridged`); by default everything is to be told."""

    seen: Seen
    messages: int
    tag: str = ""
    known: Seen = Seen()
    wait_s: float = 0.0
    items: tuple["Item", ...] = ()
    word: model.Word | None = None


class WantedState(model.Noun, frozen=True, kw_only=True):
    """`hold`: launch, place and destroy nothing (the store's history is not the one the agent knows).
    `controllers`: URLs at which agents may reach the cloud's controllers now; empty: this teaches nothing.
    `settled`: as in `Reported`, of the report that rode along. `since`: `wanted` leaves out what lasts and has not
    changed since this revision, that of `Ask.known` (see `decide.abridged`); 0: nothing is left out."""

    seen: Seen
    tag: str
    wanted: tuple[Wanted, ...]
    since: int = 0
    lease: LeaseTerms
    heartbeat_s: float = HEARTBEAT_S
    hold: bool = False
    questions: tuple[model.Question, ...] = ()  # open ones; one may be shown again until its answer was taken
    controllers: tuple[str, ...] = ()
    settled: tuple[int, ...] = ()
    takes_reports: bool = False


_BESIDE = "."  # between the parts of a tag


def tag(wanted: Iterable[Wanted], beside: Iterable[str]) -> str:
    """Names a wanted state, `wanted` in order: a hash of the work, then the nonces of the open questions. Both sides
    work it out; where they differ, as versions may, a poll is answered at once."""
    return tag_of([tag_line(want.instance, want.epoch, want.verb) for want in wanted], beside)


def tag_line(instance: model.InstanceId, epoch: int, verb: Verb) -> str:
    """What a tag says of one thing that is wanted."""
    return f"{instance} {epoch} {verb._value_}"


def tag_of(lines: Iterable[str], beside: Iterable[str]) -> str:
    """As `tag`, of lines that are made already."""
    work = hashlib.blake2b("\n".join(lines).encode(), digest_size=12).hexdigest()
    return _BESIDE.join((work, *beside))


def retag(tag: str, beside: Iterable[str]) -> str:
    """A tag of the same work, with these questions."""
    return _BESIDE.join((untag(tag)[0], *beside))


def untag(tag: str) -> tuple[str, tuple[str, ...]]:
    """The parts of a tag: the work, and the questions."""
    work, *beside = tag.split(_BESIDE)
    return work, tuple(beside)


class LaunchAsk(model.Noun, frozen=True, kw_only=True):
    """POST launch: leave to run guest code (safety S1). `nonce`: the same on a repeat of the same request."""

    instance: model.InstanceId
    epoch: int
    nonce: str
    seen: Seen
    messages: int


class Launched(model.Noun, frozen=True, kw_only=True):
    """`granted` False: start nothing; `why` says. The script's text travels only here, base64."""

    granted: bool
    lease: LeaseTerms
    seen: Seen
    why: str = ""
    script: str = ""


class ReportEvent(StrEnum):
    ACKNOWLEDGED = "acknowledged"  # the node knows of the placement
    PROGRESS = "progress"
    REFUSED = "refused"  # not launched, and this node cannot: place it elsewhere
    BOOTED = "booted"
    FAILED = "failed"
    STOPPED = "stopped"
    GONE = "gone"  # nothing of it is left: process, overlay, record
    INFO = "info"  # vminfo changed (an address came)


class Item(model.Noun, frozen=True, kw_only=True):
    """One fact about one VM (safety S3). `seq` grows within (session, instance, epoch)."""

    instance: model.InstanceId
    epoch: int
    seq: int
    event: ReportEvent
    message: str = ""
    progress: float = 0.0
    vm: model.VmInfo | None = None
    script: model.ScriptResult | None = None
    stdout: str = ""  # last 64 KiB, base64
    stderr: str = ""


class Report(model.Noun, frozen=True, kw_only=True):
    """POST report: facts, and the node's word when it changed or 60 s have passed. Empty: a heartbeat."""

    seen: Seen
    messages: int
    items: tuple[Item, ...] = ()
    word: model.Word | None = None


class Reported(model.Noun, frozen=True, kw_only=True):
    """`settled`: indexes of the items that need not be sent again (applied, already known, or not newer)."""

    lease: LeaseTerms
    seen: Seen
    settled: tuple[int, ...] = ()


class Answer(model.Noun, frozen=True, kw_only=True):
    """POST answer: to the question `nonce`. `fault` says why there is no output."""

    nonce: str
    seen: Seen
    messages: int
    output: model.Output | None = None
    fault: str = ""


class Answered(model.Noun, frozen=True, kw_only=True):
    """`taken` False: nobody waits for it any more."""

    lease: LeaseTerms
    seen: Seen
    taken: bool = False


class Held(model.Noun, frozen=True, kw_only=True):
    """One VM of this cloud that the node has, as its own durable record says (safety S19)."""

    instance: model.InstanceId
    epoch: int
    spec: model.Spec
    launched: bool = False  # guest code may have run
    running: bool = False
    stopped: bool = False  # stopped as asked, and may be started again
    buried: bool = False  # ordered destroyed here: it goes by itself
    message: str = ""  # why it failed or was refused
    vm: model.VmInfo | None = None


class Buried(model.Noun, frozen=True, kw_only=True):
    """A tombstone: this epoch of the instance, and every older one, was ordered destroyed. `final`: because the
    instance itself ended; else it was only placed elsewhere."""

    instance: model.InstanceId
    epoch: int
    decision: model.Decision
    final: bool = False
    seen: Seen = Seen()  # the view that the order was in: a store whose own it is has not forgotten it


class Adopt(model.Noun, frozen=True, kw_only=True):
    """POST adopt: all that a held node knows, so that a store with another history learns what it has forgotten
    (safety S19). Sent in parts; `last` ends it, and only then is the node released from its hold. Repeats are
    harmless."""

    seen: Seen  # of the history that the agent knows
    messages: int
    vms: tuple[Held, ...] = ()
    buried: tuple[Buried, ...] = ()
    last: bool = False
    begun: Seen = Seen()  # of all parts but the first: the view that the first one's answer named


class Adopted(model.Noun, frozen=True, kw_only=True):
    """`seen`: the view in which it was taken; that of the part marked `last` is the one to go on from."""

    lease: LeaseTerms
    seen: Seen


class Leave(model.Noun, frozen=True, kw_only=True):
    """POST leave: the operator typed `covey leave`. Refused while the node still holds claims unless `force`."""

    force: bool = False


CURSOR_HEADER = "covey-cursor"  # beside a page of a list: where the next one begins


class Envelope(msgspec.Struct, kw_only=True, omit_defaults=False):
    """Every answer of every server (status, message, body)."""

    status: str = "OK"
    message: str = ""
    body: msgspec.Raw = msgspec.Raw(b"null")
