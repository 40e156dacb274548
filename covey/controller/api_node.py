"""/api/v1/node and /api/v1/group (docs/reference/api.md)."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import msgspec
from aiohttp import web

from covey import answer, errors, model, serve
from covey.controller import display, listing, views
from covey.store import commit, commit_adopt, commit_nodes, mirror, view

_NAME_LIMIT = 255
_PARAMETERS = frozenset(("state", "group", "limit", "cursor"))


class NodeConfig(msgspec.Struct, kw_only=True):
    """POST /api/v1/node/config. Fields that are absent or null stay as they are; 0 and "" mean the host's own."""

    node_id: str = ""
    max_vm_count: int | None = None
    name: str | None = None
    host: str | None = None
    capacity_mode: model.CapacityMode | None = None
    vcpu_override: int | None = None
    ram_override: int | None = None
    drain_mode: bool | None = None
    disable_central_logging: bool | None = None


class NodeRemoval(msgspec.Struct, kw_only=True):
    """DELETE /api/v1/node."""

    node_id: str = ""


class NodeRelease(msgspec.Struct, kw_only=True):
    """POST /api/v1/node/release."""

    node_id: str = ""


class NodeApi:
    def __init__(self, mirror: mirror.Mirror, writer: commit.Writer, display: display.Display) -> None:
        self._mirror = mirror
        self._writer = writer
        self._display = display

    def routes(self) -> Sequence[serve.Route]:
        return [
            serve.Route("GET", "/api/v1/node", self.get),
            serve.Route("POST", "/api/v1/node/config", self.configure),
            serve.Route("POST", "/api/v1/node/release", self.release),
            serve.Route("DELETE", "/api/v1/node", self.remove),
            serve.Route("GET", "/api/v1/group", self.groups),
        ]

    async def get(self, call: serve.Call) -> object:
        """Always a list, also for one node."""
        id = call.query.get("id")
        snapshot = await self._mirror.fresh()
        shown = self._display.of(snapshot)
        if id is not None:
            kept = snapshot.node(id)
            if kept is None:
                raise errors.NotFound("Not found")
            return [views.node(snapshot, kept, shown)]
        asked = None if _PARAMETERS.isdisjoint(call.query) else _query(call.query)
        async with self._display.alone():
            found, cursor = listing.page(
                (kept for kept in snapshot.nodes() if asked is None or _matches(kept.noun, asked, shown)),
                lambda kept: (kept.noun.created_ns, kept.noun.id),
                0 if asked is None else asked.limit,
                None if asked is None else asked.after,
            )
            nodes = [views.node(snapshot, kept, shown) for kept in found]
        return web.Response(body=answer.envelope("OK", body=nodes), headers=listing.headers(cursor))

    async def groups(self, _call: serve.Call) -> Sequence[views.Group]:
        """The groups that nodes carry; they cannot be made through the API yet."""
        snapshot = await self._mirror.fresh()
        names = {group for kept in snapshot.nodes() for group in kept.noun.groups}
        return [views.Group(id=name, name=name) for name in sorted(names)]

    async def configure(self, call: serve.Call) -> None:
        wanted = await call.json(NodeConfig)
        changes = _changes(wanted)
        snapshot = await self._known(wanted.node_id)
        call.still_fresh()
        outcome = await commit_nodes.configure(
            self._writer, snapshot, model.NodeId(wanted.node_id), changes, _who(call), call.until_ns
        )
        if isinstance(outcome, commit.Missing):
            raise errors.NotFound("Not found")

    async def remove(self, call: serve.Call) -> None:
        """Its VMs go to Error; what runs there is destroyed when it comes back (safety S12). OK when repeated."""
        node = model.NodeId((await call.json(NodeRemoval)).node_id)
        if not node:
            raise errors.Refused('node_id: missing; send {"node_id": "<id>"}')
        snapshot = await self._mirror.fresh()
        call.still_fresh()
        outcome = await commit_nodes.remove(self._writer, snapshot, node, _who(call), call.until_ns)
        if isinstance(outcome, commit.Missing) and snapshot.removed(node) is None:
            raise errors.NotFound("Not found")

    async def release(self, call: serve.Call) -> None:
        """The node is lost: after a restore of the store nothing waits for its word any more (safety S19). OK when
        repeated, or when nothing waits."""
        wanted = await call.json(NodeRelease)
        snapshot = await self._known(wanted.node_id)
        call.still_fresh()
        node = model.NodeId(wanted.node_id)
        outcome = await commit_adopt.excuse(self._writer, snapshot, node, _who(call), call.until_ns)
        if isinstance(outcome, commit.Missing):
            raise errors.NotFound("Not found")

    async def _known(self, id: str) -> view.Snapshot:
        if not id:
            raise errors.Refused("node_id: missing; name the node to configure")
        snapshot = await self._mirror.fresh()
        if snapshot.node(id) is None:
            raise errors.NotFound("Not found")
        return snapshot


class _Query(NamedTuple):
    """What a list is to show. `limit` 0: all."""

    states: frozenset[model.NodeState]
    group: str
    limit: int
    after: listing.Order | None


def _query(given: Mapping[str, str]) -> _Query:
    """Raises Refused, naming the parameter."""
    listing.check_not_empty(given)
    return _Query(
        states=frozenset(listing.chosen(given.get("state", ""), "state", model.NodeState)),
        group=given.get("group", ""),
        limit=listing.limit(given.get("limit")),
        after=listing.after(given.get("cursor")),
    )


def _matches(node: model.Node, asked: _Query, shown: views.Shown) -> bool:
    return (not asked.group or asked.group in node.groups) and (
        not asked.states or views.node_state(node, shown) in asked.states
    )


def _who(call: serve.Call) -> str:
    return f"API client {call.client}"


def _changes(wanted: NodeConfig) -> dict[str, Any]:
    """The request's fields by their model names. Raises Refused."""
    for name in ("max_vm_count", "vcpu_override", "ram_override"):
        value = getattr(wanted, name)
        if value is not None and not 0 <= value <= 1 << 20:
            raise errors.Refused(f"{name}: {value} is not between 0 and {1 << 20}")
    for name in ("name", "host"):
        text = getattr(wanted, name) or ""
        if len(text) > _NAME_LIMIT or not text.isprintable():
            raise errors.Refused(f"{name}: at most {_NAME_LIMIT} printable characters")
    logging = wanted.disable_central_logging
    changes = {
        "max_vms": wanted.max_vm_count,
        "name": wanted.name,
        "host": wanted.host,
        "capacity_mode": wanted.capacity_mode,
        "vcpu_override": wanted.vcpu_override,
        "ram_mb_override": wanted.ram_override,
        "drain": wanted.drain_mode,
        "central_logging": None if logging is None else not logging,
    }
    return {name: value for name, value in changes.items() if value is not None}
