"""One registry server: the composition root. start → (serve by itself) → stop.

A plain asyncio loop is right for this program's plaintext listener: blobs leave by the kernel's sendfile, which uvloop
does not have.
"""

from pathlib import Path

import msgspec

from covey import observe, origin, serve, server, world
from covey.registry import catalog, content_api, disk, disk_care, journal, oci_faults, template_api, upkeep, upload_api

log = observe.log("registry")


class Config(msgspec.Struct, frozen=True, kw_only=True):
    """What a registry must be told. `reserved_bytes` of the disk are never given to uploads."""

    base_path: Path
    host: str = "127.0.0.1"
    port: int = 8089
    grace_s: float = 10.0
    trusted_proxies: tuple[origin.Network, ...] = ()
    reserved_bytes: int = 64 << 20
    deletes: bool = True  # False: tags, manifests, blobs and templates stay
    care: upkeep.Settings = upkeep.Settings()
    fsync: bool = True  # False is for benchmarks: a crash may then lose what was acknowledged


class Registry:
    """A registry that listens. Any number of them may share one `base_path`."""

    def __init__(self, config: Config, world: world.World) -> None:
        self._config = config
        self._blobs = disk.Disk(config.base_path, world, reserved_bytes=config.reserved_bytes, fsync=config.fsync)
        self._logs = journal.Journal(config.base_path, world, fsync=config.fsync)
        self.catalog = catalog.Catalog(self._blobs, self._logs, world, deletes=config.deletes)
        self._care = disk_care.DiskCare(config.base_path, world, fsync=config.fsync)
        self.upkeep = upkeep.Upkeep(self.catalog, self._care, self._care, world, config.care)
        apis = (
            content_api.ContentApi(self.catalog),
            upload_api.UploadApi(self.catalog),
            template_api.TemplateApi(self.catalog, self.upkeep),
        )
        self._server = server.Server(
            [route for api in apis for route in api.routes()],
            world=world,
            error_bodies={"/v2/": oci_faults.error_body},
            trusted=config.trusted_proxies,
            read_ahead_bytes=serve.MIB,
        )

    async def start(self) -> None:
        """Listen. Raises SettingError when the address is taken."""
        await self.upkeep.start()
        await self._server.start(self._config.host, self._config.port)
        log.info("the registry listens", host=self._server.host, port=self.port, base=str(self._config.base_path))

    @property
    def port(self) -> int:
        return self._server.port

    async def stop(self) -> int:
        """Drain within the grace and close; how many requests had to be broken off."""
        broken = await self._server.drain(self._config.grace_s)
        await self.upkeep.stop()
        self._blobs.close()
        self._logs.close()
        self._care.close()
        log.info("the registry has stopped", broken=broken)
        return broken
