"""One factory per noun: the least that makes it whole, the rest by keyword."""

import itertools
import uuid
from typing import Any

from covey import model, wire
from covey.decide import rooms

_count = itertools.count(1)


def instance_id() -> model.InstanceId:
    return model.InstanceId(str(uuid.uuid4()))


def spec(**changes: Any) -> model.Spec:
    values: dict[str, Any] = {
        "template": "11111111-2222-3333-4444-555555555555",
        "template_name": "debian",
        "tag": "v1",
        "version": 0,
        "digest": "sha256:" + "a" * 64,
        "arch": model.Arch.AMD64,
    }
    return model.Spec(**(values | changes))


def facts(**changes: Any) -> model.Facts:
    values: dict[str, Any] = {
        "name": "host",
        "ip": "10.0.0.1",
        "arch": model.Arch.AMD64,
        "hypervisor": "synthetic",
        "cpu_count": 8,
        "ram_mb": 16384,
        "disk_bytes": 1 << 40,
        "slots": 2,
    }
    return model.Facts(**(values | changes))


def instance(**changes: Any) -> model.Instance:
    values: dict[str, Any] = {
        "id": instance_id(),
        "spec": spec(),
        "state": model.State.SCHEDULING,
        "created_ns": next(_count),
        "changed_ns": 1,
    }
    return model.Instance(**(values | changes))


def host(id: str = "", *, slots: int = 2, held: int = 0, **changes: Any) -> rooms.Host:
    """A node with `slots`, of which `held` are claimed."""
    id = id or str(uuid.uuid4())
    node_changes = {name: changes.pop(name) for name in model.Node.__struct_fields__ if name in changes}
    facts_changes = {name: changes.pop(name) for name in model.Facts.__struct_fields__ if name in changes}
    claims = tuple(model.Claim(instance=instance_id(), epoch=1) for _ in range(held))
    return rooms.Host(
        node=model.Node(id=model.NodeId(id), created_ns=1, **node_changes),
        facts=facts(slots=slots, **facts_changes),
        claims=changes.pop("claims", claims),
        **changes,
    )


def vm(**changes: Any) -> model.VmInfo:
    return model.VmInfo(**({"uuid": "u", "name": "vm", "host_ip": "10.0.0.1"} | changes))


def join(**changes: Any) -> wire.Join:
    number = next(_count)
    values: dict[str, Any] = {"host_key": f"host-{number}", "secret": f"secret-{number}", "facts": facts()}
    return wire.Join(**(values | changes))


def joined(**changes: Any) -> wire.Joined:
    """What a controller answers to a join."""
    values: dict[str, Any] = {"node": model.NodeId("node-1"), "session": 1, "cloud": "cloud", "seen": wire.Seen()}
    values |= {"lease": wire.LeaseTerms(), "heartbeat_s": 1.0, "registries": (), "name": "one"}
    return wire.Joined(**(values | changes))


def item(event: wire.ReportEvent, instance: model.InstanceId, epoch: int = 1, seq: int = 0, **more: Any) -> wire.Item:
    """A report item; `seq` grows by itself unless given."""
    return wire.Item(instance=instance, epoch=epoch, seq=seq or next(_count), event=event, **more)
