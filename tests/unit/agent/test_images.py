"""The image cache against a real registry: verified, shared, resumed, pinned, evicted, and honest about a full disk."""

import asyncio
import json
import os
import uuid
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from backports import zstd

from covey import errors, model
from covey.agent import images
from covey.client import oci, packing, pull
from covey.client import registry as client
from tests.support import registry

BASE = os.urandom(300_000)


class Source:
    """The registry's client, counting and delaying what is fetched."""

    def __init__(self, real: client.Registry) -> None:
        self._real = real
        self.fetched: list[str] = []
        self.gate = asyncio.Event()
        self.gate.set()

    async def manifest(self, repository: str, reference: str) -> tuple[oci.Manifest, model.Digest, bytes]:
        return await self._real.manifest(repository, reference)

    async def content(self, repository: str, digest: str) -> bytes:
        return await self._real.content(repository, digest)

    async def fetch(
        self,
        repository: str,
        digest: str,
        size_bytes: int,
        target: Path,
        *,
        plain: tuple[str, int] | None = None,
        progress: client.Progress | None = None,
        near: pull.Near | None = None,
    ) -> bool:
        self.fetched.append(digest)
        await self.gate.wait()
        return await self._real.fetch(repository, digest, size_bytes, target, plain=plain, progress=progress, near=near)


class Library:
    """A registry with templates, and caches that pull from it."""

    def __init__(self, server: registry.Server, source: Source, root: Path) -> None:
        self._server = server
        self.source = source
        self.root = root

    def cache(self, reserve_bytes: int = 0) -> images.Cache:
        made = images.Cache(self.root, lambda _: self.source, reserve_bytes=reserve_bytes)
        made.from_registries((self._server.url,))
        return made

    async def push_packed(self, plain: bytes, blob: bytes) -> tuple[model.TemplateId, model.Digest]:
        """A template with one packed layer, which is said to hold `plain`."""
        template = model.TemplateId(str(uuid.uuid4()))
        config = json.dumps({"arch": "amd64", "uncompressed": [oci.digest_of(plain)]}).encode()
        for content in (config, blob):
            await self._server.push_blob(f"templates/{template}", content)
        manifest = json.loads(registry.template_manifest(config, blob, name=f"t-{template}", tag="v1"))
        manifest["layers"][0]["mediaType"] += oci.ZSTD
        manifest["layers"][0]["annotations"] = {oci.SIZE: str(len(plain))}
        content = json.dumps(manifest).encode()
        assert (await self._server.put_manifest(f"templates/{template}", "v1", content))[0] == 201
        return template, model.Digest(oci.digest_of(content))

    async def push(self, *layers: bytes) -> tuple[model.TemplateId, model.Digest]:
        template = model.TemplateId(str(uuid.uuid4()))
        config = registry.template_config()
        for content in (config, *layers):
            await self._server.push_blob(f"templates/{template}", content)
        manifest = registry.template_manifest(config, *layers, name=f"t-{template}", tag="v1")
        status, _, body = await self._server.put_manifest(f"templates/{template}", "v1", manifest)
        assert status == 201, body
        return template, model.Digest(oci.digest_of(manifest))


@pytest.fixture
async def library(tmp_path: Path) -> AsyncIterator[Library]:
    async with registry.serving(tmp_path / "registry") as server, registry.talking(server) as talk:
        yield Library(server, Source(talk), tmp_path / "images")


def ignore(_: float) -> None:
    """Progress that nobody wants."""


async def test_a_template_comes_whole_and_read_only(library: Library) -> None:
    template, digest = await library.push(BASE, b"top")
    cache = library.cache()
    image = await cache.get("vm.1", template, digest, ignore)
    assert [Path(path).read_bytes() for path in image.layers] == [BASE, b"top"]
    assert {Path(path).stat().st_mode & 0o777 for path in image.layers} == {0o444}
    assert image.config["arch"] == "amd64"
    assert cache.held() == (digest,)
    assert cache.size_bytes() == len(BASE) + 3
    assert library.root.stat().st_mode & 0o777 == 0o711


async def test_templates_share_layers_and_only_the_new_one_moves(library: Library) -> None:
    cache = library.cache()
    await cache.get("a.1", *await library.push(BASE), ignore)
    await cache.get("b.1", *await library.push(BASE, b"new"), ignore)
    assert library.source.fetched == [oci.digest_of(BASE), oci.digest_of(b"new")]


async def test_vms_that_want_one_layer_at_once_share_one_download(library: Library) -> None:
    template, digest = await library.push(BASE)
    cache = library.cache()
    library.source.gate.clear()
    wants = [asyncio.create_task(cache.get(f"vm.{number}", template, digest, ignore)) for number in range(5)]
    await asyncio.sleep(0.1)
    library.source.gate.set()
    assert len({(await want).layers for want in wants}) == 1
    assert library.source.fetched == [oci.digest_of(BASE)]


async def test_one_that_gives_up_does_not_end_the_others_download(library: Library) -> None:
    template, digest = await library.push(BASE)
    cache = library.cache()
    library.source.gate.clear()
    first, second = (asyncio.create_task(cache.get(f"vm.{number}", template, digest, ignore)) for number in (1, 2))
    await asyncio.sleep(0.1)
    first.cancel()
    library.source.gate.set()
    assert (await second).digest == digest
    assert first.cancelled()


async def test_what_is_there_after_a_restart_is_not_fetched_again(library: Library) -> None:
    template, digest = await library.push(BASE)
    await library.cache().get("vm.1", template, digest, ignore)
    again = library.cache()
    assert again.held() == (digest,)
    await again.get("vm.2", template, digest, ignore)
    assert len(library.source.fetched) == 1


async def test_a_cut_download_goes_on_where_it_stood(library: Library) -> None:
    template, digest = await library.push(BASE)
    cache = library.cache()
    part = library.root / "incoming" / (oci.digest_of(BASE).removeprefix("sha256:") + ".part")
    part.write_bytes(BASE[:200_000])
    done: list[float] = []
    image = await cache.get("vm.1", template, digest, done.append)
    assert Path(image.layers[0]).read_bytes() == BASE


async def test_wrong_bytes_never_become_a_layer(library: Library) -> None:
    template, digest = await library.push(BASE)
    cache = library.cache()
    part = library.root / "incoming" / (oci.digest_of(BASE).removeprefix("sha256:") + ".part")
    part.write_bytes(bytes(len(BASE)))
    image = await cache.get("vm.1", template, digest, ignore)
    assert Path(image.layers[0]).read_bytes() == BASE
    assert list((library.root / "incoming").iterdir()) == []


PLAIN = b"a layer that packs well " * 100_000


async def test_a_packed_layer_is_one_layer_with_its_unpacked_twin(library: Library) -> None:
    cache = library.cache()
    seen: list[float] = []
    image = await cache.get("a.1", *await library.push_packed(PLAIN, zstd.compress(PLAIN)), seen.append)
    assert Path(image.layers[0]).read_bytes() == PLAIN
    assert Path(image.layers[0]).stat().st_mode & 0o777 == 0o444
    assert all(0 <= fraction <= 1 for fraction in seen)
    twin = await cache.get("b.1", *await library.push(PLAIN), ignore)
    assert twin.layers == image.layers
    assert library.source.fetched == [oci.digest_of(zstd.compress(PLAIN))]
    assert cache.size_bytes() == len(PLAIN)
    assert list((library.root / "incoming").iterdir()) == []
    assert len(library.cache().held()) == 2


async def test_a_packed_layer_that_holds_something_else_makes_its_template_unusable(library: Library) -> None:
    cache = library.cache()
    template, digest = await library.push_packed(PLAIN, zstd.compress(BASE))
    with pytest.raises(packing.Damaged, match="push the template again"):
        await cache.get("vm.1", template, digest, ignore)
    assert cache.held() == ()
    assert list((library.root / "layers").iterdir()) == list((library.root / "incoming").iterdir()) == []


async def test_what_was_whole_when_the_agent_was_killed_is_not_fetched_again(library: Library) -> None:
    template, digest = await library.push(BASE)
    cache = library.cache()
    (library.root / "incoming" / oci.digest_of(BASE).removeprefix("sha256:")).write_bytes(BASE)
    sent = len(library.source.fetched)
    image = await cache.get("vm.1", template, digest, ignore)
    assert Path(image.layers[0]).read_bytes() == BASE
    assert len(library.source.fetched) == sent + 1


async def test_an_unknown_template_is_refused(library: Library) -> None:
    cache = library.cache()
    with pytest.raises(errors.NotFound):
        await cache.get("vm.1", model.TemplateId(str(uuid.uuid4())), model.Digest("sha256:" + "0" * 64), ignore)
    assert cache.held() == ()


def keep_free(library: Library, room_bytes: int) -> images.Cache:
    """A cache that may take `room_bytes` more."""
    disk = os.statvfs(library.root.parent)
    return library.cache(reserve_bytes=disk.f_bavail * disk.f_frsize - room_bytes)


async def test_a_full_disk_is_said_and_changes_nothing(library: Library) -> None:
    big = os.urandom(8_000_000)
    template, digest = await library.push(big)
    cache = keep_free(library, -100_000_000)
    with pytest.raises(images.NoRoom, match="the disk of this node is full"):
        await cache.get("vm.1", template, digest, ignore)
    assert cache.held() == () and not library.source.fetched


async def test_least_used_goes_first_and_what_is_in_use_stays(library: Library) -> None:
    cache = library.cache()
    used, old, young = [await library.push(os.urandom(100_000)) for _ in range(3)]
    for number, (holder, pushed) in enumerate((("used.1", used), ("old.1", old), ("young.1", young))):
        await cache.get(holder, *pushed, ignore)
        os.utime(library.root / "manifests" / f"{pushed[1].removeprefix('sha256:')}.json", (number, number))
    cache.release("old.1")
    cache.release("young.1")
    evictions = iter(cache._evictions())
    next(evictions)()
    assert set(cache.held()) == {used[1], young[1]}
    next(evictions)()
    assert cache.held() == (used[1],)
    assert next(evictions, None) is None
    assert len(list((library.root / "layers").iterdir())) == 1


async def test_a_shared_layer_outlives_the_eviction_of_one_of_its_templates(library: Library) -> None:
    cache = library.cache()
    one, two = await library.push(BASE), await library.push(BASE, b"more")
    await cache.get("one.1", *one, ignore)
    await cache.get("two.1", *two, ignore)
    cache.release("one.1")
    next(iter(cache._evictions()))()
    assert cache.held() == (two[1],)
    image = await cache.get("two.1", *two, ignore)
    assert Path(image.layers[0]).read_bytes() == BASE


async def test_downloads_that_nobody_waits_for_make_room(library: Library) -> None:
    """Their template was deleted, or their instance was terminated: nobody would ever continue them."""
    template, digest = await library.push(BASE)
    library.cache()
    abandoned = library.root / "incoming" / ("0" * 64 + ".part")
    with abandoned.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, 256 << 20)
    await keep_free(library, -100_000_000).get("vm.1", template, digest, ignore)
    assert not abandoned.exists()


@pytest.mark.parametrize(
    "config", [b'{"arch":"amd64","x":' + b"[" * 100_000, b'{"arch":"amd64","vm":{"name":"\xff"}}', b"[]"], ids=repr
)
def test_a_configuration_that_cannot_be_read_is_refused(config: bytes) -> None:
    with pytest.raises(errors.Refused, match="config is not right"):
        oci.parse_config(config)


async def test_a_layer_that_does_not_end_is_cut_at_its_size(library: Library, tmp_path: Path) -> None:
    """A registry that sends more than the manifest says must not fill the disk."""
    template, _ = await library.push(BASE)
    target = tmp_path / "layer"
    async with registry.serving(tmp_path / "registry") as server, registry.talking(server, patience_s=0.3) as talk:
        with pytest.raises(errors.RemoteError, match="is longer than the 1000 bytes"):
            await talk.fetch(f"templates/{template}", oci.digest_of(BASE), 1000, target)
    assert not target.exists() and target.with_name("layer.part").stat().st_size <= 1000
