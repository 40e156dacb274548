"""A blob taken away while a manifest that needs it comes in: whoever is second sees the first (promise I8)."""

import contextlib
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from covey import model, world
from covey.client import oci
from covey.registry import catalog, disk, journal
from tests.conformance import workflow
from tests.support import registry

CONFIG, LAYER = b"{}", b"layer"
DIGEST = oci.digest_of(LAYER)
Hook = Callable[[], Awaitable[None]]


async def nothing() -> None:
    pass


class Interrupted(journal.Journal):
    """A journal in which something happens at a chosen moment, once."""

    before_append: Hook = staticmethod(nothing)
    before_withdraw: Hook = staticmethod(nothing)
    after_withdraw: Hook = staticmethod(nothing)

    async def append(
        self, log: str, number: int, entry: bytes, check: Callable[[], Awaitable[None]] | None = None
    ) -> bool:
        hook, self.before_append = self.before_append, nothing
        await hook()
        return await super().append(log, number, entry, check)

    async def withdraw(self, repository: str, digest: model.Digest) -> bool:
        before, self.before_withdraw = self.before_withdraw, nothing
        after, self.after_withdraw = self.after_withdraw, nothing
        await before()
        try:
            return await super().withdraw(repository, digest)
        finally:
            await after()


@pytest.mark.parametrize("moment", ["deleted before the entry", "pushed before the name goes", "pushed after it went"])
async def test_a_manifest_that_was_taken_has_its_blobs(tmp_path: Path, moment: str) -> None:
    clock = world.System()
    blobs, logs = disk.Disk(tmp_path, clock, fsync=False), Interrupted(tmp_path, clock, fsync=False)
    store = catalog.Catalog(blobs, logs, clock)
    for content in (CONFIG, LAYER):
        await blobs.put(content)
        await logs.grant("a/b", oci.digest_of(content))
    manifest = registry.image_manifest(CONFIG, LAYER)
    pushed: list[str] = []

    async def push() -> None:
        with contextlib.suppress(catalog.BlobMissing):
            pushed.append((await store.push("a/b", "v1", manifest, oci.OCI_MANIFEST, force=False))[0].digest)

    async def delete() -> None:
        with contextlib.suppress(catalog.BlobNeeded):
            await store.withdraw("a/b", DIGEST)

    if moment == "deleted before the entry":
        logs.before_append = delete
        await push()
    elif moment == "pushed before the name goes":
        logs.before_withdraw = push
        await delete()
    else:
        logs.after_withdraw = push
        await delete()
    if pushed:
        assert await store.granted_blob("a/b", DIGEST) is not None
    else:
        with pytest.raises(catalog.Missing):
            await store.manifest("a/b", "v1")
    blobs.close()
    logs.close()


@pytest.mark.parametrize("first", ["index", "delete"])
async def test_of_an_index_and_the_delete_of_its_manifest_one_is_refused(tmp_path: Path, first: str) -> None:
    clock = world.System()
    blobs, logs = disk.Disk(tmp_path, clock, fsync=False), Interrupted(tmp_path, clock, fsync=False)
    store = catalog.Catalog(blobs, logs, clock)
    await blobs.put(CONFIG)
    await logs.grant("a/b", oci.digest_of(CONFIG))
    manifest = registry.image_manifest(CONFIG)
    child, _ = await store.push("a/b", oci.digest_of(manifest), manifest, oci.OCI_MANIFEST, force=False)
    index = workflow.index(manifest)
    refused: list[type[Exception]] = []

    async def push() -> None:
        try:
            await store.push("a/b", "all", index, oci.OCI_INDEX, force=False)
        except catalog.BlobMissing as error:
            refused.append(type(error))

    async def delete() -> None:
        try:
            await store.delete("a/b", child.digest)
        except catalog.ManifestNeeded as error:
            refused.append(type(error))

    if first == "index":  # each is decided, and then the other one is entered before it
        logs.before_append = push
        await delete()
        assert refused == [catalog.ManifestNeeded]
        assert (await store.manifest("a/b", child.digest))[1] == manifest
    else:
        logs.before_append = delete
        await push()
        assert refused == [catalog.BlobMissing]
        with pytest.raises(catalog.Missing):
            await store.manifest("a/b", "all")
    blobs.close()
    logs.close()
