"""OCI image specification 1.1, "Registered algorithms": sha512 beside sha256, for blobs and manifests."""

import json
from pathlib import Path

import pytest

from covey.client import oci
from tests.conformance import workflow
from tests.support import registry

LAYER = bytes(range(256)) * 1000
DIGEST = oci.digest_of(LAYER, oci.SHA512)


async def push(repo: workflow.Repo, pieces: int) -> int:
    """Push LAYER in that many PATCHes (0: with the PUT)."""
    location = await repo.begin()
    size = len(LAYER) // max(1, pieces)
    for index in range(pieces):
        end = len(LAYER) if index == pieces - 1 else (index + 1) * size
        await repo.call("PATCH", location, LAYER[index * size : end])
    return (await repo.call("PUT", f"{location}?digest={DIGEST}", b"" if pieces else LAYER))[0]


@pytest.mark.parametrize("pieces", [0, 1, 3])
async def test_a_blob_is_pushed_and_pulled_by_sha512(repo: workflow.Repo, pieces: int) -> None:
    assert await push(repo, pieces) == 201
    assert await repo.blob(DIGEST) == LAYER
    assert await repo.status(f"/blobs/{oci.digest_of(LAYER)}") == 404


async def test_a_blob_in_one_post_and_by_mount_by_sha512(repo: workflow.Repo, other: workflow.Repo) -> None:
    await other.push_blob(LAYER, oci.SHA512)
    assert (await repo.call("POST", f"/blobs/uploads/?mount={DIGEST}&from={other.name}"))[0] == 201
    assert await repo.blob(DIGEST) == LAYER
    assert (await repo.call("DELETE", f"/blobs/{DIGEST}"))[0] == 202
    assert await repo.status(f"/blobs/{DIGEST}") == 404


@pytest.mark.parametrize("pieces", [1, 2])
async def test_a_wrong_sha512_is_refused(repo: workflow.Repo, pieces: int) -> None:
    location = await repo.begin()
    for _ in range(pieces):
        await repo.call("PATCH", location, b"something else")
    assert await repo.error("PUT", f"{location}?digest={DIGEST}") == (400, "DIGEST_INVALID")


async def test_a_manifest_pushed_by_sha512_is_found_by_it_and_by_a_tag(repo: workflow.Repo) -> None:
    await push(repo, 1)
    await repo.push_blob(workflow.EMPTY)
    layer = {"mediaType": "application/octet-stream", "digest": DIGEST, "size": len(LAYER)}
    manifest = json.dumps({**json.loads(registry.image_manifest(workflow.EMPTY)), "layers": [layer]}).encode()
    digest = oci.digest_of(manifest, oci.SHA512)
    status, headers, _ = await repo.put(digest, manifest)
    assert (status, headers["Docker-Content-Digest"]) == (201, digest)
    status, headers, body = await repo.call("GET", f"/manifests/{digest}")
    assert (status, headers["Docker-Content-Digest"], body) == (200, digest, manifest)
    assert (await repo.put("v1", manifest))[0] == 201
    assert (await repo.call("HEAD", "/manifests/v1"))[1]["Docker-Content-Digest"] == oci.digest_of(manifest)
    assert await repo.error("DELETE", f"/blobs/{DIGEST}") == (405, "UNSUPPORTED")


async def test_each_algorithm_has_its_folder_and_sha256_stays_where_it_was(tmp_path: Path) -> None:
    async with registry.serving(tmp_path / "own") as server:
        repo = workflow.Repo(server, "a")
        await push(repo, 1)
        await repo.push_blob(LAYER)
        for algorithm in (oci.SHA256, oci.SHA512):
            name = oci.digest_of(LAYER, algorithm).partition(":")[2]
            assert (tmp_path / "own" / "blobs" / algorithm / name[:2] / name).read_bytes() == LAYER
            assert (tmp_path / "own" / "repositories" / "a" / "_blobs" / name).exists()
