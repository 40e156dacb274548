"""One controller: the composition root. Any number of them on one store are equal, and none keeps state of its own.

    start   listen first: /livez is green and /readyz tells why not, however long the store is away
    live    enter the cloud (format, history nonce, announcement), feed the mirror, run the loops
    stop    answer parked polls, finish what is in flight within the grace, let go of everything

Everything ambient is made here and handed down: the store, the clock, the settings.
"""

import asyncio
import dataclasses
import functools
from collections.abc import Awaitable, Callable, Sequence

import covey
from covey import errors, gate, metrics, observe, serve, server, settings, settings_reader, tls_context
from covey import world as worlds
from covey.client import http
from covey.controller import (
    api_agent,
    api_events,
    api_explain,
    api_health,
    api_log,
    api_node,
    api_registry,
    api_status,
    api_upgrade,
    api_vm,
    backups,
    certificates,
    defrags,
    display,
    etcd_health,
    hosts,
    loop,
    members,
    parking,
    pins,
    presence,
    renewals,
    templates,
    waiting,
)
from covey.controller import metrics as controller_metrics
from covey.decide import deadlines, heartbeat, permission
from covey.store import base, commit, commit_cloud, etcd, etcd_connect, mirror, schema

_LEASE_S = 15  # of this controller's announcement
_RETRY_S = 1.0
_REASONS = 5  # why etcd cannot be used: a busy one may first give no answer at all, and then a refusal
_SLOW_S = 2.0  # a store that has not answered at start by then is worth a line
_LOOK_S = 0.2  # how often health is looked at: parked polls are answered this soon after turning red
_NS = 1_000_000_000

log = observe.log("controller")


class Replica:
    """start → (live by itself) → stop. `store` is etcd unless given; `exchange` carries what it asks of registries.
    `format`: the newest of the store that it writes."""

    def __init__(
        self,
        chosen: settings.Controller,
        world: worlds.World,
        store: base.Store | None = None,
        exchange: http.Exchange | None = None,
        *,
        format: int = schema.FORMAT,
    ) -> None:
        self._chosen = chosen
        self._world = world
        self._id = world.uuid()
        self._store = etcd_connect.connect(chosen, world) if store is None else store
        self._entering = "this controller has not reached the store yet"  # "" once it has entered the cloud
        self._parking = parking.Parking()
        self._tasks: list[asyncio.Task[None]] = []
        self._mirror = mirror.Mirror(self._store, world, self._prove, self._parking.changed)
        self._writer = commit.Writer(self._store, world, who=f"controller {self._id}", newest_format=format)
        self._homes = hosts.Homes(world, self._id)
        self._presence = presence.Presence(world)
        self._waiting = waiting.Waiting(world, self._homes.fleet, self._presence.silent_s)
        self._loop = loop.Loop(
            self._mirror, self._writer, world, me=self._id, queue=self._waiting, spans=_spans(chosen)
        )
        self._backups = self._scheduled()
        self._defrags = self._scheduled_defrags()
        self._members = members.Members(self._store.admin if isinstance(self._store, etcd.Etcd) else None)
        self._renewals = renewals.Renewals(self._store, world)
        remembered = pins.Pins(self._writer, self._mirror.snapshot)
        self._templates = templates.Templates(chosen.local_registries, exchange, chosen.ca_cert, remembered)
        self._registry = next(iter((*chosen.registries, *chosen.local_registries)), "")
        spans = display.Spans(chosen.node_active_timeout_s, chosen.instance_active_timeout_s)
        self._shown = display.Display(self._presence, self._templates, self._waiting.why, spans, self._registry)
        self._health = self._health_api(exchange)
        self._status, routes = self._api()
        requests = controller_metrics.Requests(routes)
        self.server = server.Server(
            routes,
            world=world,
            on_gap=lambda _: self._mirror.doubt(),
            trusted=chosen.trusted_proxies,
            streams=False,
            on_served=requests.served if chosen.metrics is not None else None,
        )
        self.metrics = self._metrics_page(requests)

    def _metrics_page(self, requests: controller_metrics.Requests) -> metrics.Page | None:
        """Figures for Prometheus, if the settings ask for them."""
        wanted = self._chosen.metrics
        if wanted is None:
            return None
        told = controller_metrics.Figures(
            self._store, self._world, requests, self._health.now, lambda: len(self.server.connections)
        )
        return metrics.Page(wanted, told.collect, self._world)

    def _health_api(self, exchange: http.Exchange | None) -> api_health.HealthApi:
        parts = api_health.Parts(
            me=self._id,
            world=self._world,
            mirror=self._mirror,
            writer=self._writer,
            waiting=self._waiting,
            display=self._shown,
            trouble=self._trouble,
            silent_s=self._presence.silent_s,
        )
        chosen = self._chosen
        admin = self._store.admin if isinstance(self._store, etcd.Etcd) else None
        tls = etcd_connect.ssl_context(chosen) if chosen.etcd_tls else None
        interval_s = chosen.etcd_backup_interval_s if self._backups is not None else 0.0
        return api_health.HealthApi(
            parts,
            etcd_health.Members(admin, self._world.boot_ns, tls),
            api_health.Registries(chosen.local_registries, exchange, chosen.ca_cert),
            settings_reader.shown(chosen),
            functools.partial(etcd_health.last_backup, self._store, self._world, interval_s),
            self._certificates().look,
        )

    def _certificates(self) -> certificates.Certificates:
        """Those in sight."""
        chosen = self._chosen
        own = {
            "SERVER_CERT": chosen.tls.cert if chosen.tls is not None else None,
            "CA_CERT": chosen.ca_cert,
            "ETCD_CERT": chosen.etcd_cert,
            "ETCD_CA_CERT": chosen.etcd_ca_cert,
        }
        registries = certificates.servers(chosen.local_registries, "registry")

        def servers() -> dict[str, tuple[str, int]]:
            known = self._store.admin.addresses if chosen.etcd_tls and isinstance(self._store, etcd.Etcd) else []
            return registries | certificates.servers([f"https://{address}" for address in known], "etcd at")

        files = {name: path for name, path in own.items() if path is not None}
        return certificates.Certificates(files, servers, self._world.wall_ns)

    def _scheduled(self) -> backups.Backups | None:
        """Backups, if the settings ask for any and the store is one that can be backed up."""
        folder, interval_s = self._chosen.etcd_backup_dir, self._chosen.etcd_backup_interval_s
        if folder is None or not isinstance(self._store, etcd.Etcd):
            return None
        terms = backups.Terms(folder, interval_s, self._chosen.etcd_backup_keep)
        return backups.Backups(self._store, self._writer, self._world, self._id, terms)

    def _scheduled_defrags(self) -> defrags.Defrags | None:
        interval_s = self._chosen.defrag_db_interval_s
        if not interval_s or not isinstance(self._store, etcd.Etcd):
            return None
        return defrags.Defrags(self._store, self._writer, self._world, self._id, interval_s)

    def _api(self) -> tuple[api_status.StatusApi, Sequence[serve.Route]]:
        registry, shown = self._registry, self._shown
        terms = api_agent.Terms(self._chosen.heartbeat_s, self._chosen.registries)
        status = api_status.StatusApi(
            self._mirror, self._templates, registry, self._trouble, self._lesser_troubles, self._world
        )
        people = [
            *status.routes(),
            *api_vm.InstanceApi(self._mirror, self._writer, self._templates, shown, self._homes).routes(),
            *api_events.EventsApi(self._store, self._world).routes(),
            *api_explain.ExplainApi(self._mirror, self._waiting, shown).routes(),
            *api_log.LogApi(self._mirror, self._writer).routes(),
            *api_node.NodeApi(self._mirror, self._writer, shown).routes(),
            *api_registry.RegistryApi(self._templates).routes(),
            *api_upgrade.UpgradeApi(self._mirror, self._writer).routes(),
        ]
        agents = api_agent.AgentApi(self._mirror, self._writer, self._renewals, terms, self._parking, self._trouble)
        return status, [
            *status.probes(),
            *self._health.routes(),
            *map(self._gated, people),
            *map(_of_agents, agents.routes()),
        ]

    # ---- start and stop --------------------------------------------------------------------------------------------

    async def start(self, listen: bool = True) -> None:
        """Listen, and go about everything else in the background. Raises SettingError when the port is taken,
        or the certificate is none.
        Without `listen`, requests come through `server.hand` alone."""
        if listen:
            tls = None if self._chosen.tls is None else tls_context.of(self._chosen.tls)
            await self.server.start(self._chosen.listen.host, self._chosen.listen.port, tls=tls)
            if self.metrics is not None:
                await self.metrics.start(self._chosen.listen.host)
        else:
            self.server.begin()
        log.info("the controller listens", host=self._chosen.listen.host, port=self.server.port, id=self._id)
        self._tasks = [
            asyncio.create_task(self._live()),
            asyncio.create_task(self._keep("health", self._look_after_health)),
            asyncio.create_task(self._keep("members", self._members.run)),
        ]

    async def stop(self) -> None:
        """Let balancers look away first, answer parked polls, finish what runs within the grace, then end. Harmless
        when repeated."""
        self.server.draining.set()
        self._parking.alarm(True)
        if self._tasks and self._status.watched:
            await asyncio.sleep(self._chosen.shutdown_delay_s)
        broken = await self.server.drain(self._chosen.graceful_shutdown_timeout_s)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._parking.close()
        if self.metrics is not None:
            await self.metrics.stop()
        for part in (self._writer, self._renewals, self._status, self._health, self._templates, self._store):
            await part.close()
        if self._tasks:
            log.info("the controller has stopped", id=self._id, broken_off=broken)

    # ---- live ------------------------------------------------------------------------------------------------------

    async def _live(self) -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(self._keep("mirror", self._mirror.run))
            await self._enter()
            group.create_task(self._keep("announcement", self._announce))
            group.create_task(self._keep("loop", self._loop.run))
            if self._backups is not None:
                group.create_task(self._keep("backups", self._backups.run))
            if self._defrags is not None:
                group.create_task(self._keep("defragmentation", self._defrags.run))

    async def _enter(self) -> None:
        """Take part in the cloud as soon as the store lets us: each reason why it does not is said once, and that it
        does."""
        where = ",".join(self._chosen.etcd_endpoints)
        self._entering = f"etcd at {where} has not answered yet"
        say = functools.partial(log.warning, "etcd has not answered yet; waiting for it", endpoints=where)
        slow = asyncio.get_running_loop().call_later(_SLOW_S, say)  # one request may take much longer
        try:
            await self._enter_when_possible(where)
        finally:
            slow.cancel()

    async def _enter_when_possible(self, where: str) -> None:
        said: set[str] = set()
        while True:
            try:
                cloud = await commit_cloud.start(self._writer)
            except errors.StoreError as error:
                why = await etcd_connect.explain(self._chosen, error)
                self._entering = f"etcd at {where} cannot be used: {why}"
                if why not in said and len(said) < _REASONS:
                    log.error("etcd cannot be used; trying on until it can", endpoints=where, why=why)
                    said.add(why)
                await asyncio.sleep(_RETRY_S)
                continue
            if isinstance(cloud, commit_cloud.Cloud):
                self._entering = ""
                log.info("the controller takes part", cloud=cloud.id, id=self._id)
                return
            newest = self._writer.newest_format
            self._entering = f"the store holds data of format {cloud.found}; this program writes {newest}"
            log.error(self._entering, remedy="run the version of Covey that wrote it, or give an empty etcd")
            await asyncio.Event().wait()

    async def _prove(self, proof: str, before: Sequence[permission.Link]) -> None:
        """Before the mirror is ready again: see whether the store was restored (safety S18). Entering does it too."""
        if proof or not self._entering:
            await commit_cloud.add_nonce(self._writer, proof, before)

    async def _announce(self) -> None:
        """Be listed among the controllers; ends with LeaseLost, and begins again."""
        lease = await self._store.grant(_LEASE_S)
        noun = schema.Controller(
            id=self._id,
            version=covey.__version__,
            format=self._writer.newest_format,
            url=self._chosen.advertise_url,
            started_ns=self._world.wall_ns(),
        )
        await commit_cloud.announce(self._writer, noun, lease)
        try:
            await lease.keep_alive()
        finally:
            if self.server.draining.is_set():
                await lease.revoke()

    async def _keep(self, name: str, body: Callable[[], Awaitable[None]]) -> None:
        """Run a part for ever: it begins again after a fault, and what nobody expected is written down whole."""
        while True:
            try:
                await body()
            except errors.StoreError as error:
                log.warning("a part of the controller begins again", which=name, why=str(error))
            except Exception:
                log.exception("a part of the controller failed unexpectedly and begins again", which=name)
            await asyncio.sleep(_RETRY_S)

    # ---- health ----------------------------------------------------------------------------------------------------

    def _trouble(self) -> str:
        """Why this controller cannot serve now; "" when it can (safety S25)."""
        return self._entering or self._mirror.trouble or self._unknown_format()

    def _unknown_format(self) -> str:
        """The store's format was raised while this program knows only older ones (safety S27)."""
        found = self._mirror.format
        if found == 0 or self._writer.knows(found):
            return ""
        return f"the store holds data of format {found}; this program writes {self._writer.newest_format}"

    def _trouble_of_polls(self) -> str:
        return "this controller is going down" if self.server.draining.is_set() else self._trouble()

    def _lesser_troubles(self) -> list[str]:
        """What is wrong without keeping this controller from serving."""
        broken = self._mirror.broken
        unread = [f"{len(broken)} keys hold values that cannot be read, for example {min(broken)}"] if broken else []
        chores = [part.trouble for part in (self._backups, self._defrags) if part is not None and part.trouble]
        return [*self._members.troubles, *chores, *unread]

    async def _look_after_health(self) -> None:
        """Note which nodes are there, and raise the alarm for parked polls while this controller is red."""
        was = self._entering
        while True:
            trouble = self._trouble_of_polls()
            if bool(trouble) != self._parking.alarmed:
                self._parking.alarm(bool(trouble))
            if bool(trouble) != bool(was):
                log.warning("not ready", why=trouble) if trouble else log.info("ready", before=was)
            was = trouble
            if not trouble:
                self._presence.look(self._mirror.snapshot())
            await asyncio.sleep(_LOOK_S)

    def _gated(self, route: serve.Route) -> serve.Route:
        """A route that answers 503 at once while this controller is red (promise I10)."""

        async def handler(call: serve.Call) -> object:
            trouble = self._trouble()
            if trouble:
                raise errors.Unavailable(trouble)
            return await route.handler(call)

        return dataclasses.replace(route, handler=handler)


def _of_agents(route: serve.Route) -> serve.Route:
    """A route with room of its own: no flood of requests by people makes a node fall silent, nor the other way."""
    return dataclasses.replace(route, lane=gate.Lane.AGENTS)


def _spans(chosen: settings.Controller) -> deadlines.Spans:
    return deadlines.Spans(
        silent_ns=int(heartbeat.silent_after_s(chosen.heartbeat_s) * _NS),
        terminated_ns=int(chosen.instance_time_out_s * _NS),
        unwanted_ns=int(chosen.unknown_vm_threshold_s * _NS),
    )
