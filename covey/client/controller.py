"""A typed client of the controller's API: what the command line and programs of users call.

Nouns here are the API's (docs/reference and the product's field names), not the stored ones: every field has a
default, because older and newer servers leave fields out. Faults are those of `client.http`: Refused with the server's
own words, NotFound, RemoteError.
"""

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar
from urllib import parse

import msgspec

from covey import errors, model, world
from covey.client import http
from covey.decide import troubles

_POLL_S = 0.5
_PAGE = 500
_PATIENCE_S = 10.0  # with controllers that all say they are busy
T = TypeVar("T")
SETTLED = frozenset({model.State.STARTED, model.State.ERROR, model.State.TERMINATED, model.State.TERMINATING})


class _View(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Base of what a server shows."""


class Status(_View, frozen=True, kw_only=True):
    status: str = ""
    version: str = ""
    registry_address: str = ""
    registry_status: str = ""
    license: str = ""


class Forward(_View, frozen=True, kw_only=True):
    name: str = ""
    guest_port: int = 0
    host_port: int = 0
    host_ip: str = ""
    protocol: str = ""


class VmInfo(_View, frozen=True, kw_only=True):
    uuid: str = ""
    name: str = ""
    status: str = ""
    ip: str = ""
    host_ip: str = ""
    node_id: str = ""
    cpu_cores: int = 0
    ram: str = ""
    vnc_port: int = 0
    vnc_connection_string: str = ""
    port_forwarding: list[Forward] | None = None


class ScriptResult(_View, frozen=True, kw_only=True):
    return_code: int = 0
    did_timeout: bool = False
    stdout: str = ""  # plain text: its last 64 KiB
    stderr: str = ""
    errors: str = ""


class Instance(_View, frozen=True, kw_only=True):
    """One instance, as GET /api/v1/vm?id= shows it; in lists it is wrapped."""

    instance_id: str = ""
    instance_state: str = ""
    vmid: str = ""
    tag: str = ""
    version: int | None = None
    external_id: str = ""
    name: str = ""
    node_id: str = ""
    arch: str = ""
    group_id: str = ""
    message: str = ""
    progress: float = 0.0
    cr_time: str = ""
    ts: str = ""
    metadata: dict[str, str | int | bool] | None = None
    vminfo: VmInfo | None = None
    startup_script: ScriptResult | None = None


class _Wrapper(_View, frozen=True, kw_only=True):
    instance_id: str = ""
    vm: Instance


class NodeVerdict(_View, frozen=True, kw_only=True):
    node_id: str = ""
    node_name: str = ""
    verdict: str = ""
    text: str = ""


class Explanation(_View, frozen=True, kw_only=True):
    """Why an instance stands where it stands. `position` 0: it does not wait for a node."""

    instance_id: str = ""
    instance_state: str = ""
    text: str = ""
    priority: int = 0
    turn: int = 0
    position: int = 0
    waiting: int = 0
    competitors: int = 0
    before: list[str] | None = None
    nodes: list[NodeVerdict] | None = None


class Log(_View, frozen=True, kw_only=True):
    """A part of what a start script wrote. `offset`: of its first byte; later than asked for when more was not kept."""

    data: bytes = b""
    offset: int = 0
    size: int = 0
    end: bool = False


class NodeTemplate(_View, frozen=True, kw_only=True):
    uuid: str = ""
    name: str = ""
    tag: str = ""


class Node(_View, frozen=True, kw_only=True):
    node_id: str = ""
    node_name: str = ""
    ip_address: str = ""
    state: str = ""
    capacity: int = 0
    capacity_mode: str = ""
    host_arch: str = ""
    cpu_count: int = 0
    ram: int = 0
    vm_count: int = 0
    vcpu_count: int = 0
    vram: int = 0
    free_disk_space: int = 0
    anka_disk_usage: int = 0
    disk_size: int = 0
    cpu_util: float = 0.0
    ram_util: float = 0.0
    last_updated: str = ""
    agent_version: str = ""
    trouble: str = ""
    templates: list[NodeTemplate] | None = None


class Program(_View, frozen=True, kw_only=True):
    """A live controller. `format`: the newest of the store that it writes."""

    id: str = ""
    url: str = ""
    version: str = ""
    format: int = 0


class Upgrade(_View, frozen=True, kw_only=True):
    """May the store's format be raised to `target`?"""

    format: int = 0
    target: int = 0
    may_finish: bool = False
    blockers: list[str] = []
    notes: list[str] = []
    controllers: list[Program] = []


class Template(_View, frozen=True, kw_only=True):
    """One line of the template list."""

    id: str = ""
    name: str = ""
    size: int = 0
    arch: str = ""


class Start(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """POST /api/v1/vm. `startup_script` is base64."""

    vmid: str
    tag: str = ""
    count: int = 1
    external_id: str = ""
    name: str = ""
    node_id: str = ""
    priority: int = 0
    vcpu: int = 0
    vram: int = 0
    startup_script: str = ""
    script_monitoring: bool = False
    script_timeout: int = 0


class Controller:
    """One cloud, by the URLs of its controllers. Any of them will do for any call."""

    def __init__(
        self, urls: Sequence[str], clock: world.World, *, timeout_s: float = 15.0, ca_cert: Path | None = None
    ) -> None:
        self.endpoints = http.Endpoints(
            urls, salt=clock.token(), timeout_s=timeout_s, patience_s=_PATIENCE_S, ca_cert=ca_cert
        )
        self._world = clock

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.endpoints.close()

    async def status(self) -> Status:
        return await self.endpoints.ask("GET", "/api/v1/status", Status)

    async def health(self) -> troubles.Health:
        """The cloud at a glance, as one controller sees it."""
        return await self.endpoints.ask("GET", "/api/v1/health", troubles.Health)

    async def start(self, ask: Start) -> list[str]:
        """Instance ids. Sent with an Idempotency-Key, so that a lost reply is asked for again (promise I7)."""
        headers = {"Idempotency-Key": self._world.uuid()}
        return await self.endpoints.ask("POST", "/api/v1/vm", list[str], ask, headers=headers)

    async def instances(
        self, *, state: str = "", group: str = "", template: str = "", external_id: str = ""
    ) -> list[Instance]:
        """All, or those that the given filters let through, oldest first."""
        asked = {"state": state, "group": group, "template": template, "external_id": external_id}
        return [
            item.vm if item.vm.instance_id else msgspec.structs.replace(item.vm, instance_id=item.instance_id)
            for item in await self._pages("/api/v1/vm", list[_Wrapper], asked)
        ]

    async def _pages(self, path: str, kind: type[list[T]], filters: Mapping[str, str]) -> list[T]:
        """A whole list, page by page: no single answer grows with the cloud."""
        asked = {"limit": str(_PAGE), **{name: text for name, text in filters.items() if text}}
        found: list[T] = []
        while True:
            page, cursor = await self.endpoints.ask_page("GET", f"{path}?{parse.urlencode(asked)}", kind)
            found += page
            if not cursor:
                return found
            asked["cursor"] = cursor

    async def instance(self, id: str) -> Instance:
        shown = await self.endpoints.ask("GET", f"/api/v1/vm?id={parse.quote(id, safe='')}", Instance)
        return shown if shown.instance_id else msgspec.structs.replace(shown, instance_id=id)

    async def explain(self, id: str) -> Explanation:
        return await self.endpoints.ask("GET", f"/api/v1/vm/explain?id={parse.quote(id, safe='')}", Explanation)

    async def wait_until_settled(
        self, ids: Sequence[str], timeout_s: float, watch: Callable[[Mapping[str, Instance]], None] | None = None
    ) -> dict[str, Instance]:
        """Look until each instance is started or has ended, or the time is over; what was seen last."""
        deadline = time.monotonic() + timeout_s
        seen: dict[str, Instance] = {}
        while True:
            for id in ids:
                if id not in seen or seen[id].instance_state not in SETTLED:
                    seen[id] = await self._look(id)
            if watch is not None:
                watch(seen)
            left_s = deadline - time.monotonic()
            if left_s <= 0 or all(one.instance_state in SETTLED for one in seen.values()):
                return seen
            await asyncio.sleep(min(_POLL_S, left_s))

    async def _look(self, id: str) -> Instance:
        try:
            return await self.instance(id)
        except errors.NotFound:
            return Instance(instance_id=id, instance_state=model.State.TERMINATED)

    async def terminate(self, id: str) -> None:
        await self.endpoints.ask("DELETE", "/api/v1/vm", type(None), {"id": id})

    async def log(self, id: str, stream: str, offset: int) -> Log:
        """A part of stdout or stderr, from `offset` on (negative: from the end), read from the instance's node."""
        query = parse.urlencode({"id": id, "stream": stream, "offset": offset})
        return await self.endpoints.ask("GET", f"/api/v1/vm/log?{query}", Log)

    async def nodes(self, *, state: str = "", group: str = "") -> list[Node]:
        return await self._pages("/api/v1/node", list[Node], {"state": state, "group": group})

    async def drain(self, node_id: str, drain: bool) -> None:
        body = {"node_id": node_id, "drain_mode": drain}
        await self.endpoints.ask("POST", "/api/v1/node/config", type(None), body, repeatable=True)

    async def release(self, node_id: str) -> None:
        """Nothing waits for the node's word any more, after a restore of the store."""
        body = {"node_id": node_id}
        await self.endpoints.ask("POST", "/api/v1/node/release", type(None), body, repeatable=True)

    async def upgrade(self) -> Upgrade:
        return await self.endpoints.ask("GET", "/api/v1/upgrade", Upgrade)

    async def finish_upgrade(self, format: int = 0) -> Upgrade:
        """Raise the store's format (0: to the newest that any controller knows). Raises Refused with what blocks it."""
        return await self.endpoints.ask("POST", "/api/v1/upgrade", Upgrade, {"format": format}, repeatable=True)

    async def templates(self) -> list[Template]:
        return await self.endpoints.ask("GET", "/api/v1/registry/vm", list[Template])

    async def template_id(self, name_or_id: str) -> str:
        """The id of a template named by id or name. Raises Refused when the name is unknown or not unique."""
        found = await self.templates()
        if any(one.id == name_or_id for one in found):
            return name_or_id
        ids = [one.id for one in found if one.name == name_or_id]
        if len(ids) > 1:
            raise errors.Refused(f"several templates are named {name_or_id}; use one of their ids: {', '.join(ids)}")
        if not ids:
            raise errors.Refused(f"there is no template {name_or_id}; `covey template list` shows those there are")
        return ids[0]

    async def node(self, name_or_id: str) -> Node:
        """A node named by id or name. Raises Refused when the name is unknown or not unique."""
        found = await self.nodes()
        same = [one for one in found if name_or_id == one.node_id] or [
            one for one in found if name_or_id == one.node_name
        ]
        if len(same) > 1:
            ids = ", ".join(one.node_id for one in same)
            raise errors.Refused(f"several nodes are named {name_or_id}; use one of their ids: {ids}")
        if not same:
            raise errors.Refused(f"there is no node {name_or_id}; `covey node list` shows those there are")
        return same[0]
