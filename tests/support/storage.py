"""A registry's storage without a server, for tests of its care; and time that passes on it.

with storage.opened(tmp_path) as place:
    await place.push("a", "v1", b"layer")
    storage.age(tmp_path, hours=25)               # by the file server's clock everything is older now
    report = await place.collector().run()
"""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from covey import model, world
from covey.client import oci
from covey.decide import garbage
from covey.registry import blobs, catalog, disk, disk_care, journal, sweep
from tests.support import registry

CONFIG = b"{}"


class Storage:
    """Everything that serves one folder."""

    def __init__(self, base: Path, chance: world.World | None = None, *, fsync: bool = False) -> None:
        world_ = chance or world.System()
        self.base = base
        self.blobs = disk.Disk(base, world_, fsync=fsync)
        self.logs = journal.Journal(base, world_, fsync=fsync)
        self.care = disk_care.DiskCare(base, world_, fsync=fsync)
        self.catalog = catalog.Catalog(self.blobs, self.logs, world_)

    def close(self) -> None:
        for part in (self.blobs, self.logs, self.care):
            part.close()

    def collector(self, periods: garbage.Periods | None = None) -> sweep.Collector:
        return sweep.Collector(self.catalog, self.care, self.care, periods or garbage.Periods())

    async def store(self, repository: str, content: bytes) -> model.Digest:
        """A blob that the repository may read, as an upload leaves it."""
        digest = (await self.blobs.put(content)).digest
        await self.logs.grant(repository, digest)
        return digest

    async def push(self, repository: str, tag: str, *layers: bytes) -> model.Digest:
        """A plain image."""
        for content in (CONFIG, *layers):
            await self.store(repository, content)
        return await self.enter(repository, tag, *layers)

    async def enter(self, repository: str, tag: str, *layers: bytes) -> model.Digest:
        """Only its manifest."""
        manifest = registry.image_manifest(CONFIG, *layers)
        known, _ = await self.catalog.push(repository, tag, manifest, oci.OCI_MANIFEST, force=False)
        return known.digest

    async def lying(self, place: blobs.Place = blobs.Place.SHELF) -> set[model.Digest]:
        return {held.digest async for held in self.care.held(place)}

    async def pull(self, repository: str, tag: str) -> list[bytes]:
        """The layers of an image."""
        _, content = await self.catalog.manifest(repository, tag)
        found = []
        for layer in oci.parse_manifest(content).layers:
            blob = await self.catalog.granted_blob(repository, model.Digest(layer.digest))
            assert blob is not None, f"{repository}:{tag} has lost {layer.digest}"
            assert blob.path is not None
            found.append(blob.path.read_bytes())
            assert oci.digest_of(found[-1]) == layer.digest
        return found


@contextlib.contextmanager
def opened(base: Path, *, fsync: bool = False) -> Iterator[Storage]:
    place = Storage(base, fsync=fsync)
    try:
        yield place
    finally:
        place.close()


def age(base: Path, *, hours: float = 0.0, seconds: float = 0.0) -> None:
    """Everything that lies there becomes so much older."""
    for folder, names, files in os.walk(base):
        for name in (*names, *files):
            path = os.path.join(folder, name)
            with contextlib.suppress(FileNotFoundError):
                stat = os.stat(path)
                shift_ns = int((hours * 3600 + seconds) * 1e9)
                os.utime(path, ns=(stat.st_atime_ns - shift_ns, stat.st_mtime_ns - shift_ns))
