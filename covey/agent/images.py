"""The local image cache: templates on this node's disk, their layers shared, verified, pinned and evicted.

    images/                       0711: a hypervisor's own user passes through, and lists nothing
    ├── layers/<hex>              a whole, verified layer, 0444, named by its digest; shared by all templates
    ├── incoming/<hex>[.…]        being fetched, or unpacked; continued after a cut or a kill
    ├── papers/<hex>              what other nodes may need of it: see `papers`
    └── manifests/<hex>.json      Kept: a template whose layers are all here; its mtime is its last use

Rules: a layer appears under its name only when whole and verified by digest (promise I8), one that travels packed by
both its digests; one whose content is not what its template says makes the template unusable, which no later try would
mend. Several VMs that want one layer at once share one download, and the layers of a template come two at a time. What
a VM uses is pinned by the VM's name; after a restart the agent pins again from its records. When space is short,
downloads that nobody waits for go first, then layers of no template, then templates by least use; a reserve stays free.
"""

import asyncio
import os
import shutil
from collections.abc import Awaitable, Callable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

from covey import durable, errors, failpoint, model, observe
from covey.agent import hypervisor, neighbours, papers
from covey.client import oci, packing, partial, pull, registry

RESERVE_BYTES = 1 << 30
_AT_ONCE = 2  # layers; each comes in several ranges
_log = observe.log("images")
_ROLES = {oci.KERNEL: "kernel", oci.INITRD: "initrd", oci.NVRAM: "nvram", oci.STATE: "state"}

Progress = Callable[[float], None]  # called with the fraction that is here, 0 to 1


class Source(Protocol):
    """Where templates come from: `client.registry.Registry`, or a fake."""

    async def manifest(self, repository: str, reference: str) -> tuple[oci.Manifest, model.Digest, bytes]: ...

    async def content(self, repository: str, digest: str) -> bytes: ...

    async def fetch(
        self,
        repository: str,
        digest: str,
        size_bytes: int,
        target: Path,
        *,
        plain: tuple[str, int] | None = None,
        progress: registry.Progress | None = None,
        near: pull.Near | None = None,
    ) -> bool: ...


class NoRoom(errors.CoveyError):
    """The template does not fit on this node's disk, even without all that could be evicted."""


class Images(Protocol):
    """What the agent needs of a cache. Holders are VMs' names."""

    async def get(
        self, holder: str, template: model.TemplateId, digest: model.Digest, progress: Progress
    ) -> hypervisor.Image:
        """The template on local disk, pinned for `holder`. Raises NoRoom, OSError (disk full), RemoteError, Refused,
        and `packing.Damaged` when it can never be used."""
        ...

    def pin(self, holder: str, digest: model.Digest) -> None: ...

    def release(self, holder: str) -> None: ...

    def held(self) -> tuple[model.Digest, ...]:
        """Templates that are wholly here, sorted."""
        ...

    def size_bytes(self) -> int: ...

    def free_bytes(self) -> int:
        """What new layers may still take, the reserve left out."""
        ...

    def from_registries(self, urls: tuple[str, ...]) -> None:
        """Where this node pulls from, as the cloud says when it joins."""
        ...


class Layer(model.Noun, frozen=True, kw_only=True):
    """One file of a template. `role` is empty for a disk layer, else what the file is for. `blob`: what it travels as,
    when that is packed."""

    digest: str
    size_bytes: int
    role: str = ""
    blob: str = ""
    blob_bytes: int = 0

    @property
    def room_bytes(self) -> int:
        """What is written while it comes: a packed layer stays until it is unpacked."""
        return self.size_bytes + self.blob_bytes


class Kept(model.Noun, frozen=True, kw_only=True):
    """A template that is wholly here. `papers`: digests of its manifest and its config."""

    digest: model.Digest
    layers: tuple[Layer, ...]
    papers: tuple[str, ...] = ()
    config: dict[str, str | int | bool] = {}


class _Download:
    """One layer on its way, and how many wait for it."""

    def __init__(self, layer: Layer) -> None:
        self.layer = layer
        self.done_bytes = 0
        self.waiting = 0
        self.task: asyncio.Task[None] | None = None

    @property
    def coming_bytes(self) -> int:
        """What the disk has still to hold of it."""
        return max(self.layer.room_bytes - self.done_bytes, 0)


class Cache:
    """The cache on disk. `connect` makes a source from the registries' URLs; `near` knows who else may have layers."""

    def __init__(
        self,
        root: Path,
        connect: Callable[[tuple[str, ...]], Source],
        *,
        reserve_bytes: int = RESERVE_BYTES,
        near: neighbours.Neighbours | None = None,
    ) -> None:
        self._root = root
        self._layers, self._incoming, self._manifests = root / "layers", root / "incoming", root / "manifests"
        self._connect = connect
        self._source: Source | None = None
        self._urls: tuple[str, ...] = ()
        self._reserve_bytes = reserve_bytes
        self._near = near
        self._kept: dict[model.Digest, Kept] = {}
        self._pins: dict[str, model.Digest] = {}
        self._wanted: dict[str, Kept] = {}  # holder -> what it is fetching: not to be evicted
        self._downloads: dict[str, _Download] = {}
        self._load()

    def _load(self) -> None:
        for directory, mode in ((self._root, 0o711), (self._layers, 0o711), (self._incoming, 0o700)):
            directory.mkdir(parents=True, exist_ok=True)
            directory.chmod(mode)
        self._papers = papers.Papers(self._root / "papers")
        self._manifests.mkdir(exist_ok=True)
        durable.sweep(self._manifests)
        for path in self._manifests.glob("*.json"):
            kept = durable.read(path, Kept)
            if kept is not None and all(self._has(layer) for layer in kept.layers):
                self._kept[kept.digest] = kept
            else:
                path.unlink(missing_ok=True)
        self._papers.only(self._used_papers())

    def from_registries(self, urls: tuple[str, ...]) -> None:
        if urls and urls != self._urls:
            self._urls, self._source = urls, self._connect(urls)

    async def get(
        self, holder: str, template: model.TemplateId, digest: model.Digest, progress: Progress
    ) -> hypervisor.Image:
        self._pins[holder] = digest
        kept = self._kept.get(digest)
        if kept is None or not all(self._has(layer) for layer in kept.layers):
            kept = await self._fetch(holder, f"templates/{template}", digest, progress)
        os.utime(self._manifest_path(digest))
        return self._image(kept)

    def pin(self, holder: str, digest: model.Digest) -> None:
        self._pins[holder] = digest

    def release(self, holder: str) -> None:
        self._pins.pop(holder, None)

    def held(self) -> tuple[model.Digest, ...]:
        return tuple(sorted(self._kept))

    def size_bytes(self) -> int:
        return sum({layer.digest: layer.size_bytes for kept in self._kept.values() for layer in kept.layers}.values())

    def free_bytes(self) -> int:
        coming = sum(download.coming_bytes for download in self._downloads.values())
        return shutil.disk_usage(self._root).free - self._reserve_bytes - coming

    # ---- for other nodes -------------------------------------------------------------------------------------------

    def layers_of(self, template: str) -> frozenset[str]:
        """Digests of all layers of a template that is here or comes, as they are here and as they travel, and of its
        papers."""
        known = self._kept.get(model.Digest(template))
        found = known or next((kept for kept in self._wanted.values() if kept.digest == template), None)
        if found is None:
            return frozenset()
        layers = frozenset(digest for layer in found.layers for digest in (layer.digest, layer.blob) if digest)
        return layers.union(found.papers)

    def whole(self, digest: str) -> Path | None:
        """Where a layer is, if it is here: only what is whole and verified has its name. Or a paper."""
        path = self._path(digest)
        if not path.is_file():
            path = self._papers.path(digest)
        return path if path.is_file() else None

    # ---- fetching --------------------------------------------------------------------------------------------------

    async def _fetch(self, holder: str, repository: str, digest: model.Digest, progress: Progress) -> Kept:
        source = self._source
        if source is None:
            raise errors.RemoteError("no registry is known to this node")

        async def as_pushed() -> bytes:
            return (await source.manifest(repository, digest))[2]

        manifest = oci.parse_manifest(await self._paper(digest, digest, as_pushed))
        config = await self._config(source, repository, digest, manifest)
        vm = {**config.vm, "arch": str(config.arch)} if config is not None else {}
        found = (digest, *((manifest.config.digest,) if manifest.config is not None else ()))
        kept = Kept(digest=digest, layers=_layers_of(manifest, config), papers=found, config=vm)
        self._wanted[holder] = kept
        try:
            missing = list({layer.digest: layer for layer in kept.layers if not self._has(layer)}.values())
            self._make_room(missing)
            await self._fetch_layers(repository, digest, missing, lambda: progress(self._fraction(kept)))
        finally:
            del self._wanted[holder]
        failpoint.reach("agent.image.whole")
        durable.write(self._manifest_path(digest), kept, mode=0o644)
        self._kept[digest] = kept
        return kept

    async def _config(
        self, source: Source, repository: str, template: model.Digest, manifest: oci.Manifest
    ) -> oci.TemplateConfig | None:
        if manifest.config is None:
            return None
        digest = manifest.config.digest
        content = await self._paper(template, digest, lambda: source.content(repository, digest))
        return oci.parse_config(content)

    async def _paper(self, template: model.Digest, digest: str, fetch: Callable[[], Awaitable[bytes]]) -> bytes:
        """A manifest or a config: the registry's, and when none answers soon, what a neighbour has; its digest is
        known, so it is the same."""
        asking = asyncio.ensure_future(fetch())
        try:
            content = await (asking if self._near is None else self._sooner(self._near, asking, template, digest))
        finally:
            asking.cancel()
            await asyncio.gather(asking, return_exceptions=True)
        self._papers.keep(digest, content)
        return content

    async def _sooner(
        self, near: neighbours.Neighbours, asking: asyncio.Future[bytes], template: model.Digest, digest: str
    ) -> bytes:
        async def of_a_neighbour() -> bytes:
            if (found := await near.paper(template, digest)) is None:
                raise errors.NotFound(f"no neighbour has {digest}")
            return found

        while not (await asyncio.wait({asking}, timeout=near.limits.paper_s))[0]:
            helping = asyncio.create_task(of_a_neighbour())
            try:
                await asyncio.wait({asking, helping}, return_when=asyncio.FIRST_COMPLETED)
                if not asking.done() and helping.exception() is None:
                    return helping.result()
            finally:
                helping.cancel()
                await asyncio.gather(helping, return_exceptions=True)
        try:
            return await asking
        except errors.RemoteError as error:
            try:
                return await of_a_neighbour()
            except errors.NotFound:
                raise error from None

    async def _fetch_layers(
        self, repository: str, template: model.Digest, layers: Sequence[Layer], moved: Callable[[], None]
    ) -> None:
        limit = asyncio.Semaphore(_AT_ONCE)

        async def one(layer: Layer) -> None:
            async with limit:
                await self._fetch_layer(repository, template, layer, moved)

        try:
            async with asyncio.TaskGroup() as group:
                for layer in layers:
                    group.create_task(one(layer))
        except ExceptionGroup as faults:
            raise faults.exceptions[0] from None

    async def _fetch_layer(
        self, repository: str, template: model.Digest, layer: Layer, moved: Callable[[], None]
    ) -> None:
        """Join the layer's download, or begin it; the last one to leave an unfinished download ends it."""
        if self._has(layer):
            return
        download = self._downloads.get(layer.digest)
        if download is None:
            download = self._downloads[layer.digest] = _Download(layer)
            download.task = asyncio.create_task(self._download(repository, template, layer, download))
        task = download.task
        assert task is not None  # noqa: S101 (set where the download was made)
        download.waiting += 1
        try:
            while not task.done():
                await asyncio.wait({task}, timeout=0.5)
                moved()
            task.result()
        finally:
            download.waiting -= 1
            if download.waiting == 0 and not task.done():
                task.cancel()
                await asyncio.wait({task})

    async def _download(self, repository: str, template: model.Digest, layer: Layer, download: _Download) -> None:
        incoming = self._incoming / _hex(layer.digest)
        try:
            if not await self._from_holders(repository, template, layer, download, incoming):
                blob, size, plain = layer.digest, layer.size_bytes, None
                if layer.blob:
                    blob, size, plain = layer.blob, layer.blob_bytes, (layer.digest, layer.size_bytes)
                await self._blob(repository, template, blob, size, incoming, download, plain=plain)
            failpoint.reach("agent.image.layer")
            await asyncio.to_thread(self._reveal, incoming, self._path(layer.digest))
            _log.info("a layer arrived", digest=layer.digest, size_bytes=layer.size_bytes)
        finally:
            del self._downloads[layer.digest]

    async def _from_holders(
        self, repository: str, template: model.Digest, layer: Layer, download: _Download, incoming: Path
    ) -> bool:
        """A layer that travels packed is unpacked on nodes that have it, and the registry has no such blob: it comes
        from them alone, or not so."""
        if self._near is None or not layer.blob or not await self._near.has(template, layer.digest):
            return False
        try:
            await self._blob(repository, template, layer.digest, layer.size_bytes, incoming, download, alone=True)
        except errors.NotFound:
            return False
        return True

    async def _blob(
        self,
        repository: str,
        template: model.Digest,
        digest: str,
        size_bytes: int,
        incoming: Path,
        download: _Download,
        *,
        plain: tuple[str, int] | None = None,
        alone: bool = False,
    ) -> None:
        def moved(done_bytes: int) -> None:
            download.done_bytes = done_bytes

        if self._source is None:
            raise errors.RemoteError("no registry is known to this node")
        if self._near is None:
            await self._source.fetch(repository, digest, size_bytes, incoming, plain=plain, progress=moved)
            return
        with self._near.download(template, digest, alone=alone) as near:
            await self._source.fetch(repository, digest, size_bytes, incoming, plain=plain, progress=moved, near=near)

    def _reveal(self, incoming: Path, path: Path) -> None:
        incoming.chmod(0o444)
        incoming.rename(path)
        durable.sync_dir(self._layers)

    def _fraction(self, kept: Kept) -> float:
        total = sum(layer.room_bytes for layer in kept.layers) or 1
        here = sum(layer.room_bytes for layer in kept.layers if self._has(layer))
        coming = sum(
            self._downloads[layer.digest].done_bytes for layer in kept.layers if layer.digest in self._downloads
        )
        return min((here + coming) / total, 1.0)

    # ---- room ------------------------------------------------------------------------------------------------------

    def _make_room(self, missing: list[Layer]) -> None:
        """Evict until `missing` fits beside the reserve and what is on its way. Raises NoRoom, and evicts nothing
        then that a smaller wish would not have cost."""
        need = sum(
            layer.room_bytes - self._partial_bytes(layer) for layer in missing if layer.digest not in self._downloads
        )
        for evict in self._evictions():
            if self.free_bytes() >= need:
                return
            evict()
        free = self.free_bytes()
        if free < need:
            raise NoRoom(f"the disk of this node is full: the template needs {need} bytes, {max(free, 0)} are free")

    def _evictions(self) -> Iterator[Callable[[], None]]:
        """What may go, least useful first."""
        coming = {_hex(digest) for digest in (*self._downloads, *self._wanted_digests())}
        for path in sorted(self._incoming.iterdir()):
            if path.name.partition(".")[0] not in coming:  # nobody waits for it any more
                yield lambda path=path: durable.discard(path)  # type: ignore[misc]
        loose = {path.name for path in self._layers.iterdir()} - self._used_layers(self._kept)
        for name in sorted(loose):
            yield (self._layers / name).unlink
        in_use = set(self._pins.values())
        idle = [digest for digest in self._kept if digest not in in_use]
        for digest in sorted(idle, key=lambda digest: self._manifest_path(digest).stat().st_mtime_ns):
            yield lambda digest=digest: self._evict(digest)  # type: ignore[misc]

    def _evict(self, digest: model.Digest) -> None:
        kept = self._kept.pop(digest)
        durable.remove(self._manifest_path(digest))
        for name in {_hex(layer.digest) for layer in kept.layers} - self._used_layers(self._kept):
            (self._layers / name).unlink(missing_ok=True)
        self._papers.only(self._used_papers())
        _log.info("a template was evicted to make room", digest=digest)

    def _used_papers(self) -> set[str]:
        return {digest for kept in (*self._kept.values(), *self._wanted.values()) for digest in kept.papers}

    def _used_layers(self, kept: dict[model.Digest, Kept]) -> set[str]:
        """Names of the layers that a whole template or a fetch under way needs."""
        used = {_hex(layer.digest) for template in kept.values() for layer in template.layers}
        return used | {_hex(digest) for digest in self._wanted_digests()}

    def _wanted_digests(self) -> Iterator[str]:
        """Layers of the fetches under way."""
        for wanted in self._wanted.values():
            yield from (layer.digest for layer in wanted.layers)

    # ---- paths -----------------------------------------------------------------------------------------------------

    def _image(self, kept: Kept) -> hypervisor.Image:
        return hypervisor.Image(
            digest=kept.digest,
            layers=tuple(str(self._path(layer.digest)) for layer in kept.layers if not layer.role),
            config=kept.config,
            files={layer.role: str(self._path(layer.digest)) for layer in kept.layers if layer.role},
        )

    def _has(self, layer: Layer) -> bool:
        try:
            return self._path(layer.digest).stat().st_size == layer.size_bytes
        except FileNotFoundError:
            return False

    def _partial_bytes(self, layer: Layer) -> int:
        return partial.allocated_bytes(self._incoming / (_hex(layer.digest) + ".part"))

    def _path(self, digest: str) -> Path:
        return self._layers / _hex(digest)

    def _manifest_path(self, digest: str) -> Path:
        return self._manifests / f"{_hex(digest)}.json"


def _hex(digest: str) -> str:
    if not oci.valid_digest(digest):
        raise errors.Refused(f"{digest!r} is no digest")
    return digest.partition(":")[2]


def _layers_of(manifest: oci.Manifest, config: oci.TemplateConfig | None) -> tuple[Layer, ...]:
    """Raises Damaged when the template does not say what a packed layer becomes."""
    try:
        found = oci.layers_of(manifest, config or oci.TemplateConfig(arch=model.Arch.AMD64))
    except errors.Refused as error:
        raise packing.Damaged(str(error)) from error
    return tuple(
        Layer(
            digest=layer.digest,
            size_bytes=layer.size,
            role=_role(layer),
            blob=layer.blob if layer.packed else "",
            blob_bytes=layer.blob_size if layer.packed else 0,
        )
        for layer in found
    )


def _role(layer: oci.Layer) -> str:
    if layer.kind.startswith(oci.DISK_PREFIX):
        return ""
    return _ROLES.get(layer.kind) or layer.title or layer.digest
