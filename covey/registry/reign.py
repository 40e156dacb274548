"""The push role of one server, put together: who holds it, how it changes hands, and what servers ask each other of it.

    POST /replica/v1/promote {force}           make this server the holder (`covey registry promote`)
    POST /replica/v1/role    {term, holder}    who holds the role from now on; the answer is that it is written down
    GET  /replica/v1/has?log=&number=&entry=   whether this server has that entry and all that it needs

All three are for those who know the set's secret. Every process of a server answers; one of them campaigns.
"""

import asyncio
import contextlib
import hashlib
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path

import msgspec

from covey import errors, model, observe, serve, settings, world
from covey.client import http, line
from covey.registry import (
    accepted,
    blobs,
    campaign,
    catalog,
    copying,
    elected,
    follower,
    forward,
    heads,
    peers,
    role,
    uploaded,
    views,
)
from covey.store import base as store_base
from covey.store import etcd_connect

log = observe.log("registry")

_ASK_S = 5.0
_PROMOTE_S = 110.0
_COPIES_S = 8.0  # less than a request may take
_LOOK_S = 0.05
_HEAR_S = 1.0


class Promotion(model.Noun, frozen=True, kw_only=True):
    force: bool = False


class Told(model.Noun, frozen=True, kw_only=True):
    """Who holds the role, in which term."""

    term: int
    holder: str


class Asking:
    """Questions to the other servers of the set, over HTTP. `close` at the end."""

    def __init__(self, urls: Sequence[str], secret: str, *, ca_cert: Path | None = None) -> None:
        self.urls = tuple(urls)
        self._headers = {peers.SECRET_HEADER: secret}
        self._sockets = http.Sockets(ca_cert=ca_cert)

    async def close(self) -> None:
        await self._sockets.close()

    async def ask(self, url: str, method: str, path: str, body: object = None, limit_s: float = _ASK_S) -> http.Reply:
        data = None if body is None else msgspec.json.encode(body)
        reply = await self._sockets.send(url, method, path, data, self._headers, limit_s)
        if reply.status != 200:
            raise errors.RemoteError(f"{url}: HTTP {reply.status} for {path.partition('?')[0]}", reply.status)
        return reply

    async def has(self, url: str, entry: str, name: str, number: int, wait_s: float) -> bool:
        query = line.query(log=name, number=str(number), entry=entry, wait=f"{wait_s:g}")
        try:
            reply = await self.ask(url, "GET", f"/replica/v1/has?{query}", limit_s=wait_s + _ASK_S)
        except errors.RemoteError:
            return False
        return bool(msgspec.json.decode(reply.body).get("body"))


class Confirmed:
    """`role.Copies`: other servers are asked until enough have it."""

    def __init__(self, asking: Asking, logs: blobs.Logs, copies: int) -> None:
        self._asking = asking
        self._logs = logs
        self._copies = copies

    async def wait(self, log: str, number: int) -> None:
        if number < 0:
            return
        entry = _mark((await self._logs.read({log: number}))[log][0])
        left = self._copies - 1
        asked = [asyncio.create_task(self._asking.has(url, entry, log, number, _COPIES_S)) for url in self._asking.urls]
        try:
            async with asyncio.timeout(_COPIES_S):
                for answer in asyncio.as_completed(asked):
                    left -= await answer
                    if left <= 0:
                        return
        except TimeoutError:
            pass
        finally:
            for task in asked:
                task.cancel()
            await asyncio.gather(*asked, return_exceptions=True)
        raise errors.Unsure(
            f"it is entered here, but fewer than {self._copies} servers have it yet (REGISTRY_PUSH_COPIES):"
            " send it again"
        )


def _mark(entry: bytes) -> str:
    return hashlib.sha256(entry).hexdigest()


class _Hearing:
    """`role.Others`"""

    def __init__(self, asking: Asking, heard: Callable[[int, str], Awaitable[None]]) -> None:
        self._asking = asking
        self._heard = heard

    async def hear(self) -> None:
        await asyncio.gather(*(self._one(url) for url in self._asking.urls))

    async def _one(self, url: str) -> None:
        with contextlib.suppress(errors.RemoteError, msgspec.MsgspecError):
            reply = await self._asking.ask(url, "GET", "/replica/v1/word", limit_s=_HEAR_S)
            told = msgspec.json.decode(reply.body, type=peers.Word)
            await self._heard(told.term, told.holder)


class _Others:
    """`campaign.Others`"""

    def __init__(self, asking: Asking, others: Mapping[str, peers.Peer], copies: copying.Copying) -> None:
        self.urls = asking.urls
        self._asking = asking
        self._others = others
        self._copying = copies

    async def inventory(self, url: str) -> peers.Inventory:
        return await self._others[url].inventory()

    async def tell(self, url: str, term: int, holder: str) -> None:
        await self._asking.ask(url, "POST", "/replica/v1/role", Told(term=term, holder=holder))

    async def copy(self, url: str, name: str, past: peers.Head | None = None) -> bool:
        return await self._copying.copy(self._others[url], name, past=past)


class Reign:
    """start → (works by itself) → stop. Made in two steps: the catalog needs `role`, `join` needs what the catalog is
    needed for."""

    def __init__(
        self,
        chosen: settings.Replicas,
        base: Path,
        logs: blobs.Logs,
        world: world.World,
        *,
        fsync: bool = True,
        ca_cert: Path | None = None,
        store: store_base.Store | None = None,
    ) -> None:
        self._chosen = chosen
        self._base = base
        self._fsync = fsync
        self._logs = logs
        self._world = world
        self._ca_cert = ca_cert
        self._asking = Asking(chosen.peers, chosen.registry_peer_secret, ca_cert=ca_cert)
        copies = Confirmed(self._asking, logs, chosen.push_copies) if chosen.push_copies > 1 else None
        self._store = store
        self._elected: elected.Elected | None = None
        self._appointed: role.Appointed | None = None
        self.role: role.Role
        if store is None and chosen.etcd is not None:
            self._store = etcd_connect.connect(chosen.etcd, world)
        if self._store is not None:
            self.role = self._elected = elected.Elected(self._store, chosen.own_url, logs, world, copies)
        else:
            terms = role.Terms(base, world, fsync=fsync)
            self.role = self._appointed = role.Appointed(chosen.own_url, terms, chosen.push_url, world, copies)
            self._appointed.others = _Hearing(self._asking, self._appointed.heard)
        self._campaign: campaign.Campaign | campaign.Appointing | None = None
        self._campaigns = False
        self._running: asyncio.Task[None] | None = None
        self._forward: forward.Forward | None = None
        self._known: catalog.Catalog | None = None

    def join(
        self,
        known: catalog.Catalog,
        others: Mapping[str, peers.Peer],
        standing: heads.Heads,
        copies: copying.Copying,
        care: blobs.LogCare,
        *,
        campaigns: bool,
    ) -> None:
        """`campaigns`: this process is the one of its server that takes the role."""
        left = uploaded.Uploaded(self._base, known, care, fsync=self._fsync)
        own_url = self._chosen.own_url
        self._known = known
        asks = _Others(self._asking, others, copies)
        self._campaigns = campaigns
        if self._elected is not None and self._store is not None:
            self._elected.folds = standing
            self._campaign = campaign.Campaign(
                *(own_url, self._elected, self._store, self._logs, asks, standing, self._world),
                campaigns=campaigns,
                uploads=left,
            )
        elif self._appointed is not None:
            self._campaign = campaign.Appointing(own_url, self._appointed, asks, standing, left.forget)
        secret = self._chosen.registry_peer_secret
        self._forward = forward.Forward(self.role, known, own_url, secret, ca_cert=self._ca_cert)

    def kept(self) -> accepted.Kept:
        """What etcd keeps for servers that lack it; known to the process that campaigns."""
        return self._campaign.kept if isinstance(self._campaign, campaign.Campaign) else accepted.Kept()

    async def start(self) -> None:
        if self._elected is not None:
            await self._elected.start()
        if self._campaigns and self._campaign is not None:
            self._running = asyncio.create_task(self._campaign.run())

    async def stop(self) -> None:
        if self._running is not None:
            self._running.cancel()
            await asyncio.gather(self._running, return_exceptions=True)
        if self._elected is not None:
            await self._elected.stop()
        if self._forward is not None:
            await self._forward.close()
        await self._asking.close()
        if self._store is not None and self._chosen.etcd is not None:
            await self._store.close()

    # ---- requests --------------------------------------------------------------------------------------------------

    def routes(self, routes: Sequence[serve.Route]) -> list[serve.Route]:
        """The routes of a server that may not be the holder, and its own."""
        assert self._forward is not None  # noqa: S101  joined
        secret = self._chosen.registry_peer_secret
        found = self._forward.routes(routes)
        if self._chosen.write_only:
            found = forward.without_pulls(found, secret)
        own = (
            ("POST", "promote", self.promote, 120.0),
            ("POST", "role", self.told, 10.0),
            ("GET", "has", self.has, 30.0),
        )
        return [
            *found,
            *(
                serve.Route(method, f"/replica/v1/{name}", peers.guarded(handler, secret), time_limit_s=limit_s)
                for method, name, handler, limit_s in own
            ),
        ]

    async def promote(self, call: serve.Call) -> object:
        assert self._campaign is not None  # noqa: S101  joined
        await self._campaign.promote(force=(await call.json(Promotion)).force)
        return self.role.view()

    async def told(self, call: serve.Call) -> None:
        told = await call.json(Told)
        if told.holder not in (self._chosen.own_url, *self._chosen.peers):
            raise errors.Refused(f"{told.holder} is none of the set (REGISTRY_PEERS)")
        await self.role.heard(told.term, told.holder)

    async def has(self, call: serve.Call) -> bool:
        name, entry = call.query.get("log", ""), call.query.get("entry", "")
        number, wait_s = int(call.query.get("number", "0")), min(float(call.query.get("wait", "0")), _COPIES_S)
        until_s = time.monotonic() + wait_s
        while not await self._has(name, number, entry):
            if time.monotonic() > until_s or call.draining.is_set():
                return False
            await asyncio.sleep(_LOOK_S)
        return True

    async def _has(self, name: str, number: int, mark: str) -> bool:
        assert self._known is not None  # noqa: S101  joined
        found = (await self._logs.read({name: number}))[name]
        if not found or _mark(found[0]) != mark:
            return False
        if name.startswith("_"):
            return True
        entry = msgspec.json.decode(found[0], type=views.Entry)
        known = (await self._known.repository(name)).manifests.get(entry.digest)
        if known is None:  # it is about no manifest, or about one that is gone since
            return True
        for digest in follower.needs(known):
            if await self._known.blobs.stat(digest) is None:
                return False
        return True


# ---- for commands --------------------------------------------------------------------------------------------------


async def promote(chosen: settings.Registry, url: str, *, force: bool) -> role.View:
    """Make the server at `url` the holder. Raises SettingError, Refused and RemoteError."""
    replicas = chosen.replicas
    if replicas is None:
        raise errors.SettingError("REGISTRY_MODE is not replica or write-only here: run this with a server's settings")
    wanted = url.rstrip("/")
    servers = (replicas.own_url, *replicas.peers)
    if wanted not in servers:
        raise errors.Refused(f"{url} is none of the set: {', '.join(servers)} (REGISTRY_PEERS, REGISTRY_ADVERTISE_URL)")
    asking = Asking(servers, replicas.registry_peer_secret, ca_cert=chosen.ca_cert)
    try:
        reply = await asking.ask(wanted, "POST", "/replica/v1/promote", Promotion(force=force), _PROMOTE_S)
    finally:
        await asking.close()
    answered = msgspec.json.decode(reply.body, type=_Answered)
    if answered.status != "OK" or answered.body is None:
        raise errors.Refused(answered.message)
    return answered.body


class _Answered(msgspec.Struct):
    status: str
    message: str = ""
    body: role.View | None = None
