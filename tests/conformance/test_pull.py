"""OCI distribution specification 1.1: pulling blobs and manifests."""

import json

import pytest

from covey.client import oci
from tests.support import registry

LAYER = bytes(range(256)) * 400
NOWHERE = "sha256:" + "0" * 64


async def test_the_version_path_says_that_this_is_a_registry(server: registry.Server) -> None:
    status, _, body = await server.call("GET", "/v2/")
    assert (status, body) == (200, b"{}")


async def test_a_blob_comes_back_whole_with_its_digest(server: registry.Server) -> None:
    digest = await server.push_blob("a/b", LAYER)
    status, headers, body = await server.call("GET", f"/v2/a/b/blobs/{digest}")
    assert (status, body, headers["Docker-Content-Digest"]) == (200, LAYER, digest)


async def test_head_of_a_blob_tells_its_length_and_sends_nothing(server: registry.Server) -> None:
    digest = await server.push_blob("a", LAYER)
    status, headers, body = await server.call("HEAD", f"/v2/a/blobs/{digest}")
    assert (status, headers["Content-Length"], body) == (200, str(len(LAYER)), b"")


@pytest.mark.parametrize(
    ("wanted", "part"),
    [
        ("bytes=0-9", LAYER[:10]),
        ("bytes=100-", LAYER[100:]),
        ("bytes=-7", LAYER[-7:]),
        ("bytes=50-50", LAYER[50:51]),
    ],
)
async def test_a_range_of_a_blob(server: registry.Server, wanted: str, part: bytes) -> None:
    digest = await server.push_blob("a", LAYER)
    status, headers, body = await server.call("GET", f"/v2/a/blobs/{digest}", Range=wanted)
    assert (status, body) == (206, part)
    assert headers["Content-Range"].endswith(f"/{len(LAYER)}")


async def test_a_range_beyond_the_end_is_416(server: registry.Server) -> None:
    digest = await server.push_blob("a", LAYER)
    status, _, _ = await server.call("GET", f"/v2/a/blobs/{digest}", Range=f"bytes={len(LAYER)}-")
    assert status == 416


@pytest.mark.parametrize("method", ["GET", "HEAD"])
async def test_an_unknown_blob_is_404(server: registry.Server, method: str) -> None:
    status, _, body = await server.call(method, f"/v2/a/blobs/{NOWHERE}")
    assert status == 404
    if method == "GET":
        assert json.loads(body)["errors"][0]["code"] == "BLOB_UNKNOWN"


async def test_a_blob_belongs_to_the_repositories_it_was_pushed_to(server: registry.Server) -> None:
    digest = await server.push_blob("mine", LAYER)
    assert (await server.error("GET", f"/v2/other/blobs/{digest}"))[:2] == (404, "BLOB_UNKNOWN")


@pytest.mark.parametrize("method", ["GET", "HEAD"])
@pytest.mark.parametrize("by", ["tag", "digest"])
async def test_a_manifest_by_tag_and_by_digest(server: registry.Server, method: str, by: str) -> None:
    digest, manifest = await server.push_image("a", "v1", LAYER)
    status, headers, body = await server.call(method, f"/v2/a/manifests/{'v1' if by == 'tag' else digest}")
    assert status == 200
    assert headers["Docker-Content-Digest"] == digest
    assert headers["Content-Type"] == oci.OCI_MANIFEST
    assert headers["Content-Length"] == str(len(manifest))
    assert body == (manifest if method == "GET" else b"")


@pytest.mark.parametrize("reference", ["nope", NOWHERE])
async def test_an_unknown_manifest_is_404(server: registry.Server, reference: str) -> None:
    await server.push_image("a", "v1", LAYER)
    assert (await server.error("GET", f"/v2/a/manifests/{reference}"))[:2] == (404, "MANIFEST_UNKNOWN")
    assert (await server.error("GET", f"/v2/never/pushed/manifests/{reference}"))[:2] == (404, "MANIFEST_UNKNOWN")


async def test_a_manifest_of_one_repository_is_not_another_s(server: registry.Server) -> None:
    digest, _ = await server.push_image("a", "v1", LAYER)
    assert (await server.error("GET", f"/v2/b/manifests/{digest}"))[0] == 404


async def test_slashes_may_be_doubled(server: registry.Server) -> None:
    digest = await server.push_blob("a/b", LAYER)
    assert (await server.call("GET", f"//v2//a/b/blobs/{digest}"))[0] == 200
