"""A registry whose bytes are in a bucket of S3: ranges, redirects, other servers, collection, what ends early."""

import asyncio
import http.client
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from covey import errors, model, world
from covey.client import oci
from covey.decide import garbage
from covey.registry import blobs, catalog, s3, s3_bucket, storage, sweep
from tests.support import registry
from tests.support import s3 as moto

LAYER = bytes(range(256)) * 100_000  # more than one range request, more than one part


@pytest.fixture(scope="module")
def store() -> Iterator[moto.Server]:
    with moto.running() as server:
        yield server


@pytest.fixture
def bucket(store: moto.Server) -> str:
    return store.fresh_bucket()


@pytest.fixture
async def server(store: moto.Server, bucket: str, tmp_path: Path) -> AsyncIterator[registry.Server]:
    async with registry.serving(tmp_path / "no", bucket=store.config(bucket), environ=store.environ) as server:
        yield server


async def test_what_was_pushed_is_pulled_whole_and_in_ranges(server: registry.Server) -> None:
    digest = await server.push_blob("a", LAYER)
    path = f"/v2/a/blobs/{digest}"
    status, headers, content = await server.call("GET", path)
    assert (status, content, headers["ETag"]) == (200, LAYER, f'"{digest}"')
    size = len(LAYER)
    for text, start, end in (("0-0", 0, 1), ("9000000-9000004", 9_000_000, 9_000_005), ("-5", size - 5, size)):
        status, headers, content = await server.call("GET", path, Range=f"bytes={text}")
        assert (status, content) == (206, LAYER[start:end])
        assert headers["Content-Range"] == f"bytes {start}-{end - 1}/{size}"
    status, headers, content = await server.call("HEAD", path)
    assert (status, headers["Content-Length"], content) == (200, str(size), b"")
    status, headers, _ = await server.call("GET", path, Range=f"bytes={size}-")
    assert (status, headers["Content-Range"]) == (416, f"bytes */{size}")


async def test_an_upload_goes_on_at_another_server(
    server: registry.Server, store: moto.Server, bucket: str, tmp_path: Path
) -> None:
    _, headers, _ = await server.call("POST", "/v2/a/blobs/uploads/", b"")
    place = headers["Location"]
    await server.call("PATCH", place, LAYER[:7_000_000])
    async with registry.serving(tmp_path / "no", bucket=store.config(bucket), environ=store.environ) as other:
        status, headers, _ = await other.call("GET", place)
        assert (status, headers["Range"]) == (204, "0-6999999")
        await other.call("PATCH", place, LAYER[7_000_000:])
        status, _, _ = await other.call("PUT", f"{place}?digest={oci.digest_of(LAYER)}", b"")
        assert status == 201
    assert (await server.call("GET", f"/v2/a/blobs/{oci.digest_of(LAYER)}"))[2] == LAYER
    assert not store.keys(bucket, "uploads/") and not store.unfinished(bucket)


async def test_a_client_may_be_sent_to_the_store(store: moto.Server, bucket: str, tmp_path: Path) -> None:
    """By an address that shows no secret, and that the client under test follows."""
    chosen = store.config(bucket, redirect_s=60.0)
    async with registry.serving(tmp_path / "no", bucket=chosen, environ=store.environ) as server:
        digest = await server.push_blob("a", LAYER)
        address = await asyncio.to_thread(_location, server, f"/v2/a/blobs/{digest}")
        assert address.startswith(f"{store.url}/{bucket}/blobs/sha256/") and moto.SECRET not in address
        assert (await server.call("HEAD", f"/v2/a/blobs/{digest}"))[0] == 200
        async with registry.talking(server) as client:
            await client.fetch("a", digest, len(LAYER), tmp_path / "layer")
        assert (tmp_path / "layer").read_bytes() == LAYER


def _location(server: registry.Server, path: str) -> str:
    """Where a client is sent, without following."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        assert answer.status == 307
        return str(answer.headers["Location"])
    finally:
        connection.close()


async def test_garbage_is_collected_in_a_bucket_too(store: moto.Server, bucket: str) -> None:
    """By the same verbs; the store's clock counts whole seconds, so periods are below zero here."""
    held = storage.in_bucket(store.config(bucket), store.environ, world.System())
    made = catalog.Catalog(held.content, held.logs, world.System())
    kept = await held.content.put(b"{}")
    lost = await held.content.put(b"nobody needs it")
    for blob in (kept, lost):
        await held.logs.grant("a", blob.digest)
    manifest = registry.image_manifest(b"{}")
    await made.push("a", "v1", manifest, oci.OCI_MANIFEST, force=False)
    collector = sweep.Collector(
        made, held.care, held.log_care, garbage.Periods(grace_s=-60, trash_s=3600, upload_s=-60)
    )
    await collector.run()
    shelf = {one.digest async for one in held.care.held(blobs.Place.SHELF)}
    assert shelf == {kept.digest, oci.digest_of(manifest)}
    assert {one.digest async for one in held.care.held(blobs.Place.TRASH)} == {lost.digest}
    assert await held.content.stat(lost.digest) is not None  # taken back by whoever asks
    assert not store.keys(bucket, "aside/")


class Traffic:
    """The bucket's bytes that its servers sent and read."""

    def __init__(self, held: storage.Storage) -> None:
        assert isinstance(held.content, s3.S3)
        self.bucket = held.content.bucket
        self.sent = self.read = 0
        self._send, self._read = self.bucket.send, self.bucket.read
        self.bucket.send, self.bucket.read = self._sending, self._reading  # type: ignore[method-assign]

    async def _sending(self, key: str, batches: AsyncIterator[bytes], size_bytes: int | None = None) -> None:
        async def counted() -> AsyncIterator[bytes]:
            async for batch in batches:
                self.sent += len(batch)
                yield batch

        await self._send(key, counted(), size_bytes)

    async def _reading(self, key: str, start: int, end: int) -> AsyncIterator[bytes]:
        async for piece in self._read(key, start, end):
            self.read += len(piece)
            yield piece


PARTS = [LAYER[:6_000_000], LAYER[6_000_000:12_000_000], LAYER[12_000_000:]]


async def _upload(one: storage.Storage, other: storage.Storage, parts: list[bytes]) -> blobs.SessionId:
    """The first part by `one`, the rest by `other`."""
    session = await one.content.begin()
    offset = 0
    for number, part in enumerate(parts):
        offset = await (other if number else one).content.write(session, offset, _pieces(part))
    return session


@pytest.mark.parametrize("servers", [1, 2])
async def test_several_parts_are_joined_by_the_store(store: moto.Server, bucket: str, servers: int) -> None:
    """Nothing is sent again. By one server nothing is read either: it knows the hash of what it took."""
    all_ = [storage.in_bucket(store.config(bucket), store.environ, world.System()) for _ in range(servers)]
    session = await _upload(all_[0], all_[-1], PARTS)
    traffic = Traffic(all_[-1])
    with pytest.raises(blobs.WrongDigest):
        await all_[-1].content.finish(await _upload(all_[0], all_[-1], PARTS), oci.digest_of(b"something else"))
    traffic.sent = traffic.read = 0
    await all_[-1].content.finish(session, oci.digest_of(LAYER))
    assert (traffic.sent, traffic.read) == (0, 0 if servers == 1 else len(LAYER))
    found = await all_[0].content.stat(oci.digest_of(LAYER))
    assert found is not None and found.size_bytes == len(LAYER)
    assert b"".join([piece async for piece in all_[0].content.read(found)]) == LAYER
    assert not store.unfinished(bucket)


async def test_what_the_store_cannot_join_is_sent_again(store: moto.Server, bucket: str) -> None:
    """Parts that are too small."""
    held = storage.in_bucket(store.config(bucket), store.environ, world.System())
    session = await _upload(held, held, [LAYER[:1000], LAYER[1000:]])
    traffic = Traffic(held)
    await held.content.finish(session, oci.digest_of(LAYER))
    assert traffic.sent == len(LAYER)
    found = await held.content.stat(oci.digest_of(LAYER))
    assert found is not None
    assert b"".join([piece async for piece in held.content.read(found)]) == LAYER


async def test_a_join_whose_parts_are_gone_leaves_nothing(store: moto.Server, bucket: str) -> None:
    """The session was aborted by another server meanwhile."""
    held = storage.in_bucket(store.config(bucket), store.environ, world.System())
    session = await _upload(held, held, PARTS)
    (gone,) = [key for key, size in store.keys(bucket, f"uploads/{session}/data.").items() if size == len(PARTS[2])]
    store.call("DELETE", f"/{bucket}/{gone}")
    with pytest.raises(blobs.NoSession):
        await held.content.finish(session, oci.digest_of(LAYER))
    assert not store.unfinished(bucket)
    assert await held.content.stat(oci.digest_of(LAYER)) is None


async def test_a_wrong_hash_of_several_parts_is_never_visible(store: moto.Server, bucket: str) -> None:
    """The multipart upload under the digest is aborted, not completed."""
    held = storage.in_bucket(store.config(bucket), store.environ, world.System())
    session = await held.content.begin()
    offset = await held.content.write(session, 0, _pieces(LAYER[:8_000_000]))
    await held.content.write(session, offset, _pieces(LAYER[8_000_000:16_000_000]))
    wrong = model.Digest("sha256:" + "1" * 64)
    with pytest.raises(blobs.WrongDigest):
        await held.content.finish(session, wrong)
    assert await held.content.stat(wrong) is None
    assert not store.keys(bucket, "blobs/") and not store.unfinished(bucket) and not store.keys(bucket, "uploads/")


async def test_an_upload_that_is_given_up_leaves_no_parts(store: moto.Server, bucket: str) -> None:
    held = storage.in_bucket(store.config(bucket), store.environ, world.System())
    session = await held.content.begin()
    there = asyncio.Event()

    async def slow() -> AsyncIterator[bytes]:
        yield LAYER[:12_000_000]
        there.set()
        await asyncio.Event().wait()

    write = asyncio.create_task(held.content.write(session, 0, slow()))
    await there.wait()
    write.cancel()
    await asyncio.gather(write, return_exceptions=True)
    assert not store.unfinished(bucket)
    assert await held.content.offset(session) == 0


async def _pieces(content: bytes) -> AsyncIterator[bytes]:
    yield content


async def test_a_bucket_of_a_newer_covey_is_refused(store: moto.Server, bucket: str) -> None:
    store.call("PUT", f"/{bucket}/format", b"999")
    held = storage.in_bucket(store.config(bucket), store.environ, world.System())
    with pytest.raises(errors.SettingError, match=r"has format 999, this server knows 1; use a newer Covey"):
        await held.open()


async def test_a_bucket_that_is_not_there_stops_the_start(store: moto.Server) -> None:
    held = storage.in_bucket(store.config("no-such-bucket"), store.environ, world.System())
    with pytest.raises(errors.SettingError, match="BACKEND_S3_BUCKET no-such-bucket cannot hold a registry") as caught:
        await held.open()
    assert moto.SECRET not in str(caught.value)


@pytest.mark.parametrize(
    ("endpoint", "path_style", "spelled"),
    [
        ("https://s3.example.com", True, "https://s3.example.com"),
        ("https://s3.example.com/", False, "https://bucket.s3.example.com"),
        ("http://bucket.s3.example.com:9000", False, "http://bucket.s3.example.com:9000"),
    ],
)
def test_where_the_bucket_is_named(endpoint: str, path_style: bool, spelled: str) -> None:
    assert s3_bucket.spelled(endpoint, s3_bucket.Config(bucket="bucket", path_style=path_style)) == spelled
