"""Is the cloud well, and if not, what is to be done: one sentence and one remedy for each trouble.

`Health` is what one controller knows of the cloud at a moment; `judge` turns it into troubles, worst first. Everything
that is no trouble stays a figure. What is normal for a while (an instance that waits, a copy that is behind) is a
trouble only when it lasts.
"""

from collections.abc import Iterator, Sequence
from enum import StrEnum

import msgspec

WAITS_S = 30.0  # an instance that has waited for so long is worth a line
LAG_S = 1.0  # of this controller's copy behind etcd; at 2 s it turns red by itself
UNSURE_S = 2.0  # an election is over by then
BEHIND = 1000  # entries of etcd's log: a member this far behind is not counted on
QUOTA_SHARE = 0.8
RENEW_S = 21 * 86400.0  # before a certificate expires
SPARE_SHARE, SPARE_BYTES = 0.05, 20 << 30  # a disk with less of both has little room
_NAMED = 5  # so many of a kind are named, the rest is counted


class Kind(StrEnum):
    """What programs compare, and the headings of docs/operate/health.md."""

    CONTROLLER_SILENT = "controller-silent"
    CONTROLLER_RED = "controller-red"
    ETCD_ALARM = "etcd-alarm"
    ETCD_MEMBER = "etcd-member"
    ETCD_LAG = "etcd-lag"
    ETCD_SPACE = "etcd-space"
    UNSURE = "unsure-writes"
    WATCH_LAG = "watch-lag"
    BROKEN_KEYS = "broken-keys"
    REGISTRY = "registry"
    REGISTRY_SPACE = "registry-space"
    NODE_OFFLINE = "node-offline"
    NODE_HELD = "node-held"
    NODE_TROUBLE = "node-trouble"
    NODE_SPACE = "node-space"
    WAITING = "waiting"
    BACKUP = "backup"
    CERTIFICATE = "certificate"
    VERSIONS = "versions"


class _Part(msgspec.Struct, frozen=True, kw_only=True):
    """Base of all parts. Every field has a default: servers of other versions leave some out."""


class Trouble(_Part, frozen=True, kw_only=True):
    kind: str = ""
    about: str = ""
    text: str = ""
    remedy: str = ""


class Controller(_Part, frozen=True, kw_only=True):
    """One that has announced itself. `url`: where nodes reach it, if it told."""

    id: str = ""
    url: str = ""
    version: str = ""
    format: int = 0
    started: str = ""
    me: bool = False


class Member(_Part, frozen=True, kw_only=True):
    """Of etcd. What it says of itself is 0 when it does not answer; `behind` counts against the furthest member.
    `stranger`: an address that we were given, and no member is there."""

    name: str = ""
    address: str = ""
    answers: bool = False
    stranger: bool = False
    leads: bool = False
    knows_leader: bool = False
    learner: bool = False
    version: str = ""
    revision: int = 0
    revisions_behind: int = 0
    raft_index: int = 0
    raft_behind: int = 0
    size_bytes: int = 0
    used_bytes: int = 0
    quota_bytes: int = 0  # 0: not known
    troubles: list[str] = []


class Registry(_Part, frozen=True, kw_only=True):
    url: str = ""
    answers: bool = False
    version: str = ""
    total_bytes: int = 0
    free_bytes: int = 0
    trouble: str = ""


class Node(_Part, frozen=True, kw_only=True):
    """One that something is wrong with. `silent_s`: at least for so long; 0 when this controller never heard of it."""

    id: str = ""
    name: str = ""
    offline: bool = False
    held: bool = False
    silent_s: int = 0
    vms: int = 0
    trouble: str = ""
    disk_bytes: int = 0
    free_disk_bytes: int = 0


class Queue(_Part, frozen=True, kw_only=True):
    """The instances that wait for a node, and the one that has waited longest."""

    waiting: int = 0
    instance: str = ""
    template: str = ""
    waits_s: int = 0
    why: str = ""


class Unsure(_Part, frozen=True, kw_only=True):
    """Writes of this controller whose outcome is open: sent again until it is definite."""

    open: int = 0
    oldest_s: float = 0.0


class Copy(_Part, frozen=True, kw_only=True):
    """This controller's copy of the store. `broken`: keys whose values cannot be read."""

    revision: int = 0
    lag_s: float = 0.0
    broken: int = 0
    example: str = ""


class Backup(_Part, frozen=True, kw_only=True):
    """The last scheduled one. `interval_s`: how far apart they are to be; 0 when this controller makes none."""

    at: str = ""
    age_s: int = 0
    interval_s: int = 0
    file: str = ""
    size_bytes: int = 0
    trouble: str = ""


class Certificate(_Part, frozen=True, kw_only=True):
    """One that this controller uses or meets. `left_s`: until it expires, by this controller's clock."""

    name: str = ""
    expires: str = ""
    left_s: int = 0


class Health(_Part, frozen=True, kw_only=True):
    """`why` says why this controller cannot serve now ("" when it can); what it tells of the cloud is then what it knew
    last. `etcd` is empty when the store has no members; `tightest` are the nodes with the smallest part of their disk
    left."""

    version: str = ""
    format: int = 0
    why: str = ""
    controllers: list[Controller] = []
    etcd: list[Member] = []
    alarms: list[str] = []
    registries: list[Registry] = []
    nodes: dict[str, int] = {}
    agents: dict[str, int] = {}  # version → nodes
    ailing: list[Node] = []
    tightest: list[Node] = []
    instances: dict[str, int] = {}
    queue: Queue = Queue()
    unsure: Unsure = Unsure()
    copy: Copy = Copy()
    backup: Backup | None = None
    certificates: list[Certificate] = []  # the first to expire comes first
    troubles: list[Trouble] = []


def judge(health: Health) -> list[Trouble]:
    """Everything that somebody should know, worst first."""
    return [
        *_red(health),
        *_alarms(health.alarms),
        *_members(health.etcd),
        *_writes(health),
        *_registries(health.registries),
        *_nodes(health.ailing),
        *_queue(health.queue),
        *_backup(health.backup),
        *_certificates(health.certificates),
        *_versions(health.controllers),
    ]


def _red(health: Health) -> Iterator[Trouble]:
    if health.why:
        yield Trouble(
            kind=Kind.CONTROLLER_RED,
            about=next((one.url or one.id for one in health.controllers if one.me), ""),
            text=f"this controller cannot serve: {health.why}; what it tells of the cloud is what it knew last",
            remedy="mend etcd or the way to it: the controller is green again by itself, and others serve meanwhile",
        )


_FULL = "covey etcd compact, covey etcd defrag, then covey etcd alarms --disarm"


def _alarms(alarms: Sequence[str]) -> Iterator[Trouble]:
    for name in sorted(set(alarms)):
        if name == "NOSPACE":
            text, remedy = "etcd is full: nothing can be started or changed, reads go on", _FULL
        elif name == "CORRUPT":
            text, remedy = (
                "an etcd member holds other data than the rest",
                "covey etcd status says which; covey etcd replace",
            )
        else:
            text, remedy = f"etcd has raised the alarm {name}", "see etcd's log, then covey etcd alarms --disarm"
        yield Trouble(kind=Kind.ETCD_ALARM, about="etcd", text=text, remedy=remedy)


def _members(members: Sequence[Member]) -> Iterator[Trouble]:
    voters = [one for one in members if not one.learner and not one.stranger]
    well = sum(one.answers and one.knows_leader for one in voters)
    spare = well - (len(voters) // 2 + 1)
    if spare < 0:
        rest = "there is no majority, so nothing is served"
    else:
        rest = "one more lost, and nothing is served" if spare == 0 else f"{spare} more may be lost"
    for one in members:
        name = one.name or one.address
        if one.stranger:
            yield Trouble(
                kind=Kind.ETCD_MEMBER,
                about=name,
                text=f"this controller looks for etcd at {one.address}, and no member is there",
                remedy="correct ETCD_ENDPOINTS of the controller and restart it, at leisure",
            )
            continue
        if not one.answers:
            yield Trouble(
                kind=Kind.ETCD_MEMBER,
                about=name,
                text=f"etcd member {_label(one)} does not answer; {well} of {len(voters)} are well: {rest}",
                remedy=f"start it on its host; if that is lost: covey etcd replace {name} --peer-url NEW",
            )
            continue
        if not one.knows_leader:
            yield Trouble(
                kind=Kind.ETCD_MEMBER,
                about=name,
                text=f"etcd member {_label(one)} knows of no leader",
                remedy="see that it reaches the other members, and that a majority of them runs",
            )
        elif one.raft_behind >= BEHIND:
            yield Trouble(
                kind=Kind.ETCD_LAG,
                about=name,
                text=f"etcd member {_label(one)} is {one.raft_behind:,} entries behind the others",
                remedy="it catches up by itself; if it does not, its disk or its network is too slow",
            )
        for said in one.troubles:
            yield Trouble(
                kind=Kind.ETCD_MEMBER,
                about=name,
                text=f"etcd member {_label(one)} says: {said}",
                remedy="see its log on its host",
            )
        if one.quota_bytes and one.size_bytes >= QUOTA_SHARE * one.quota_bytes:
            share = one.size_bytes / one.quota_bytes
            yield Trouble(
                kind=Kind.ETCD_SPACE,
                about=name,
                text=f"the database of etcd member {_label(one)} fills {share:.0%} of its quota",
                remedy="covey etcd compact, then covey etcd defrag; or raise --quota-backend-bytes (8 GiB at most)",
            )


def _label(one: Member) -> str:
    return f"{one.name} ({one.address})" if one.name and one.address else one.name or one.address


def _writes(health: Health) -> Iterator[Trouble]:
    unsure, copy = health.unsure, health.copy
    if unsure.open and unsure.oldest_s >= UNSURE_S:
        yield Trouble(
            kind=Kind.UNSURE,
            about="etcd",
            text=f"the outcome of {_count(unsure.open, 'write')} is open, for {unsure.oldest_s:.0f} s by now",
            remedy="nothing: they are sent again, unchanged, until it is definite; if it lasts, look at etcd's members",
        )
    if copy.lag_s >= LAG_S and not health.why:
        yield Trouble(
            kind=Kind.WATCH_LAG,
            about="this controller",
            text=f"this controller's copy is {copy.lag_s:.1f} s behind etcd",
            remedy="nothing while it is short: at 2 s it turns red and balancers leave it out; if it comes again and "
            "again, its host or etcd has too much to do",
        )
    if copy.broken:
        yield Trouble(
            kind=Kind.BROKEN_KEYS,
            about=copy.example,
            text=f"{_count(copy.broken, 'key')} of the store cannot be read, for example {copy.example}",
            remedy="they were written by hand or by a newer Covey: upgrade, or restore a backup (covey etcd restore)",
        )


def _registries(registries: Sequence[Registry]) -> Iterator[Trouble]:
    if not registries:
        yield Trouble(
            kind=Kind.REGISTRY,
            about="registry",
            text="this controller knows of no registry, so every start is refused",
            remedy="name one in COVEY_ANKA_REGISTRY and restart the controller",
        )
    for one in registries:
        if not one.answers:
            yield Trouble(
                kind=Kind.REGISTRY,
                about=one.url,
                text=f"registry {one.url} does not answer{f' ({one.trouble})' if one.trouble else ''}",
                remedy="start it (covey registry) or mend the way to it; what nodes hold already starts meanwhile",
            )
        elif one.trouble or _little(one.free_bytes, one.total_bytes):
            free = f"{_size(one.free_bytes)} of {_size(one.total_bytes)} free"
            yield Trouble(
                kind=Kind.REGISTRY_SPACE,
                about=one.url,
                text=f"registry {one.url}: {one.trouble or 'little room is left'} ({free})",
                remedy="delete templates that nobody needs (covey template), or give it a larger disk",
            )


def _little(free: int, total: int) -> bool:
    return bool(total) and free < SPARE_BYTES and free < SPARE_SHARE * total


def ails(node: Node) -> bool:
    """Whether there is something to say of a node."""
    return node.offline or node.held or bool(node.trouble) or _little(node.free_disk_bytes, node.disk_bytes)


def _nodes(ailing: Sequence[Node]) -> Iterator[Trouble]:
    offline = [one for one in ailing if one.offline]
    if offline:
        longest = max(one.silent_s for one in offline)
        held = sum(one.vms for one in offline)
        since = f" for {_span(longest)}" if longest and len(offline) == 1 else ""
        vms = f"; {_count(held, 'VM')} there {'is' if held == 1 else 'are'} shown as not communicating" if held else ""
        yield Trouble(
            kind=Kind.NODE_OFFLINE,
            about=_names(offline),
            text=f"{_which(offline)} offline{since}{vms}",
            remedy="start host and agent (covey agent): VMs that run there go on and are adopted; if it is lost, "
            "DELETE /api/v1/node ends what it held",
        )
    held_back = [one for one in ailing if one.held and not one.offline]
    if held_back:
        yield Trouble(
            kind=Kind.NODE_HELD,
            about=_names(held_back),
            text=f"{_which(held_back)} held after a restore of etcd: not yet told what runs there",
            remedy=f"start its agent; only if the host is lost: covey node release {held_back[0].name}",
        )
    for one in ailing:
        if one.trouble and not one.offline and not one.held:
            yield Trouble(
                kind=Kind.NODE_TROUBLE,
                about=one.name,
                text=f"node {one.name} takes nothing new: {one.trouble}",
                remedy=f"mend that on the host; covey node show {one.name} tells when it is gone",
            )
    cramped = [one for one in ailing if _little(one.free_disk_bytes, one.disk_bytes) and not one.offline]
    if cramped:
        least = min(one.free_disk_bytes for one in cramped)
        yield Trouble(
            kind=Kind.NODE_SPACE,
            about=_names(cramped),
            text=f"{_which(cramped)} short of disk space, {_size(least)} free{' at the least' if cramped[1:] else ''}",
            remedy="make room on the host; templates that are not in use go by themselves when one is needed",
        )


def _queue(queue: Queue) -> Iterator[Trouble]:
    if queue.waiting and queue.waits_s >= WAITS_S:
        others = f", and {_count(queue.waiting - 1, 'other')} too" if queue.waiting > 1 else ""
        why = queue.why.removeprefix("Waiting: ") or "no node has room"
        yield Trouble(
            kind=Kind.WAITING,
            about=queue.instance,
            text=f"instance {queue.instance} has waited for {_span(queue.waits_s)}{others}: {why}",
            remedy=f"covey vm explain {queue.instance} says what each node lacks; add nodes, or terminate what nobody "
            "needs",
        )


def _backup(backup: Backup | None) -> Iterator[Trouble]:
    if backup is None:
        return
    if backup.trouble:
        yield Trouble(
            kind=Kind.BACKUP,
            about="etcd",
            text=f"the last backup came to nothing: {backup.trouble}",
            remedy="mend ETCD_BACKUP_DIR (room, rights); meanwhile by hand: covey etcd backup FILE",
        )
    elif backup.interval_s and backup.age_s > 3 * backup.interval_s:
        yield Trouble(
            kind=Kind.BACKUP,
            about="etcd",
            text=f"the last backup is {_span(backup.age_s)} old, although one is due every {_span(backup.interval_s)}",
            remedy="see the controllers' logs for why; meanwhile by hand: covey etcd backup FILE",
        )


def _certificates(certificates: Sequence[Certificate]) -> Iterator[Trouble]:
    for one in certificates:
        if one.left_s < RENEW_S:
            when = f"expires in {_span(one.left_s)}" if one.left_s > 0 else f"has expired ({one.expires})"
            yield Trouble(
                kind=Kind.CERTIFICATE,
                about=one.name,
                text=f"the certificate of {one.name} {when}",
                remedy="renew it, and restart what uses it, one after the other",
            )


def _versions(controllers: Sequence[Controller]) -> Iterator[Trouble]:
    versions = sorted({one.version for one in controllers})
    if len(versions) > 1:
        yield Trouble(
            kind=Kind.VERSIONS,
            about="controllers",
            text=f"controllers of versions {' and '.join(versions)} serve side by side",
            remedy=f"well for the time of an upgrade: bring all to {versions[-1]}, then covey upgrade check",
        )


# ---- words ---------------------------------------------------------------------------------------------------------


def _which(nodes: Sequence[Node]) -> str:
    if len(nodes) == 1:
        return f"node {nodes[0].name} is"
    return f"{len(nodes)} nodes ({_names(nodes)}) are"


def _names(nodes: Sequence[Node]) -> str:
    return ", ".join([*(one.name for one in nodes[:_NAMED]), *(["…"] if len(nodes) > _NAMED else [])])


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _span(seconds: float) -> str:
    """ "50 s", "12 min", "3 h", "4 days"."""
    for size, unit, below in ((1, "s", 120), (60, "min", 7200), (3600, "h", 48 * 3600)):
        if seconds < below:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds / 86400:.0f} days"


def _size(count: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"
