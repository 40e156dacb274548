"""OCI distribution specification 1.1, "Push": blobs in one piece, in chunks, streamed, by mount; manifests."""

import asyncio
import json
from collections.abc import AsyncIterator

import pytest

from covey.client import oci
from tests.conformance import workflow
from tests.support import registry

LAYER = bytes(range(256)) * 1000
DIGEST = oci.digest_of(LAYER)
SIZE = len(LAYER)
FOREIGN = "application/vnd.oci.image.layer.nondistributable.v1.tar+gzip"


def a_range(first: int, end: int) -> str:
    return f"{first}-{end - 1}"


async def unsized(content: bytes) -> AsyncIterator[bytes]:
    """A body without Content-Length: chunked transfer coding."""
    for first in range(0, len(content), 50_000):
        yield content[first : first + 50_000]


# ---- blobs in one piece --------------------------------------------------------------------------------------------


async def test_a_blob_in_one_post(repo: workflow.Repo) -> None:
    status, headers, _ = await repo.call("POST", f"/blobs/uploads/?digest={DIGEST}", LAYER)
    assert (status, headers["Docker-Content-Digest"]) == (201, DIGEST)
    assert (await repo.call("GET", headers["Location"]))[::2] == (200, LAYER)


async def test_a_blob_by_post_then_put(repo: workflow.Repo) -> None:
    status, headers, _ = await repo.call("POST", "/blobs/uploads/")
    assert status == 202
    status, headers, _ = await repo.call("PUT", f"{headers['Location']}?digest={DIGEST}", LAYER)
    assert (status, headers["Docker-Content-Digest"]) == (201, DIGEST)
    assert (await repo.call("GET", headers["Location"]))[::2] == (200, LAYER)


async def test_a_blob_that_is_there_may_be_pushed_again(repo: workflow.Repo) -> None:
    for _ in range(2):
        assert await repo.push_blob(LAYER) == DIGEST
    assert await repo.blob(DIGEST) == LAYER


async def test_an_empty_blob(repo: workflow.Repo) -> None:
    digest = oci.digest_of(b"")
    assert (await repo.call("PUT", f"{await repo.begin()}?digest={digest}"))[0] == 201
    assert await repo.blob(digest) == b""
    assert await repo.push_blob(b"") == digest


@pytest.mark.parametrize("way", ["post", "put", "chunks", "last chunk", "stream"])
async def test_a_digest_that_is_not_the_content_s_is_400(repo: workflow.Repo, way: str) -> None:
    wrong = workflow.unknown()
    if way == "post":
        assert await repo.error("POST", f"/blobs/uploads/?digest={wrong}", LAYER) == (400, "DIGEST_INVALID")
    else:
        location = await repo.begin()
        sent = {"put": 0, "chunks": SIZE, "last chunk": 5000, "stream": SIZE}[way]
        if sent:
            extra = {} if way == "stream" else {"Content_Range": a_range(0, sent)}
            assert (await repo.call("PATCH", location, LAYER[:sent], **extra))[0] == 202
        assert await repo.error("PUT", f"{location}?digest={wrong}", LAYER[sent:]) == (400, "DIGEST_INVALID")
    assert await repo.status(f"/blobs/{wrong}") == await repo.status(f"/blobs/{DIGEST}") == 404


# ---- blobs in chunks -----------------------------------------------------------------------------------------------


async def test_a_blob_in_chunks(repo: workflow.Repo) -> None:
    location = await repo.begin()
    for first, end in ((0, 1000), (1000, 70_000), (70_000, SIZE)):
        status, headers, _ = await repo.call("PATCH", location, LAYER[first:end], Content_Range=a_range(first, end))
        assert (status, headers["Range"]) == (202, a_range(0, end))
        location = headers["Location"]
    status, headers, _ = await repo.call("PUT", f"{location}?digest={DIGEST}")
    assert (status, headers["Docker-Content-Digest"]) == (201, DIGEST)
    assert (await repo.call("GET", headers["Location"]))[::2] == (200, LAYER)


async def test_the_last_chunk_may_come_with_the_put(repo: workflow.Repo) -> None:
    location = await repo.begin()
    await repo.call("PATCH", location, LAYER[:5000], Content_Range=a_range(0, 5000))
    last = LAYER[5000:]
    status, _, _ = await repo.call("PUT", f"{location}?digest={DIGEST}", last, Content_Range=a_range(5000, SIZE))
    assert status == 201
    assert await repo.blob(DIGEST) == LAYER


async def test_a_first_chunk_that_does_not_begin_at_0_is_416(repo: workflow.Repo) -> None:
    location = await repo.begin()
    status, _, _ = await repo.call("PATCH", location, LAYER[5:9], Content_Range="5-8")
    assert status == 416
    assert (await repo.call("PATCH", location, LAYER[:5], Content_Range="0-4"))[0] == 202


@pytest.mark.parametrize(("first", "end"), [(0, 1000), (999, 1999), (2000, 3000)], ids=["again", "overlap", "gap"])
@pytest.mark.parametrize("method", ["PATCH", "PUT"])
async def test_a_chunk_out_of_order_is_416_and_get_tells_where_to_go_on(
    repo: workflow.Repo, method: str, first: int, end: int
) -> None:
    location = await repo.begin()
    await repo.call("PATCH", location, LAYER[:1000], Content_Range=a_range(0, 1000))
    path = location if method == "PATCH" else f"{location}?digest={DIGEST}"
    status, headers, body = await repo.call(method, path, LAYER[first:end], Content_Range=a_range(first, end))
    assert (status, json.loads(body)["errors"][0]["code"]) == (416, "BLOB_UPLOAD_INVALID")
    assert (headers["Range"], headers[oci.OFFSET_HEADER]) == (a_range(0, 1000), "1000")
    status, headers, _ = await repo.call("GET", headers["Location"])
    assert (status, headers["Range"]) == (204, a_range(0, 1000))
    await repo.call("PATCH", headers["Location"], LAYER[1000:], Content_Range=a_range(1000, SIZE))
    assert (await repo.call("PUT", f"{location}?digest={DIGEST}"))[0] == 201
    assert await repo.blob(DIGEST) == LAYER


async def test_a_session_tells_where_it_stands(repo: workflow.Repo) -> None:
    location = await repo.begin()
    status, headers, body = await repo.call("GET", location)
    assert (status, headers["Range"], headers[oci.OFFSET_HEADER], body) == (204, "0-0", "0", b"")
    await repo.call("PATCH", location, LAYER[:1234])
    status, headers, _ = await repo.call("GET", location)
    assert (status, headers["Range"], headers[oci.OFFSET_HEADER]) == (204, "0-1233", "1234")
    assert headers["Location"] == location


async def test_a_blob_in_a_stream_without_ranges(repo: workflow.Repo) -> None:
    location = await repo.begin()
    for piece in (LAYER[:777], LAYER[777:]):
        status, headers, _ = await repo.call("PATCH", location, unsized(piece))
        assert status == 202
        location = headers["Location"]
    assert (await repo.call("PUT", f"{location}?digest={DIGEST}"))[0] == 201
    assert await repo.blob(DIGEST) == LAYER


@pytest.mark.parametrize("promised", [1, SIZE - 1, SIZE + 1, 2 * SIZE])
async def test_a_stream_that_is_not_as_long_as_its_range_is_not_taken(repo: workflow.Repo, promised: int) -> None:
    location = await repo.begin()
    status, _, body = await repo.call("PATCH", location, unsized(LAYER), Content_Range=a_range(0, promised))
    assert (status, json.loads(body)["errors"][0]["code"]) == (400, "SIZE_INVALID")
    assert (await repo.call("GET", location))[1][oci.OFFSET_HEADER] == "0"
    assert (await repo.call("PATCH", location, unsized(LAYER), Content_Range=a_range(0, SIZE)))[0] == 202


async def test_of_two_chunks_at_one_place_one_wins(repo: workflow.Repo) -> None:
    location = await repo.begin()
    answers = await asyncio.gather(
        *(repo.call("PATCH", location, LAYER, Content_Range=a_range(0, SIZE)) for _ in range(5))
    )
    assert sorted(status for status, _, _ in answers) == [202, 416, 416, 416, 416]
    assert (await repo.call("PUT", f"{location}?digest={DIGEST}"))[0] == 201
    assert await repo.blob(DIGEST) == LAYER


async def test_the_closing_put_may_be_repeated(repo: workflow.Repo) -> None:
    location = await repo.begin()
    await repo.call("PATCH", location, LAYER)
    answers = [await repo.call("PUT", f"{location}?digest={DIGEST}") for _ in range(2)]
    assert [status for status, _, _ in answers] == [201, 201]


async def test_an_upload_may_be_cancelled(repo: workflow.Repo) -> None:
    location = await repo.begin()
    await repo.call("PATCH", location, LAYER)
    assert (await repo.call("DELETE", location))[0] == 204
    for method in ("GET", "PATCH", "DELETE"):
        body = b"more" if method == "PATCH" else None
        assert await repo.error(method, location, body) == (404, "BLOB_UPLOAD_UNKNOWN")
    assert await repo.error("PUT", f"{location}?digest={DIGEST}") == (404, "BLOB_UPLOAD_UNKNOWN")


async def test_a_session_is_over_when_its_blob_is_there(repo: workflow.Repo) -> None:
    location = await repo.begin()
    assert (await repo.call("PUT", f"{location}?digest={DIGEST}", LAYER))[0] == 201
    assert await repo.error("GET", location) == (404, "BLOB_UPLOAD_UNKNOWN")


# ---- mounting ------------------------------------------------------------------------------------------------------


async def test_a_blob_is_mounted_from_another_repository(repo: workflow.Repo, other: workflow.Repo) -> None:
    await other.push_blob(LAYER)
    status, headers, _ = await repo.call("POST", f"/blobs/uploads/?mount={DIGEST}&from={other.name}")
    assert (status, headers["Location"]) == (201, f"{repo.root}/blobs/{DIGEST}")
    assert headers["Docker-Content-Digest"] == DIGEST
    assert await repo.blob(DIGEST) == LAYER
    assert (await other.call("DELETE", f"/blobs/{DIGEST}"))[0] == 202
    assert await repo.blob(DIGEST) == LAYER


async def test_a_mount_without_from_finds_the_blob(repo: workflow.Repo, other: workflow.Repo) -> None:
    await other.push_blob(LAYER)
    assert (await repo.call("POST", f"/blobs/uploads/?mount={DIGEST}"))[0] == 201
    assert await repo.blob(DIGEST) == LAYER


@pytest.mark.parametrize("source", ["", "&from=conformance/nobody", "&from=../a", "&from=%2e%2e"])
async def test_a_mount_of_what_is_not_there_opens_an_upload(repo: workflow.Repo, source: str) -> None:
    content = workflow.unknown().encode()
    digest = oci.digest_of(content)
    status, headers, _ = await repo.call("POST", f"/blobs/uploads/?mount={digest}{source}")
    assert status == 202
    assert headers["Location"].startswith(f"{repo.root}/blobs/uploads/")
    assert (await repo.call("PUT", f"{headers['Location']}?digest={digest}", content))[0] == 201


# ---- manifests -----------------------------------------------------------------------------------------------------


async def test_a_manifest_is_pushed_by_tag(repo: workflow.Repo) -> None:
    await repo.push_blob(workflow.EMPTY)
    manifest = registry.image_manifest(workflow.EMPTY)
    for tag in ("test0", "test1", "test2"):
        status, headers, _ = await repo.put(tag, manifest)
        assert (status, headers["Docker-Content-Digest"]) == (201, oci.digest_of(manifest))
        assert (await repo.call("GET", headers["Location"]))[::2] == (200, manifest)
    assert await repo.tags() == ["test0", "test1", "test2"]


async def test_a_manifest_is_pushed_by_digest(repo: workflow.Repo) -> None:
    digest, manifest = await repo.push_image()
    assert await repo.tags() == []
    assert (await repo.call("GET", f"/manifests/{digest}"))[2] == manifest


async def test_a_manifest_by_its_digest_with_tags_in_the_query(repo: workflow.Repo) -> None:
    await repo.push_blob(workflow.EMPTY)
    manifest = registry.image_manifest(workflow.EMPTY)
    for algorithm in (oci.SHA256, oci.SHA512):
        digest, tags = oci.digest_of(manifest, algorithm), [f"{algorithm}-a", f"{algorithm}-b"]
        status, headers, _ = await repo.put(f"{digest}?tag={tags[0]}&tag={tags[1]}", manifest)
        assert (status, headers["OCI-Tag"], headers["Docker-Content-Digest"]) == (201, ", ".join(tags), digest)
        for tag in tags:
            assert (await repo.call("HEAD", f"/manifests/{tag}"))[1]["Docker-Content-Digest"] == digest
    assert (await repo.put("v1?tag=v2", manifest))[0] == 400
    assert (await repo.put(f"{workflow.unknown()}?tag=v2", manifest))[0] == 400


async def test_a_manifest_under_another_digest_is_400(repo: workflow.Repo) -> None:
    _, manifest = await repo.push_image("v1")
    for wrong in (workflow.unknown(), workflow.unknown(oci.SHA512), "sha256:baddigeststring"):
        path = f"/manifests/{wrong}"
        assert await repo.error("PUT", path, manifest, Content_Type=oci.OCI_MANIFEST) == (400, "DIGEST_INVALID")


async def test_a_tag_may_move(repo: workflow.Repo) -> None:
    old, _ = await repo.push_image("latest", b"one")
    new, _ = await repo.push_image("latest", b"two")
    assert (await repo.call("HEAD", "/manifests/latest"))[1]["Docker-Content-Digest"] == new
    assert await repo.status(f"/manifests/{old}") == 200


async def test_a_manifest_is_kept_byte_for_byte(repo: workflow.Repo) -> None:
    await repo.push_blob(workflow.EMPTY)
    document = json.loads(registry.image_manifest(workflow.EMPTY))
    document |= {"org.example.unknown": [1, {"x": None}], "annotations": {"k": "ü"}}
    manifest = json.dumps(document, indent=3, ensure_ascii=False).encode() + b"\n\n"
    await repo.push("v1", manifest)
    assert (await repo.call("GET", "/manifests/v1"))[2] == manifest


async def test_a_manifest_without_layers_and_one_with_null_for_none(repo: workflow.Repo) -> None:
    await repo.push_blob(workflow.EMPTY)
    await repo.push("none", registry.image_manifest(workflow.EMPTY))
    document = json.loads(registry.image_manifest(workflow.EMPTY))
    await repo.push("null", json.dumps({**document, "layers": None, "subject": None}).encode())
    assert await repo.tags() == ["none", "null"]


async def test_an_artifact_with_the_empty_config_and_a_type_of_its_own(repo: workflow.Repo) -> None:
    await repo.push_blob(workflow.EMPTY)
    empty = {**registry.descriptor(oci.OCI_EMPTY, workflow.EMPTY), "data": "e30="}
    document = {
        "schemaVersion": 2,
        "mediaType": oci.OCI_MANIFEST,
        "artifactType": "application/vnd.example.thing.v1",
        "config": empty,
        "layers": [empty],
    }
    _, manifest = await repo.push("thing", json.dumps(document).encode())
    assert (await repo.call("GET", "/manifests/thing"))[2] == manifest


@pytest.mark.parametrize("media_type", [oci.OCI_MANIFEST, oci.DOCKER_MANIFEST])
async def test_images_of_both_kinds_with_configs_of_any_type(repo: workflow.Repo, media_type: str) -> None:
    for content in (LAYER, workflow.EMPTY):
        await repo.push_blob(content)
    document = {
        "schemaVersion": 2,
        "mediaType": media_type,
        "config": registry.descriptor("application/vnd.example.any+json", workflow.EMPTY),
        "layers": [registry.descriptor("application/vnd.example.any", LAYER)],
    }
    _, manifest = await repo.push("v1", json.dumps(document).encode(), media_type)
    status, headers, body = await repo.call("GET", "/manifests/v1")
    assert (status, headers["Content-Type"], body) == (200, media_type, manifest)


@pytest.mark.parametrize("media_type", [oci.OCI_INDEX, oci.DOCKER_LIST])
async def test_indexes_of_both_kinds(repo: workflow.Repo, other: workflow.Repo, media_type: str) -> None:
    _, manifest = await repo.push_image("", LAYER)
    content = workflow.index(manifest, mediaType=media_type)
    await repo.push("all", content, media_type)
    status, headers, body = await repo.call("GET", "/manifests/all")
    assert (status, headers["Content-Type"], body) == (200, media_type, content)
    assert (await other.put("all", content, media_type))[0] == 404


async def test_an_index_of_indexes_and_an_empty_one(repo: workflow.Repo) -> None:
    _, manifest = await repo.push_image()
    _, inner = await repo.push_index("", manifest)
    await repo.push_index("empty")
    described = [registry.descriptor(oci.OCI_INDEX, inner)]
    await repo.push_index("outer", manifests=described)
    assert await repo.tags() == ["empty", "outer"]


async def test_an_artifact_manifest_of_an_older_tool(repo: workflow.Repo) -> None:
    await repo.push_blob(LAYER)
    subject = registry.descriptor(oci.OCI_MANIFEST, b"to come")
    document = {
        "mediaType": oci.OCI_ARTIFACT,
        "artifactType": "application/vnd.example.sbom",
        "blobs": [registry.descriptor("application/json", LAYER)],
        "subject": subject,
    }
    digest, _ = await repo.push("sbom", json.dumps(document).encode(), oci.OCI_ARTIFACT)
    (found,) = await repo.referrers(str(subject["digest"]))
    assert (found["digest"], found["artifactType"]) == (digest, "application/vnd.example.sbom")
    assert await repo.error("DELETE", f"/blobs/{DIGEST}") == (405, "UNSUPPORTED")


async def test_a_manifest_whose_blob_is_missing_is_refused(repo: workflow.Repo) -> None:
    await repo.push_blob(workflow.EMPTY)
    manifest = registry.image_manifest(workflow.EMPTY, LAYER)
    status, _, body = await repo.put("v1", manifest)
    (fault,) = json.loads(body)["errors"]
    assert (status, fault["code"]) == (404, "MANIFEST_BLOB_UNKNOWN")
    assert DIGEST in fault["message"]


@pytest.mark.parametrize("media_type", [FOREIGN, "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip"])
async def test_a_layer_that_comes_from_elsewhere_need_not_be_there(repo: workflow.Repo, media_type: str) -> None:
    await repo.push_blob(workflow.EMPTY)
    document = json.loads(registry.image_manifest(workflow.EMPTY))
    layer = {**registry.descriptor(media_type, LAYER), "urls": ["https://example.com/layer"]}
    await repo.push("v1", json.dumps({**document, "layers": [layer]}).encode())
    assert await repo.error("GET", f"/blobs/{DIGEST}") == (404, "BLOB_UNKNOWN")


async def test_a_manifest_of_four_mebibytes_is_taken_and_a_larger_one_is_413(repo: workflow.Repo) -> None:
    await repo.push_blob(workflow.EMPTY)
    manifest = registry.image_manifest(workflow.EMPTY)
    manifest += b" " * (oci.MANIFEST_LIMIT - len(manifest))
    assert (await repo.put("v1", manifest))[0] == 201
    status, _, body = await repo.put("v2", manifest + b" ")
    assert (status, json.loads(body)["errors"][0]["code"]) == (413, "SIZE_INVALID")


async def test_the_type_of_a_manifest_may_have_parameters_or_be_left_out(repo: workflow.Repo) -> None:
    await repo.push_blob(workflow.EMPTY)
    manifest = registry.image_manifest(workflow.EMPTY)
    for tag, media_type in (("a", f"{oci.OCI_MANIFEST}; charset=utf-8"), ("b", "")):
        assert (await repo.put(tag, manifest, media_type))[0] == 201
        assert (await repo.call("HEAD", f"/manifests/{tag}"))[1]["Content-Type"] == oci.OCI_MANIFEST


async def test_a_type_other_than_the_manifest_says_is_400(repo: workflow.Repo) -> None:
    _, manifest = await repo.push_image("v1")
    for media_type in (oci.OCI_INDEX, oci.DOCKER_MANIFEST, "text/html"):
        status, _, body = await repo.put("v1", manifest, media_type)
        assert (status, json.loads(body)["errors"][0]["code"]) == (400, "MANIFEST_INVALID")


async def test_a_manifest_with_a_subject_is_answered_with_oci_subject(repo: workflow.Repo) -> None:
    digest, manifest = await repo.push_image("v1")
    about = registry.image_manifest(workflow.EMPTY, subject=registry.descriptor(oci.OCI_MANIFEST, manifest))
    status, headers, _ = await repo.put(oci.digest_of(about), about)
    assert (status, headers["OCI-Subject"]) == (201, digest)
    plain = registry.image_manifest(workflow.EMPTY, annotations={"other": "one"})
    assert "OCI-Subject" not in (await repo.put("plain", plain))[1]


async def test_a_subject_need_not_be_there(repo: workflow.Repo) -> None:
    await repo.push_blob(workflow.EMPTY)
    for algorithm in (oci.SHA256, oci.SHA512):
        missing = {"mediaType": oci.OCI_MANIFEST, "digest": workflow.unknown(algorithm), "size": 123}
        about = registry.image_manifest(workflow.EMPTY, subject=missing)
        status, headers, _ = await repo.put(oci.digest_of(about), about)
        assert (status, headers["OCI-Subject"]) == (201, missing["digest"])
        assert len(await repo.referrers(str(missing["digest"]))) == 1


async def test_a_push_may_say_what_it_counts_on(repo: workflow.Repo) -> None:
    digest, manifest = await repo.push_image("v1")
    newer = registry.image_manifest(workflow.EMPTY, annotations={"a": "newer"})
    assert (await repo.put("v1", newer, If_None_Match="*"))[0] == 412
    assert (await repo.put("v1", newer, If_Match=f'"{workflow.unknown()}"'))[0] == 412
    assert (await repo.put("new", newer, If_Match="*"))[0] == 412
    assert (await repo.call("GET", "/manifests/v1"))[2] == manifest
    assert (await repo.put("v1", newer, If_Match=f'"{digest}"'))[0] == 201
    assert (await repo.put("v1", newer, If_Match=f'"{digest}"'))[0] == 201  # its first answer was lost
    assert (await repo.put("new", newer, If_None_Match="*"))[0] == 201


async def test_of_pushes_that_count_on_the_same_state_one_wins(repo: workflow.Repo) -> None:
    digest, _ = await repo.push_image("v1")
    manifests = [registry.image_manifest(workflow.EMPTY, annotations={"n": str(n)}) for n in range(6)]
    answers = await asyncio.gather(*(repo.put("v1", manifest, If_Match=f'"{digest}"') for manifest in manifests))
    assert sorted(status for status, _, _ in answers) == [201, 412, 412, 412, 412, 412]
