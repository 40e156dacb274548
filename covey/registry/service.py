"""One registry process: the composition root. start → (serve by itself) → stop.

A plain asyncio loop is right for a plaintext listener: blobs leave by the kernel's sendfile, which uvloop does not
have. A TLS listener belongs on uvloop: there is no sendfile through TLS, and asyncio's substitute reads 16 KiB at a
time (cpython issue 152074). Several processes of one server are `workers`' business.
"""

import asyncio
import contextlib
import os
import socket
from collections.abc import Mapping
from pathlib import Path

import msgspec

from covey import errors, observe, origin, serve, server, settings, tls_context, world
from covey.registry import (
    blobs,
    catalog,
    content_api,
    metrics,
    oci_faults,
    reign,
    replica,
    replica_disk,
    role,
    s3_bucket,
    s3_join,
    storage,
    tally,
    template_api,
    upkeep,
    upload_api,
)

log = observe.log("registry")

_PROCESSES = 4
_COUNT_S = 1.0
_AHEAD_S = 1.0  # so long the first client waits for names that are being read: ten thousand tags on a disk take a third


class Config(msgspec.Struct, frozen=True, kw_only=True):
    """What a registry must be told. `reserved_bytes` of the disk are never given to uploads."""

    base_path: Path
    bucket: s3_bucket.Config | None = None  # None: below `base_path`
    host: str = "127.0.0.1"
    port: int = 8089
    tls: settings.Tls | None = None  # None: plain HTTP
    ca_cert: Path | None = None  # believed where peers are reached by https
    metrics: settings.Metrics | None = None
    workers: int = 1
    grace_s: float = 10.0
    trusted_proxies: tuple[origin.Network, ...] = ()
    reserved_bytes: int = 64 << 20
    replicas: settings.Replicas | None = None  # None: no other server has a disk of its own
    follows: bool = True  # of several processes one does
    deletes: bool = True  # False: tags, manifests, blobs and templates stay
    care: upkeep.Settings = upkeep.Settings()
    fsync: bool = True  # False is for benchmarks: a crash may then lose what was acknowledged


def configured(chosen: settings.Registry) -> Config:
    """As the program's settings say."""
    bucket = None
    if chosen.s3 is not None:
        bucket = s3_bucket.Config(ca_cert=chosen.ca_cert, **msgspec.structs.asdict(chosen.s3))
    return Config(
        base_path=chosen.base_path,
        bucket=bucket,
        host=chosen.listen.host,
        port=chosen.listen.port,
        tls=chosen.tls,
        metrics=chosen.metrics,
        workers=chosen.workers or min(_PROCESSES, os.cpu_count() or 1),
        grace_s=chosen.graceful_shutdown_timeout_s,
        trusted_proxies=chosen.trusted_proxies,
        deletes=chosen.registry_deletes,
        reserved_bytes=chosen.reserved_mib << 20,
        care=upkeep.of(chosen),
        replicas=chosen.replicas,
        ca_cert=chosen.ca_cert,
    )


def storage_of(config: Config, environ: Mapping[str, str], world: world.World) -> storage.Storage:
    """Raises SettingError when it cannot hold a registry."""
    if config.bucket is not None:
        return storage.in_bucket(config.bucket, environ, world)
    return storage.on_disk(
        config.base_path,
        world,
        reserved_bytes=config.reserved_bytes,
        fsync=config.fsync,
        replica=config.replicas is not None,
    )


def onlooker(config: Config) -> Config:
    """For a process that serves, or tells figures, and leaves the care of the storage to another one."""
    idle = msgspec.structs.replace(config.care, collect_every_s=0.0, scrub_every_s=0.0, heal_from=())
    return msgspec.structs.replace(config, care=idle, follows=False)


class Registry:
    """A registry that listens. Any number of them may share one storage. `shared` and `counts` come from a supervisor
    of several processes; without one this process listens and tells its figures by itself."""

    def __init__(
        self,
        config: Config,
        world: world.World,
        environ: Mapping[str, str] = {},
        *,
        shared: socket.socket | None = None,
        counts: tally.Tally | None = None,
    ) -> None:
        self._config = config
        self._storage = storage_of(config, environ, world)
        self._shared = shared
        self._counts = counts if counts is not None else tally.Tally(1)
        held = self._storage.replica
        self.reign = _reign(config, self._storage.logs, world)
        self.role = role.Alone() if self.reign is None else self.reign.role
        self.catalog = catalog.Catalog(
            self._storage.content,
            self._storage.logs,
            world,
            deletes=config.deletes,
            role=self.role,
            eras=None if held is None else held.eras,
        )
        self.replica = self._replica(config, held, world)
        self.upkeep = upkeep.Upkeep(
            self.catalog, self._storage.care, self._storage.log_care, world, config.care, held=held
        )
        absent = None if self.replica is None else self.replica.on_demand.blob
        smallest = 0 if config.bucket is None else s3_join.LEAST_BYTES
        self._uploads = upload_api.UploadApi(self.catalog, chunk_min_bytes=smallest)
        apis = (
            content_api.ContentApi(self.catalog, absent),
            self._uploads,
            template_api.TemplateApi(self.catalog, self.upkeep),
        )
        routes = [route for api in apis for route in api.routes()]
        self._server = server.Server(
            self._of_replica(routes),
            world=world,
            error_bodies={"/v2/": oci_faults.error_body},
            trusted=config.trusted_proxies,
            read_ahead_bytes=serve.MIB,
            on_served=self._counts.served,
        )
        self._counting: asyncio.TimerHandle | None = None
        self._warming: asyncio.Task[None] | None = None
        self.metrics: metrics.Metrics | None = None
        if config.metrics is not None and shared is None:
            self.metrics = metrics.Metrics(config.metrics, self._counts, lambda: self.upkeep.figures, world)

    def _replica(
        self, config: Config, held: replica_disk.ReplicaDisk | None, world: world.World
    ) -> replica.Replica | None:
        chosen = config.replicas
        if chosen is None or held is None:
            return None
        return replica.Replica(
            chosen.own_url,
            chosen.peers,
            chosen.registry_peer_secret,
            self.role.view,
            self.role.heard,
            self.catalog,
            self._storage,
            held,
            world,
            follows=config.follows,
            ca_cert=config.ca_cert,
        )

    def _of_replica(self, routes: list[serve.Route]) -> list[serve.Route]:
        """The routes of a server that has peers, if it has any."""
        if self.replica is None or self.reign is None:
            return routes
        known = self.replica
        care = self._storage.log_care
        self.reign.join(self.catalog, known.others, known.heads, known.copying, care, campaigns=self._config.follows)
        if known.follower is not None:
            known.follower.kept = self.reign.kept
        return self.reign.routes(known.routes(routes))

    def _count_connections(self) -> None:
        self._counts.put(tally.Count.CONNECTIONS, self._server.open)
        self._counting = asyncio.get_running_loop().call_later(_COUNT_S, self._count_connections)

    async def start(self) -> None:
        """Listen. Raises SettingError when the address is taken."""
        config = self._config
        tls = None if config.tls is None else tls_context.of(config.tls)
        await self._storage.open()
        self._warming = asyncio.create_task(self._warm())
        await self.upkeep.start()
        if self.reign is not None:
            await self.reign.start()
        if self.replica is not None:
            await self.replica.start()
        await asyncio.wait({self._warming}, timeout=_AHEAD_S)
        rank = self._counts.mine if tls is None else 0
        await self._server.start(
            config.host, config.port, tls=tls, shared=self._shared, rank=rank, busy=lambda: self._uploads.writing
        )
        if self.metrics is not None:
            await self.metrics.start(config.host)
        self._counts.put(tally.Count.SERVING, os.getpid())
        self._count_connections()
        log.info(
            "the registry listens", host=config.host, port=self.port, tls=tls is not None, base=self._storage.shown
        )

    async def _warm(self) -> None:
        """What stands in the way, the list will tell."""
        with contextlib.suppress(OSError, errors.CoveyError):
            await self.catalog.warm()

    @property
    def port(self) -> int:
        return self._server.port

    async def stop(self) -> int:
        """Drain within the grace and close; how many requests had to be broken off."""
        broken = await self._server.drain(self._config.grace_s)
        if self.metrics is not None:
            await self.metrics.stop()
        await self.upkeep.stop()
        if self.replica is not None:
            await self.replica.stop()
        if self.reign is not None:
            await self.reign.stop()
        if self._counting is not None:
            self._counting.cancel()
        if self._warming is not None:
            self._warming.cancel()
            await asyncio.gather(self._warming, return_exceptions=True)
        self._storage.close()
        self._counts.put(tally.Count.SERVING, 0)
        self._counts.put(tally.Count.CONNECTIONS, 0)
        self._counts.close()
        log.info("the registry has stopped", broken=broken)
        return broken


def _reign(config: Config, logs: blobs.Logs, world: world.World) -> reign.Reign | None:
    if config.replicas is None:
        return None
    return reign.Reign(config.replicas, config.base_path, logs, world, fsync=config.fsync, ca_cert=config.ca_cert)
