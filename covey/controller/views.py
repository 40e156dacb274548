"""How nouns look in the API: the one serializer of instances and the one of nodes. Pure.

Clients are strict and each one differently, so the rules are kept here and nowhere else:

* A value that is empty is left out, never null: a null ``external_id``, ``message`` or ``vminfo`` breaks whole lists.
* ``external_id`` and ``instance_id`` stand in the wrapper and in the inner object.
* ``Started`` is never shown before ``vminfo`` is complete.
* Whole numbers carry no fraction; lists of nodes hold the same keys in every element; an architecture is always
  amd64 or arm64, also for a node whose agent has never been here.
* Dates are RFC 3339 in UTC with a zone.
"""

import datetime
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import msgspec

from covey import model
from covey.decide import permission
from covey.store import codec, view

UNSET = msgspec.UNSET
MISSING = msgspec.UnsetType

State = model.State

_EPOCH = datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)
_NEVER = "0001-01-01T00:00:00Z"
_MIB_PER_GIB = 1024


class _View(msgspec.Struct, frozen=True, kw_only=True):
    """Base of all views. A field of type ``… | MISSING`` is left out when it is empty."""


class Forward(_View, frozen=True, kw_only=True):
    name: str
    guest_port: int
    host_port: int
    host_ip: str
    protocol: str


class VmInfo(_View, frozen=True, kw_only=True):
    uuid: str
    name: str
    status: str
    node_id: str
    host_ip: str
    ip: str
    cpu_cores: int
    ram: str
    vnc_port: int
    vnc_connection_string: str
    creation_date: str
    start_date: str
    stop_date: str
    port_forwarding: list[Forward]


class ScriptResult(_View, frozen=True, kw_only=True):
    return_code: int
    did_timeout: bool
    stdout: str
    stderr: str
    errors: str


class Instance(_View, frozen=True, kw_only=True):
    """The inner object ``vm``, and the whole body of GET ?id=."""

    instance_id: str
    instance_state: str
    vmid: str
    tag: str
    version: int
    group_id: str
    anka_registry: str
    cr_time: str
    ts: str
    progress: float
    vlan: str
    usb_device: str
    arch: str
    template_name: str
    external_id: str | MISSING = UNSET
    name: str | MISSING = UNSET
    node_id: str | MISSING = UNSET
    message: str | MISSING = UNSET
    metadata: dict[str, str | int | bool] | MISSING = UNSET
    vminfo: VmInfo | MISSING = UNSET
    startup_script: ScriptResult | MISSING = UNSET


class Wrapper(_View, frozen=True, kw_only=True):
    """One element of GET /api/v1/vm."""

    instance_id: str
    vm: Instance
    external_id: str | MISSING = UNSET
    name: str | MISSING = UNSET


class NodeTemplate(_View, frozen=True, kw_only=True):
    uuid: str
    name: str
    tag: str


class AnkaVersion(_View, frozen=True, kw_only=True):
    """The product's shape; here it tells the hypervisor."""

    product: str
    version: str
    build: str = ""
    license: str = ""
    expires: str = ""


class Group(_View, frozen=True, kw_only=True):
    id: str
    name: str
    description: str = ""
    fallback_group_id: str | None = None


class Node(_View, frozen=True, kw_only=True):
    node_id: str
    node_name: str
    ip_address: str
    state: str
    capacity: int
    capacity_mode: str
    host_arch: str
    cpu_count: int
    ram: int
    vm_count: int
    vcpu_count: int
    vram: int
    free_disk_space: int
    anka_disk_usage: int
    disk_size: int
    cpu_util: float
    ram_util: float
    groups: list[Group]
    templates: list[NodeTemplate]
    anka_version: AnkaVersion
    vcpu_override: int
    ram_override: int
    last_updated: str
    timestamp: int
    agent_version: str
    trouble: str
    usb_devices: None = None


class Outputs(NamedTuple):
    """The last of a start script's streams, read only for one instance at a time (safety S26)."""

    stdout: bytes = b""
    stderr: bytes = b""


class Shown(NamedTuple):
    """What views need beside the nouns. `online` and `talking` say whether a node was heard of lately, by the time-outs
    of nodes and of instances; `why_waiting` why an instance has no node; `tags` names known manifests."""

    online: Callable[[model.NodeId], bool]
    talking: Callable[[model.NodeId], bool]
    why_waiting: Callable[[model.InstanceId], str]
    tags: Mapping[model.Digest, NodeTemplate]
    registry: str


# ---- instances ---------------------------------------------------------------------------------------------------


def wrapper(instance: model.Instance, shown: Shown, said: str | None = None) -> Wrapper:
    """`said`: its message, if that was worked out before; beside it a view rests on the noun alone."""
    return Wrapper(
        instance_id=instance.id,
        external_id=instance.external_id or UNSET,
        name=instance.name or UNSET,
        vm=inner(instance, shown, said=said),
    )


def inner(
    instance: model.Instance,
    shown: Shown,
    outputs: Outputs = Outputs(),  # noqa: B008 (immutable)
    said: str | None = None,
) -> Instance:
    spec = instance.spec
    return Instance(
        instance_id=instance.id,
        instance_state=shown_state(instance),
        vmid=spec.template,
        tag=spec.tag,
        version=spec.version,
        group_id=spec.group,
        anka_registry=shown.registry,
        cr_time=date(instance.created_ns),
        ts=date(instance.changed_ns),
        progress=_progress(instance),
        vlan="",
        usb_device="",
        arch=spec.arch,
        template_name=spec.template_name,
        external_id=instance.external_id or UNSET,
        name=instance.name or UNSET,
        node_id=instance.node or UNSET,
        message=(message(instance, shown) if said is None else said) or UNSET,
        metadata=instance.metadata or UNSET,
        vminfo=_vminfo(instance) or UNSET,
        startup_script=_script(instance, outputs) or UNSET,
    )


def shown_state(instance: model.Instance) -> State:
    """`Started` without a complete vminfo would make clients crash or wait for ever."""
    if instance.state == State.STARTED and not complete(instance.vm):
        return State.PULLING
    return instance.state


def complete(vm: model.VmInfo | None) -> bool:
    """Whether a VM's facts are enough to be shown as Started."""
    return vm is not None and bool(vm.uuid and vm.status and vm.host_ip)


def _progress(instance: model.Instance) -> float:
    return float(min(max(instance.progress, 0.0), 1.0)) if instance.state != State.STARTED else 1.0


def message(instance: model.Instance, shown: Shown) -> str:
    """Why it waits, that its node is silent, or what was last said of it."""
    if instance.waiting:
        return shown.why_waiting(instance.id) or instance.message or "waiting for a node"
    if instance.state == model.State.PULLING and not instance.launched and (why := shown.why_waiting(instance.id)):
        return why
    if instance.claimed and instance.state not in (State.TERMINATED, State.ERROR) and not shown.talking(instance.node):
        return f"node {instance.node} is not communicating" + (f"; {instance.message}" if instance.message else "")
    return instance.message


def _vminfo(instance: model.Instance) -> VmInfo | None:
    vm = instance.vm
    if vm is None or not complete(vm):
        return None
    vnc = f"vnc://:{vm.vnc_password}@{vm.host_ip}:{vm.vnc_port}" if vm.vnc_port else ""
    return VmInfo(
        uuid=vm.uuid,
        name=vm.name,
        status=vm.status,
        node_id=instance.node,
        host_ip=vm.host_ip,
        ip=vm.ip,
        cpu_cores=vm.cpu_cores,
        ram=_ram(vm.ram_mb),
        vnc_port=vm.vnc_port,
        vnc_connection_string=vnc,
        creation_date=date(instance.created_ns),
        start_date=date(vm.started_ns) if vm.started_ns else _NEVER,
        stop_date=_NEVER,
        port_forwarding=[
            Forward(
                name=rule.name,
                guest_port=rule.guest_port,
                host_port=rule.host_port,
                host_ip=rule.host_ip,
                protocol=rule.protocol,
            )
            for rule in vm.forwards
        ],
    )


def _script(instance: model.Instance, outputs: Outputs) -> ScriptResult | None:
    result = instance.script_result
    if result is None:
        return None
    return ScriptResult(
        return_code=result.return_code,
        did_timeout=result.did_timeout,
        stdout=outputs.stdout.decode("utf-8", "replace"),
        stderr=outputs.stderr.decode("utf-8", "replace"),
        errors=result.errors,
    )


def _ram(ram_mb: int) -> str:
    """ "4G", as the product writes it; what is no whole GiB in MiB."""
    return f"{ram_mb // _MIB_PER_GIB}G" if ram_mb % _MIB_PER_GIB == 0 else f"{ram_mb}M"


def date(at_ns: int) -> str:
    """RFC 3339 in UTC with microseconds."""
    at = _EPOCH + datetime.timedelta(microseconds=at_ns // 1000)
    return at.strftime("%Y-%m-%dT%H:%M:%S.%fZ")


# ---- nodes -------------------------------------------------------------------------------------------------------

_UNKNOWN = model.Facts(
    name="", ip="", arch=model.Arch.AMD64, hypervisor="", cpu_count=0, ram_mb=0, disk_bytes=0, slots=0
)


def node(snapshot: view.Snapshot, kept: codec.Kept[model.Node], shown: Shown) -> Node:
    noun = kept.noun
    session, word, ledger = snapshot.session(noun.id), snapshot.word(noun.id), snapshot.ledger(noun.id)
    facts = session.noun.facts if session else _UNKNOWN
    said = word.noun if word else model.Word(node=noun.id, session=0, messages=0, at_ns=noun.created_ns)
    claims = ledger.noun.claims if ledger else ()
    return Node(
        node_id=noun.id,
        node_name=noun.name or facts.name or noun.id,
        ip_address=noun.host or facts.ip,
        state=node_state(noun, shown),
        capacity=max(noun.max_vms or facts.slots, 0),
        capacity_mode=noun.capacity_mode,
        host_arch=facts.arch,
        cpu_count=max(facts.cpu_count, 0),
        ram=max(facts.ram_mb, 0) // _MIB_PER_GIB,
        vm_count=len(claims),
        vcpu_count=sum(max(claim.vcpu, 0) for claim in claims),
        vram=sum(max(claim.vram_mb, 0) for claim in claims),
        free_disk_space=max(said.free_disk_bytes, 0),
        anka_disk_usage=max(said.image_bytes, 0),
        disk_size=max(facts.disk_bytes, 0),
        cpu_util=said.cpu_util,
        ram_util=said.ram_util,
        groups=[Group(id=group, name=group) for group in noun.groups],
        templates=_templates(said.images, shown.tags),
        anka_version=AnkaVersion(product=facts.hypervisor, version=facts.hypervisor_version),
        vcpu_override=max(noun.vcpu_override, 0),
        ram_override=max(noun.ram_mb_override, 0),
        last_updated=date(said.at_ns),
        timestamp=said.at_ns // 1_000_000_000,
        agent_version=facts.agent_version,
        trouble=said.trouble or (permission.HELD if snapshot.held(noun.id) else ""),
    )


def node_state(noun: model.Node, shown: Shown) -> model.NodeState:
    if not shown.online(noun.id):
        return model.NodeState.OFFLINE
    return model.NodeState.DRAIN if noun.drain else model.NodeState.ACTIVE


def _templates(images: Iterable[model.Digest], tags: Mapping[model.Digest, NodeTemplate]) -> list[NodeTemplate]:
    return [tags[digest] for digest in images if digest in tags]
