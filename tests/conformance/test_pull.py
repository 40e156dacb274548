"""OCI distribution specification 1.1, "Pull": manifests and blobs, whole and in part."""

import json

import pytest

from covey.client import oci
from tests.conformance import workflow

LAYER = bytes(range(256)) * 8  # 2048 bytes
SIZE = len(LAYER)


async def test_the_base_path_says_that_the_specification_is_implemented(repo: workflow.Repo) -> None:
    for path in ("/v2/", "/v2"):
        status, headers, body = await repo.server.call("GET", path)
        assert (status, body) == (200, b"{}")
        assert headers["Docker-Distribution-Api-Version"] == "registry/2.0"


@pytest.mark.parametrize("by", ["tag", "digest"])
async def test_a_manifest_is_pulled_by_tag_and_by_digest(repo: workflow.Repo, by: str) -> None:
    digest, manifest = await repo.push_image("v1", LAYER)
    status, headers, body = await repo.call("GET", f"/manifests/{'v1' if by == 'tag' else digest}")
    assert (status, body) == (200, manifest)
    assert headers["Docker-Content-Digest"] == digest
    assert headers["Content-Type"] == oci.OCI_MANIFEST
    assert headers["Content-Length"] == str(len(manifest))


@pytest.mark.parametrize(
    "accept", ["", oci.OCI_MANIFEST, f"{oci.OCI_INDEX}, {oci.OCI_MANIFEST}", "*/*", oci.DOCKER_LIST, "text/html"]
)
async def test_a_manifest_comes_as_it_was_pushed_whatever_is_accepted(repo: workflow.Repo, accept: str) -> None:
    _, manifest = await repo.push_image("v1")
    status, headers, body = await repo.call("GET", "/manifests/v1", Accept=accept)
    assert (status, headers["Content-Type"], body) == (200, oci.OCI_MANIFEST, manifest)


async def test_a_manifest_that_is_not_there_is_404(repo: workflow.Repo) -> None:
    assert await repo.error("GET", "/manifests/v1") == (404, "MANIFEST_UNKNOWN")  # no such repository
    await repo.push_image("v1")
    for reference in ("nope", workflow.unknown(), workflow.unknown(oci.SHA512)):
        assert await repo.error("GET", f"/manifests/{reference}") == (404, "MANIFEST_UNKNOWN")


async def test_a_manifest_of_one_repository_is_not_another_s(repo: workflow.Repo, other: workflow.Repo) -> None:
    digest, _ = await repo.push_image("v1")
    assert await other.status(f"/manifests/{digest}") == 404


async def test_a_blob_is_pulled_whole(repo: workflow.Repo) -> None:
    digest = await repo.push_blob(LAYER)
    status, headers, body = await repo.call("GET", f"/blobs/{digest}")
    assert (status, body, headers["Docker-Content-Digest"]) == (200, LAYER, digest)
    assert (headers["Content-Length"], headers["Accept-Ranges"]) == (str(SIZE), "bytes")


async def test_a_blob_that_is_not_there_is_404(repo: workflow.Repo) -> None:
    assert await repo.error("GET", f"/blobs/{workflow.unknown()}") == (404, "BLOB_UNKNOWN")
    await repo.push_blob(LAYER)
    assert await repo.error("GET", f"/blobs/{workflow.unknown()}") == (404, "BLOB_UNKNOWN")


async def test_a_blob_belongs_to_the_repositories_it_was_pushed_to(repo: workflow.Repo, other: workflow.Repo) -> None:
    digest = await repo.push_blob(LAYER)
    assert await other.error("GET", f"/blobs/{digest}") == (404, "BLOB_UNKNOWN")


async def test_head_is_get_without_the_body(repo: workflow.Repo) -> None:
    digest, _ = await repo.push_image("v1", LAYER)
    for path in ("/manifests/v1", f"/manifests/{digest}", f"/blobs/{oci.digest_of(LAYER)}", "/tags/list"):
        status, headers, _ = await repo.call("GET", path)
        again, other, body = await repo.call("HEAD", path)
        assert (again, body) == (status, b"")
        assert {**other, "Date": ""} == {**headers, "Date": ""}


async def test_head_of_what_is_not_there_is_404(repo: workflow.Repo) -> None:
    for path in ("/manifests/v1", f"/manifests/{workflow.unknown()}", f"/blobs/{workflow.unknown()}"):
        status, _, body = await repo.call("HEAD", path)
        assert (status, body) == (404, b"")


@pytest.mark.parametrize(
    ("wanted", "part"),
    [
        ("0-9", (0, 10)),
        ("500-1499", (500, 1500)),
        ("500-", (500, SIZE)),
        ("-500", (SIZE - 500, SIZE)),
        ("2000-5000", (2000, SIZE)),
        ("50-50", (50, 51)),
        ("-5000", (0, SIZE)),
        (f"{SIZE - 1}-", (SIZE - 1, SIZE)),
    ],
)
async def test_a_range_of_a_blob_is_206(repo: workflow.Repo, wanted: str, part: tuple[int, int]) -> None:
    digest = await repo.push_blob(LAYER)
    first, end = part
    status, headers, body = await repo.call("GET", f"/blobs/{digest}", Range=f"bytes={wanted}")
    assert (status, body) == (206, LAYER[first:end])
    assert headers["Content-Range"] == f"bytes {first}-{end - 1}/{SIZE}"
    assert headers["Content-Length"] == str(end - first)


@pytest.mark.parametrize("wanted", [f"{SIZE}-", "5000-10000", "500-0", "-0"])
async def test_a_range_without_a_byte_is_416(repo: workflow.Repo, wanted: str) -> None:
    digest = await repo.push_blob(LAYER)
    status, headers, _ = await repo.call("GET", f"/blobs/{digest}", Range=f"bytes={wanted}")
    assert (status, headers["Content-Range"]) == (416, f"bytes */{SIZE}")


@pytest.mark.parametrize("wanted", ["lines=1-2", "bytes=0-1,5-6", "bytes=-", "bytes", "bytes=a-b", ""])
async def test_a_range_of_another_kind_is_ignored(repo: workflow.Repo, wanted: str) -> None:
    digest = await repo.push_blob(LAYER)
    status, _, body = await repo.call("GET", f"/blobs/{digest}", Range=wanted)
    assert (status, body) == (200, LAYER)


async def test_if_range_gives_the_part_only_of_the_same_bytes(repo: workflow.Repo) -> None:
    digest = await repo.push_blob(LAYER)
    etag = (await repo.call("HEAD", f"/blobs/{digest}"))[1]["ETag"]
    assert digest in etag
    for condition, wanted in (
        (etag, (206, LAYER[:10])),
        ('"something else"', (200, LAYER)),
        ("Wed, 21 Oct 2015 07:28:00 GMT", (200, LAYER)),
    ):
        status, _, body = await repo.call("GET", f"/blobs/{digest}", Range="bytes=0-9", If_Range=condition)
        assert (status, body) == wanted, condition


async def test_what_the_client_has_is_304(repo: workflow.Repo) -> None:
    await repo.push_image("v1", LAYER)
    for path in ("/manifests/v1", f"/blobs/{oci.digest_of(LAYER)}"):
        etag = (await repo.call("GET", path))[1]["ETag"]
        assert (await repo.call("GET", path, If_None_Match=f'"x", {etag}'))[::2] == (304, b"")
        assert (await repo.call("GET", path, If_None_Match='"x"'))[0] == 200


async def test_names_may_have_several_parts_and_doubled_slashes(repo: workflow.Repo) -> None:
    deep = workflow.Repo(repo.server, f"{repo.name}/x-y_z__q.9/0")
    digest = await deep.push_blob(LAYER)
    assert (await repo.server.call("GET", f"//v2//{deep.name}/blobs/{digest}"))[0] == 200


async def test_errors_have_the_specification_s_form(repo: workflow.Repo) -> None:
    status, headers, body = await repo.call("GET", "/manifests/nope")
    assert (status, headers["Content-Type"]) == (404, "application/json")
    (error,) = json.loads(body)["errors"]
    assert error["code"] == "MANIFEST_UNKNOWN"
    assert "nope" in error["message"]
