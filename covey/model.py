"""The nouns, frozen.

Rules: no I/O, no clock, no chance; times are integer nanoseconds since the epoch and for display only (safety S9);
sizes are bytes, memory of VMs is MiB (``_mb``). A noun that is stored carries `tx`, the id of the transaction that
wrote it last, so that a writer whose reply was lost can tell its own write from somebody else's (safety S15). A field
is only ever added, with a default: older programs keep what they do not know (`store.codec`).
"""

from enum import StrEnum
from typing import NewType

import msgspec

InstanceId = NewType("InstanceId", str)  # a UUID, never used twice
NodeId = NewType("NodeId", str)  # a UUID
TemplateId = NewType("TemplateId", str)  # a UUID; the OCI repository is templates/<id>
Digest = NewType("Digest", str)  # "sha256:<64 hex>" or "sha512:<128 hex>"

NOWHERE = NodeId("")
DEFAULT_VCPU = 1  # processors of a VM when neither the start nor its template says how many
DEFAULT_RAM_MB = 1024  # its memory likewise


class State(StrEnum):
    """An instance's state, spelled as the API's clients compare it."""

    SCHEDULING = "Scheduling"
    PULLING = "Pulling"
    STARTED = "Started"
    STOPPING = "Stopping"
    STOPPED = "Stopped"
    PUSHING = "Pushing"
    TERMINATING = "Terminating"
    TERMINATED = "Terminated"
    ERROR = "Error"


class NodeState(StrEnum):
    """A node's state, spelled as the API's clients compare it."""

    OFFLINE = "Offline"
    ACTIVE = "Active"
    DRAIN = "Drain Mode"
    UPDATING = "Updating"


class Arch(StrEnum):
    """A processor architecture; any other text breaks the Prometheus exporter."""

    AMD64 = "amd64"
    ARM64 = "arm64"


class CapacityMode(StrEnum):
    """How a node's room is counted: by number of VMs, or by their processors and memory."""

    NUMBER = "number"
    RESOURCE = "resource"


class Noun(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Base of all nouns: immutable, compared by value, default fields left out when written."""


# ---- instances -------------------------------------------------------------------------------------------------


class Forward(Noun, frozen=True, kw_only=True):
    """A TCP port of the guest made reachable on its node. `host_port` 0: the system picks a free one."""

    name: str
    guest_port: int
    host_port: int = 0
    host_ip: str = ""
    protocol: str = "tcp"


class Script(Noun, frozen=True, kw_only=True):
    """A start script. Its text is a key of its own (`key`, up to 256 KiB decoded), never in a listed record."""

    key: str
    condition: int = 0  # 0: after the network is up; 1: right after boot
    monitored: bool = False
    timeout_s: int = 90
    fail_handler: int = 0  # 0 stop the VM, 1 keep it, 2 delete it; the instance goes to Error in each case


class ScriptResult(Noun, frozen=True, kw_only=True):
    """How a monitored script ended. `return_code` is -1 when it timed out. Its output is stored apart (safety S26)."""

    return_code: int
    did_timeout: bool = False
    errors: str = ""


class VmInfo(Noun, frozen=True, kw_only=True):
    """What the hypervisor tells of a running VM; complete before an instance is shown as Started."""

    uuid: str
    name: str
    status: str = "running"  # running | stopped | deleted
    ip: str = ""
    host_ip: str = ""
    cpu_cores: int = 0
    ram_mb: int = 0
    forwards: tuple[Forward, ...] = ()
    vnc_port: int = 0
    vnc_password: str = ""
    started_ns: int = 0


class Spec(Noun, frozen=True, kw_only=True):
    """What was asked for, as accepted. Never changes. The tag is pinned to a manifest digest (safety S14)."""

    template: TemplateId
    template_name: str
    tag: str
    version: int
    digest: Digest
    arch: Arch
    size_bytes: int = 0
    external_id: str = ""
    name: str = ""
    name_template: str = ""
    priority: int = 1000  # 1..10000, lower is sooner
    node: NodeId = NOWHERE  # pinned to this node
    group: str = ""
    vcpu: int = 0  # the template's when none was given; 0: it has none, DEFAULT_VCPU
    vram_mb: int = 0  # likewise; 0: DEFAULT_RAM_MB
    forwards: tuple[Forward, ...] = ()
    script: Script | None = None
    vnc_password: str = ""


class Launch(Noun, frozen=True, kw_only=True):
    """Leave to run guest code, granted to one agent session for one epoch (safety S1)."""

    node: NodeId
    session: int
    epoch: int
    nonce: str  # chosen by the agent: the same request repeated gets the same answer


class Decision(Noun, frozen=True, kw_only=True):
    """Who decided and why: every destruction carries one (promise I4)."""

    who: str
    why: str
    at_ns: int = 0


class Applied(Noun, frozen=True, kw_only=True):
    """The newest report applied to an instance (safety S3): reports not newer are dropped."""

    session: int
    epoch: int
    seq: int


class Instance(Noun, frozen=True, kw_only=True):
    """A VM asked for by a user, as it stands.

    `epoch` rises with every placement, start and restart. `node` is empty while it waits: in Scheduling before the
    first placement, in Pulling after a placement was withdrawn. `before` is the state to return to when a push fails.
    """

    id: InstanceId
    spec: Spec
    state: State
    created_ns: int
    changed_ns: int
    tx: str = ""
    epoch: int = 0
    node: NodeId = NOWHERE
    placed_ns: int = 0
    acknowledged: bool = False
    launch: Launch | None = None
    applied: Applied | None = None
    progress: float = 0.0
    message: str = ""
    vm: VmInfo | None = None
    script_result: ScriptResult | None = None
    metadata: dict[str, str | int | bool] = {}
    external_id: str = ""  # starts as the spec's; PUT may change it
    name: str = ""
    ended: Decision | None = None  # set when the instance was told to terminate
    before: State | None = None
    refused: tuple[NodeId, ...] = ()  # nodes that could not take it, one entry per refusal
    learnt: str = ""  # the break after which the store learnt of it from its node (safety S19); "": by a start request
    released: bool = False  # its node said `gone` (or was removed): no claim of this epoch is left
    aged: int = 0  # how many whole spans of waiting were observed: its turn comes nearer with each
    aged_from: int = 0  # a revision: only VMs created since are awaited on a node kept free for it

    @property
    def claimed(self) -> bool:
        """Whether its node holds a slot for this epoch. Only a commit that rewrites the instance ends that, so who
        compares the instance needs not compare the ledger (safety S11, S13)."""
        return self.node != NOWHERE and not self.released

    @property
    def waiting(self) -> bool:
        """Whether it waits for a node: before its first placement, or after one was withdrawn."""
        return self.node == NOWHERE and self.state in (State.SCHEDULING, State.PULLING)

    @property
    def launched(self) -> bool:
        """Whether this epoch may have run guest code: then it is never placed again."""
        return self.launch is not None and self.launch.epoch == self.epoch


# ---- nodes -----------------------------------------------------------------------------------------------------


class Facts(Noun, frozen=True, kw_only=True):
    """What an agent says of its host when it joins."""

    name: str
    ip: str
    arch: Arch
    hypervisor: str
    cpu_count: int
    ram_mb: int
    disk_bytes: int
    slots: int  # VMs the host takes when nothing else is configured
    agent_version: str = ""
    hypervisor_version: str = ""
    share_port: int = 0  # where other nodes fetch layers from it, at `ip`; 0: it shares none


class Node(Noun, frozen=True, kw_only=True):
    """A node as the operator configured it: survives its reboot and a re-join."""

    id: NodeId
    created_ns: int
    tx: str = ""
    name: str = ""  # "": the host's own
    host: str = ""
    max_vms: int = 0  # 0: the host's own
    capacity_mode: CapacityMode = CapacityMode.NUMBER
    vcpu_override: int = 0
    ram_mb_override: int = 0
    drain: bool = False
    groups: tuple[str, ...] = ()
    central_logging: bool = True


class Session(Noun, frozen=True, kw_only=True):
    """One life of one node's agent (safety S7). The secret is kept as a SHA-256 digest."""

    node: NodeId
    counter: int
    secret_sha256: str
    host_key: str  # identifies the data directory: another host with the same node id is refused
    lease: int
    facts: Facts
    started_ns: int
    tx: str = ""


class VmSeen(Noun, frozen=True, kw_only=True):
    """A VM that an agent finds on its host, wanted or not."""

    instance: InstanceId
    epoch: int
    running: bool
    cloud: str = ""


class Word(Noun, frozen=True, kw_only=True):
    """A node's last word: changes often, and no decision compares it (safety S26).

    `messages` counts what this session has sent, so that any controller can see a node fall silent without trusting
    the lease alone (safety S8).
    """

    node: NodeId
    session: int
    messages: int
    at_ns: int
    vms: tuple[VmSeen, ...] = ()
    images: tuple[Digest, ...] = ()  # manifests wholly in the node's cache
    free_disk_bytes: int = 0
    image_bytes: int = 0
    cpu_util: float = 0.0
    ram_util: float = 0.0
    foreign_vms: int = 0  # VMs of another cloud: counted, never touched (safety S12)
    trouble: str = ""  # why the node can take nothing now ("" when it can)
    tx: str = ""


class Claim(Noun, frozen=True, kw_only=True):
    """A slot held on a node. Only the node's `gone` or the node's removal takes it away (safety S11)."""

    instance: InstanceId
    epoch: int
    vcpu: int = 0
    vram_mb: int = 0


class Ledger(Noun, frozen=True, kw_only=True):
    """All claims of one node in one key, which every placement and release rewrites and compares (safety S11)."""

    node: NodeId
    claims: tuple[Claim, ...] = ()
    tx: str = ""


class Order(Noun, frozen=True, kw_only=True):
    """An explicit order to destroy one VM, committed against its instance key (safety S2)."""

    node: NodeId
    instance: InstanceId
    epoch: int  # this epoch and every older one
    decision: Decision
    withdrawn: bool = False  # a placement that was not acknowledged: the node gets nothing new until it says gone
    tx: str = ""


class Question(Noun, frozen=True, kw_only=True):
    """Somebody wants to read a part of what a VM's start script wrote, which its node keeps (safety S26).

    Open as long as its key is there. `offset` counts from the stream's first byte; a negative one from its end.
    """

    nonce: str  # also the id of the transaction that asked
    instance: InstanceId
    epoch: int
    stream: str  # stdout or stderr
    offset: int
    limit: int


class Output(Noun, frozen=True, kw_only=True):
    """A part of a stream. It may begin later than asked for: what lies before was not kept."""

    data: bytes
    offset: int  # of the first byte of `data`
    size: int  # how much was written so far
    end: bool = False  # `data` reaches the end, and nothing more will be written
