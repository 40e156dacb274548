"""Support: decoders as strict as all clients together.

A Go decoder fails the whole answer on one field of a wrong type; a Java one on one null, one missing key, or one key
twice. Both rules are checked on every value here.
"""

import datetime
import json
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

STATES = {
    *("Scheduling", "Pulling", "Started", "Stopping", "Stopped", "Pushing", "Terminating", "Terminated", "Error"),
}
NODE_STATES = {"Offline", "Active", "Updating", "Drain Mode"}

Check = Callable[[Any], bool]


def _is_str(value: Any) -> bool:
    return isinstance(value, str)


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and value != ""


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_uint(value: Any) -> bool:
    return _is_int(value) and value >= 0


def _is_share(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1


def _is_bool(value: Any) -> bool:
    return isinstance(value, bool)


def _is_date(value: Any) -> bool:
    return isinstance(value, str) and datetime.datetime.fromisoformat(value).tzinfo is not None


def _one_of(values: set[str]) -> Check:
    return lambda value: value in values


def _is_metadata(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(one, str | int) for one in value.values())


FORWARD = {"guest_port": _is_uint, "host_port": _is_uint, "protocol": _one_of({"tcp"}), "name": _is_str}
VMINFO_REQUIRED = {"uuid": _is_text, "status": _is_text, "host_ip": _is_text, "ip": _is_str, "name": _is_str}
VMINFO = {
    **VMINFO_REQUIRED,
    "vnc_connection_string": _is_str,
    "cpu_cores": _is_uint,
    "ram": lambda value: isinstance(value, str) and value[:-1].isdigit() and value[-1] in "GM",
    "node_id": _is_text,
    "vnc_port": _is_uint,
    "creation_date": _is_date,
    "start_date": _is_date,
    "stop_date": _is_str,
}
SCRIPT = {"return_code": _is_int, "did_timeout": _is_bool, "stdout": _is_str, "stderr": _is_str, "errors": _is_str}
VM_REQUIRED = {
    "instance_state": _one_of(STATES),
    "vmid": _is_text,
    "cr_time": _is_date,
    "ts": _is_date,
    "instance_id": _is_text,
    "group_id": _is_str,
    "progress": _is_share,
    "anka_registry": _is_str,
    "vlan": _is_str,
    "usb_device": _is_str,
}
VM_OPTIONAL = {
    "external_id": _is_text,
    "node_id": _is_text,
    "arch": _one_of({"amd64", "arm64"}),
    "message": _is_text,
    "name": _is_text,
    "tag": _is_text,
    "version": _is_uint,
    "metadata": _is_metadata,
}
NODE = {
    "node_id": _is_text,
    "node_name": _is_text,
    "ip_address": _is_str,
    "state": _one_of(NODE_STATES),
    "capacity": _is_uint,
    "capacity_mode": _one_of({"number", "resource"}),
    "host_arch": _one_of({"amd64", "arm64"}),
    **dict.fromkeys(("cpu_count", "ram", "vm_count", "vcpu_count", "vram"), _is_uint),
    **dict.fromkeys(("free_disk_space", "anka_disk_usage", "disk_size", "timestamp"), _is_uint),
    "cpu_util": _is_share,
    "ram_util": _is_share,
    "last_updated": _is_date,
    "agent_version": _is_str,
}


def decode(content: bytes) -> Any:
    """JSON without a key given twice."""

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = [key for key, _ in items]
        assert len(keys) == len(set(keys)), f"a key is given twice: {keys}"
        return dict(items)

    return json.loads(content, object_pairs_hook=pairs)


def _check(value: Any, required: Mapping[str, Check], optional: Mapping[str, Check] = MappingProxyType({})) -> None:
    for key, good in required.items():
        assert key in value, f"{key} is missing in {value}"
        assert good(value[key]), f"{key} is {value[key]!r}"
    for key, good in optional.items():
        assert key not in value or good(value[key]), f"{key} is {value.get(key)!r}"


def check_vm(vm: Any) -> None:
    """The inner object."""
    _check(vm, VM_REQUIRED, VM_OPTIONAL)
    if "vminfo" in vm:
        _check(vm["vminfo"], VMINFO)
        for rule in vm["vminfo"]["port_forwarding"]:
            _check(rule, FORWARD)
    if "startup_script" in vm:
        _check(vm["startup_script"], SCRIPT)
    if vm["instance_state"] == "Started":
        assert "vminfo" in vm
        assert "node_id" in vm
        assert any(rule["guest_port"] == 22 for rule in vm["vminfo"]["port_forwarding"])


def check_vms(body: Any) -> None:
    assert isinstance(body, list)
    for wrapper in body:
        check_vm(wrapper["vm"])
        assert wrapper["instance_id"] == wrapper["vm"]["instance_id"]
        assert wrapper.get("external_id") == wrapper["vm"].get("external_id")


def check_nodes(body: Any) -> None:
    assert isinstance(body, list)
    lists = {key for node in body for key, value in node.items() if isinstance(value, list)}
    for node in body:
        _check(node, NODE)
        for key in {"groups", "templates", *lists}:
            assert isinstance(node[key], list), f"{key} is no list in every node"
            assert all(isinstance(element, dict) for element in node[key])
        assert node["usb_devices"] is None


def check_groups(body: Any) -> None:
    assert isinstance(body, list)
    for group in body:
        _check(group, {"id": _is_text, "name": _is_text, "description": _is_str})


def check_templates(body: Any) -> None:
    assert isinstance(body, list)
    times = dict.fromkeys(("last_pull", "last_push"), _is_int)
    for template in body:
        _check(template, {"id": _is_text, "name": _is_text, "size": _is_uint, "arch": _is_str, **times})


def check_template(body: Any) -> None:
    numbers = [version["number"] for version in body["versions"]]
    assert numbers == sorted(numbers), "versions go from oldest to newest"
    for version in body["versions"]:
        _check(version, {"tag": _is_text, "size": _is_uint, "number": _is_uint})


def check_status(body: Any) -> None:
    required = {"status": _one_of({"Running"}), "registry_status": _one_of({"Running", "FAIL"})}
    _check(body, {**required, "version": _is_text, "registry_address": _is_str, "license": _is_text})


def check_disk(body: Any) -> None:
    _check(body, {"total": _is_uint, "free": _is_uint})
    assert body["free"] <= body["total"]
