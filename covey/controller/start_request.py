"""POST /api/v1/vm: the request as clients send it, and every check that needs neither store nor registry. Pure.

Wrong JSON types end in 400 (`serve.parse`); everything else that cannot be done is refused with a text that begins with
the field's name. A documented field that is not built yet is refused when it carries a value: a VM that silently lacks
what was asked for is worse than none. Undocumented fields are ignored, null and "" mean "not given".
"""

import base64
import binascii
import hashlib
import ipaddress
from collections.abc import Mapping
from typing import Any

import msgspec

from covey import errors, model
from covey.client import oci
from covey.store import schema

_COUNT_LIMIT = 100  # one transaction, all or none (safety S17)
_TEXT_LIMIT = 1024
_METADATA_LIMIT_BYTES = 4096
_FORWARDS_LIMIT = 64
_REQUEST_LIMIT_BYTES = 1_000_000  # of all instances together: an etcd request holds 1.5 MB
_INSTANCE_BYTES = 1000  # of an instance and its birth without what the request brings
_TIMEOUT_LIMIT_S = 24 * 3600
_VCPU_LIMIT = 1024
_VRAM_LIMIT_MB = 16 << 20
_VNC_PASSWORD_LIMIT = 8  # RFC 6143, 7.2.2: longer ones are cut

Metadata = dict[str, str | int | bool]


class ForwardOverride(msgspec.Struct, kw_only=True):
    """One element of port_forwarding_override. Ports are strings in requests; numbers are taken too."""

    name: str = ""
    guest_port: str | int = ""
    host_port: str | int | None = ""
    host_ip: str | None = ""
    protocol: str | None = ""


class StartRequest(msgspec.Struct, kw_only=True):
    """The documented body; defaults are the documented ones."""

    vmid: str | None = None
    tag: str | None = None
    version: int | None = None
    count: int | None = 1
    name: str | None = None
    name_template: str | None = None
    external_id: str | None = None
    metadata: Metadata | None = None
    priority: int | None = None
    node_id: str | None = None
    startup_script: str | None = None
    startup_script_condition: int | None = 0
    script_monitoring: bool | None = False
    script_timeout: int | None = None
    script_fail_handler: int | None = 0
    vcpu: int | None = 0
    vram: int | None = 0
    port_forwarding_override: list[ForwardOverride] | None = None
    vnc_password: str | None = None
    # Documented and not built yet: refused when given. Any type, so that the refusal names the field.
    group_id: Any = None
    group: Any = None
    usb_device: Any = None
    mac_address: Any = None
    vlan_tag: Any = None
    video_controller: Any = None
    hvapic: Any = None
    csr_active_config: Any = None
    network_local: Any = None
    hw_serial: Any = None
    hw_uuid: Any = None
    network_mode: Any = None
    disk: Any = None


_UNBUILT = (
    *("group_id", "group", "usb_device", "mac_address", "vlan_tag", "video_controller", "hvapic"),
    *("csr_active_config", "network_local", "hw_serial", "hw_uuid", "network_mode", "disk"),
)


def check(request: StartRequest) -> None:
    """Raises Refused naming the first field that cannot be honoured."""
    if not request.vmid:
        raise errors.Refused("vmid: missing; name a template's id")
    for name in _UNBUILT:
        if getattr(request, name) not in (None, "", {}, []):
            raise errors.Refused(f"{name}: not supported by this version; leave it out")
    _in_range("count", request.count, 1, _COUNT_LIMIT)
    _in_range("priority", request.priority, 1, 10_000)
    _in_range("version", request.version, 0, 1 << 31)
    _in_range("vcpu", request.vcpu, 0, _VCPU_LIMIT)
    _in_range("vram", request.vram, 0, _VRAM_LIMIT_MB)
    _in_range("startup_script_condition", request.startup_script_condition, 0, 1)
    _in_range("script_timeout", request.script_timeout, 1, _TIMEOUT_LIMIT_S)
    _in_range("script_fail_handler", request.script_fail_handler, 0, 2)
    for name in ("vmid", "tag", "name", "name_template", "external_id", "node_id", "vnc_password"):
        _check_text(name, getattr(request, name))
    if len(request.vnc_password or "") > _VNC_PASSWORD_LIMIT:
        raise errors.Refused(f"vnc_password: VNC knows at most {_VNC_PASSWORD_LIMIT} characters")
    check_metadata(request.metadata)


def check_metadata(metadata: Metadata | None) -> None:
    if metadata and len(msgspec.json.encode(metadata)) > _METADATA_LIMIT_BYTES:
        raise errors.Refused(f"metadata: more than {_METADATA_LIMIT_BYTES} bytes")
    for key, value in (metadata or {}).items():
        _check_text("metadata", key)
        if isinstance(value, str):
            _check_text(f"metadata.{key}", value)


def check_names(external_id: str | None, name: str | None) -> None:
    _check_text("external_id", external_id)
    _check_text("name", name)


def _in_range(name: str, value: int | None, least: int, most: int) -> None:
    if value is not None and not least <= value <= most:
        raise errors.Refused(f"{name}: {value} is not between {least} and {most}")


def _check_text(name: str, text: str | None) -> None:
    if text and len(text) > _TEXT_LIMIT:
        raise errors.Refused(f"{name}: longer than {_TEXT_LIMIT} characters")
    if text and any(ord(character) < 0x20 or ord(character) == 0x7F for character in text):
        raise errors.Refused(f"{name}: contains a control character")


def script_text(request: StartRequest) -> str:
    """The start script as one line of base64, "" when there is none."""
    text = "".join((request.startup_script or "").split())
    try:
        size = len(base64.b64decode(text, validate=True))
    except (binascii.Error, ValueError) as error:
        raise errors.Refused("startup_script: not valid base64; encode the script with standard base64") from error
    if size > schema.SCRIPT_LIMIT_BYTES:
        raise errors.Refused(f"startup_script: {size} bytes; at most {schema.SCRIPT_LIMIT_BYTES} are taken")
    return text


def forwards(request: StartRequest) -> tuple[model.Forward, ...]:
    """The ports to forward. An empty or 0 host port lets the node choose one."""
    rules = request.port_forwarding_override or []
    if len(rules) > _FORWARDS_LIMIT:
        raise errors.Refused(f"port_forwarding_override: more than {_FORWARDS_LIMIT} rules")
    return tuple(_forward(f"port_forwarding_override[{index}]", rule) for index, rule in enumerate(rules))


def _forward(where: str, rule: ForwardOverride) -> model.Forward:
    if (rule.protocol or "tcp") != "tcp":
        raise errors.Refused(f"{where}.protocol: only tcp is forwarded")
    _check_text(f"{where}.name", rule.name)
    if rule.host_ip and not _is_ipv4(rule.host_ip):
        raise errors.Refused(f"{where}.host_ip: {rule.host_ip!r} is no IPv4 address; leave it out for the node's own")
    return model.Forward(
        name=rule.name,
        guest_port=_port(f"{where}.guest_port", rule.guest_port, least=1),
        host_port=_port(f"{where}.host_port", rule.host_port or 0, least=0),
        host_ip=rule.host_ip or "",
    )


def _is_ipv4(text: str) -> bool:
    try:
        ipaddress.IPv4Address(text)
    except ValueError:
        return False
    return True


def _port(where: str, value: str | int, *, least: int) -> int:
    text = str(value).strip()
    if not (text.isascii() and text.isdigit() and len(text) <= 5 and least <= int(text) <= 65535):
        raise errors.Refused(f"{where}: {value!r} is no TCP port; use {least} to 65535")
    return int(text)


def spec(request: StartRequest, pin: oci.Resolved, script_key: str) -> model.Spec:
    """What was asked for, as accepted: of the template as it was just resolved (safety S14). A size that was not given
    is the template's: what a VM takes of its node is what its claim counts."""
    script = None
    if script_key:
        script = model.Script(
            key=script_key,
            condition=request.startup_script_condition or 0,
            monitored=bool(request.script_monitoring),
            timeout_s=request.script_timeout or 90,
            fail_handler=request.script_fail_handler or 0,
        )
    return model.Spec(
        template=pin.id,
        template_name=pin.name,
        tag=pin.tag,
        version=pin.number,
        digest=pin.digest,
        arch=pin.arch,
        size_bytes=pin.size,
        external_id=request.external_id or "",
        name=request.name or "",
        name_template=request.name_template or "",
        priority=request.priority or 1000,
        node=model.NodeId(request.node_id or ""),
        vcpu=request.vcpu or pin.vcpu,
        vram_mb=request.vram or pin.ram_mb,
        forwards=forwards(request),
        script=script,
        vnc_password=request.vnc_password or "",
    )


def check_size(spec: model.Spec, metadata: Metadata | None, count: int) -> None:
    """All instances of a request are written in one transaction, which has a limit."""
    twice = (spec.external_id, spec.name)  # in the instance beside its spec, because PUT may change them
    each = sum(len(msgspec.json.encode(part)) for part in (spec, twice, metadata or {})) + _INSTANCE_BYTES
    if each * count > _REQUEST_LIMIT_BYTES:
        most = _REQUEST_LIMIT_BYTES // each
        raise errors.Refused(f"count: {count} instances with so much data are too many at once; at most {most}")


def body_hash(raw: bytes) -> str:
    """The same for the same request, however its JSON is written."""
    value: Mapping[str, Any] = msgspec.json.decode(_utf8(raw))
    return hashlib.sha256(msgspec.json.encode(value, order="sorted")).hexdigest()


def _utf8(raw: bytes) -> bytes:
    try:
        raw.decode()
    except UnicodeDecodeError:
        return raw.decode("latin-1").encode()
    return raw
