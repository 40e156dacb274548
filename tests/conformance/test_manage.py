"""OCI distribution specification 1.1, "Content management": deleting tags, manifests and blobs."""

import asyncio
import json
from pathlib import Path

import pytest

from covey.client import oci
from tests.conformance import workflow
from tests.support import registry


async def test_a_deleted_tag_leaves_its_manifest(repo: workflow.Repo) -> None:
    digest, _ = await repo.push_image("v1")
    assert (await repo.call("DELETE", "/manifests/v1"))[0] == 202
    assert await repo.error("GET", "/manifests/v1") == (404, "MANIFEST_UNKNOWN")
    assert await repo.status(f"/manifests/{digest}") == 200
    assert await repo.tags() == []
    assert await repo.error("DELETE", "/manifests/v1") == (404, "MANIFEST_UNKNOWN")


async def test_a_deleted_manifest_takes_its_tags_along(repo: workflow.Repo) -> None:
    digest, manifest = await repo.push_image("v1")
    await repo.push("v2", manifest)
    await repo.push_image("other", b"y")
    assert (await repo.call("DELETE", f"/manifests/{digest}"))[0] == 202
    assert await repo.tags() == ["other"]
    for reference in (digest, "v1", "v2"):
        assert await repo.error("GET", f"/manifests/{reference}") == (404, "MANIFEST_UNKNOWN")
    assert await repo.error("DELETE", f"/manifests/{digest}") == (404, "MANIFEST_UNKNOWN")
    await repo.push("v1", manifest)
    assert (await repo.call("GET", "/manifests/v1"))[2] == manifest


async def test_deleting_in_an_unknown_repository_is_404(repo: workflow.Repo) -> None:
    assert await repo.error("DELETE", "/manifests/v1") == (404, "MANIFEST_UNKNOWN")
    assert await repo.error("DELETE", f"/manifests/{workflow.unknown()}") == (404, "MANIFEST_UNKNOWN")
    assert await repo.error("DELETE", f"/blobs/{workflow.unknown()}") == (404, "BLOB_UNKNOWN")


async def test_a_deleted_blob_is_gone_from_this_repository_only(repo: workflow.Repo, other: workflow.Repo) -> None:
    digest = await repo.push_blob(b"x")
    await other.push_blob(b"x")
    assert (await repo.call("DELETE", f"/blobs/{digest}"))[0] == 202
    for method in ("GET", "HEAD"):
        assert (await repo.call(method, f"/blobs/{digest}"))[0] == 404
    assert await repo.error("DELETE", f"/blobs/{digest}") == (404, "BLOB_UNKNOWN")
    assert await other.blob(digest) == b"x"
    await repo.push_blob(b"x")
    assert await repo.blob(digest) == b"x"


async def test_a_blob_that_a_manifest_needs_stays(repo: workflow.Repo) -> None:
    digest, _ = await repo.push_image("v1", b"x")
    layer = oci.digest_of(b"x")
    assert await repo.error("DELETE", f"/blobs/{layer}") == (405, "UNSUPPORTED")
    assert await repo.blob(layer) == b"x"
    await repo.call("DELETE", f"/manifests/{digest}")
    assert (await repo.call("DELETE", f"/blobs/{layer}"))[0] == 202


async def test_a_manifest_that_an_index_names_stays(repo: workflow.Repo) -> None:
    digest, manifest = await repo.push_image("v1")
    inner, _ = await repo.push_index("all", manifest)
    assert await repo.error("DELETE", f"/manifests/{digest}") == (405, "UNSUPPORTED")
    assert (await repo.call("DELETE", "/manifests/v1"))[0] == 202  # its tag is nobody else's business
    assert await repo.status(f"/manifests/{digest}") == 200
    assert (await repo.call("DELETE", f"/manifests/{inner}"))[0] == 202
    assert (await repo.call("DELETE", f"/manifests/{digest}"))[0] == 202


@pytest.mark.parametrize("seed", range(4))
async def test_an_index_pushed_while_its_manifest_is_deleted_is_whole_or_refused(
    repo: workflow.Repo, seed: int
) -> None:
    for round_number in range(5):
        digest, manifest = await repo.push_image("", f"{seed} {round_number}".encode())
        index = workflow.index(manifest)
        pushing, deleting = repo.put("all", index, oci.OCI_INDEX), repo.call("DELETE", f"/manifests/{digest}")
        both = (pushing, deleting) if seed % 2 else (deleting, pushing)
        statuses = sorted(status for status, _, _ in await asyncio.gather(*both))
        there = await repo.status(f"/manifests/{digest}")
        assert (statuses, there) in (([201, 405], 200), ([202, 404], 404))


async def test_tags_pushed_and_deleted_at_once_end_whole_or_gone(repo: workflow.Repo) -> None:
    _, manifest = await repo.push_image("v1")
    calls = [repo.put("v1", manifest) if turn % 2 else repo.call("DELETE", "/manifests/v1") for turn in range(12)]
    statuses = {status for status, _, _ in await asyncio.gather(*calls)}
    assert statuses <= {201, 202, 404}
    status, _, body = await repo.call("GET", "/manifests/v1")
    assert (status, await repo.tags()) in ((200, ["v1"]), (404, []))
    assert status == 404 or body == manifest


async def test_deleting_may_be_switched_off(tmp_path: Path) -> None:
    async with registry.serving(tmp_path / "own", deletes=False) as server:
        repo = workflow.Repo(server, "a")
        digest, manifest = await repo.push_image("v1", b"x")
        for path in ("/manifests/v1", f"/manifests/{digest}", f"/blobs/{oci.digest_of(b'x')}", "/manifests/nope"):
            assert await repo.error("DELETE", path) == (405, "UNSUPPORTED")
        assert (await repo.call("GET", "/manifests/v1"))[2] == manifest
        assert (await repo.call("DELETE", await repo.begin()))[0] == 204  # an upload is no content


TEMPLATE = "12345678-1234-1234-1234-123456789abc"


async def push_template(repo: workflow.Repo, *tags: str) -> None:
    config = registry.template_config()
    await repo.push_blob(config)
    for tag in tags:
        await repo.push_blob(tag.encode())
        await repo.push(tag, registry.template_manifest(config, tag.encode(), name="xcode", tag=tag))


async def template_tags(server: registry.Server) -> list[str]:
    """The tags of the only template, as its view tells them."""
    body = json.loads((await server.call("GET", f"/registry/v2/vm?id={TEMPLATE}"))[2])
    return [version["tag"] for version in body["body"]["versions"]] if body["status"] == "OK" else []


@pytest.mark.parametrize("by", ["tag", "digest", "view"])
async def test_a_template_s_version_is_gone_by_either_way_of_deleting(tmp_path: Path, by: str) -> None:
    async with registry.serving(tmp_path / "own") as server:
        repo = workflow.Repo(server, f"templates/{TEMPLATE}")
        await push_template(repo, "v0", "v1")
        if by == "view":
            await server.call("DELETE", f"/registry/revert?id={TEMPLATE}", b'{"tag": "v1"}')
        else:
            reference = (
                (await repo.call("HEAD", "/manifests/v1"))[1]["Docker-Content-Digest"] if by == "digest" else "v1"
            )
            await repo.call("DELETE", f"/manifests/{reference}")
        assert await template_tags(server) == await repo.tags() == ["v0"]
        assert await repo.status("/manifests/v1") == 404
        await server.call("DELETE", f"/registry/vm?id={TEMPLATE}")
        assert await template_tags(server) == await repo.tags() == []
        assert await repo.status("/manifests/v0") == 404


async def test_templates_too_stay_where_deleting_is_switched_off(tmp_path: Path) -> None:
    async with registry.serving(tmp_path / "own", deletes=False) as server:
        repo = workflow.Repo(server, f"templates/{TEMPLATE}")
        await push_template(repo, "v0", "v1")
        for path in (f"/registry/vm?id={TEMPLATE}", f"/registry/revert?id={TEMPLATE}"):
            answer = json.loads((await server.call("DELETE", path))[2])
            assert (answer["status"], "switched off" in answer["message"]) == ("FAIL", True)
        assert await template_tags(server) == ["v0", "v1"]
