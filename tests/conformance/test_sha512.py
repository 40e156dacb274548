"""OCI image specification 1.1, "Registered algorithms": sha512 beside sha256, for blobs and manifests."""

import json
from pathlib import Path

import pytest

from covey.client import oci
from tests.support import registry

LAYER = bytes(range(256)) * 1000
DIGEST = oci.digest_of(LAYER, oci.SHA512)
SESSIONS = "/v2/a/blobs/uploads/"


async def push(server: registry.Server, pieces: int) -> int:
    """Push LAYER in that many PATCHes (0: with the PUT)."""
    _, headers, _ = await server.call("POST", SESSIONS)
    size = len(LAYER) // max(1, pieces)
    for index in range(pieces):
        end = len(LAYER) if index == pieces - 1 else (index + 1) * size
        await server.call("PATCH", headers["Location"], LAYER[index * size : end])
    status, _, _ = await server.call("PUT", f"{headers['Location']}?digest={DIGEST}", b"" if pieces else LAYER)
    return status


@pytest.mark.parametrize("pieces", [0, 1, 3])
async def test_a_blob_is_pushed_and_pulled_by_sha512(server: registry.Server, pieces: int) -> None:
    assert await push(server, pieces) == 201
    status, headers, body = await server.call("GET", f"/v2/a/blobs/{DIGEST}")
    assert (status, headers["Docker-Content-Digest"], body) == (200, DIGEST, LAYER)
    assert (await server.call("GET", f"/v2/a/blobs/{oci.digest_of(LAYER)}"))[0] == 404


@pytest.mark.parametrize("pieces", [1, 2])
async def test_a_wrong_sha512_is_refused(server: registry.Server, pieces: int) -> None:
    _, headers, _ = await server.call("POST", SESSIONS)
    for _ in range(pieces):
        await server.call("PATCH", headers["Location"], b"something else")
    assert (await server.error("PUT", f"{headers['Location']}?digest={DIGEST}"))[:2] == (400, "DIGEST_INVALID")


async def test_a_manifest_pushed_by_sha512_is_found_by_it_and_by_a_tag(server: registry.Server) -> None:
    await push(server, 1)
    await server.push_blob("a", b"{}")
    layer = {"mediaType": "application/octet-stream", "digest": DIGEST, "size": len(LAYER)}
    document = json.loads(registry.image_manifest(b"{}"))
    manifest = json.dumps({**document, "layers": [layer]}).encode()
    digest = oci.digest_of(manifest, oci.SHA512)
    status, headers, _ = await server.put_manifest("a", digest, manifest)
    assert (status, headers["Docker-Content-Digest"]) == (201, digest)
    status, headers, body = await server.call("GET", f"/v2/a/manifests/{digest}")
    assert (status, headers["Docker-Content-Digest"], body) == (200, digest, manifest)
    assert (await server.put_manifest("a", oci.digest_of(b"x", oci.SHA512), manifest))[0] == 400
    assert (await server.put_manifest("a", "v1", manifest))[0] == 201
    assert (await server.call("HEAD", "/v2/a/manifests/v1"))[1]["Docker-Content-Digest"] == oci.digest_of(manifest)
    assert (await server.error("DELETE", f"/v2/a/blobs/{DIGEST}"))[0] == 405


async def test_each_algorithm_has_its_folder_and_sha256_stays_where_it_was(
    server: registry.Server, tmp_path: Path
) -> None:
    await push(server, 1)
    await server.push_blob("a", LAYER)
    for algorithm in (oci.SHA256, oci.SHA512):
        name = oci.digest_of(LAYER, algorithm).partition(":")[2]
        assert (tmp_path / "blobs" / algorithm / name[:2] / name).read_bytes() == LAYER
        assert (tmp_path / "repositories" / "a" / "_blobs" / name).exists()
