"""OCI distribution specification 1.1: pushing blobs (in one piece, in chunks, by mount) and manifests."""

import asyncio
import json
from pathlib import Path

import pytest

from covey.client import oci
from tests.support import registry

LAYER = bytes(range(256)) * 1000
DIGEST = oci.digest_of(LAYER)
SESSIONS = "/v2/a/blobs/uploads/"


async def begin(server: registry.Server) -> str:
    status, headers, _ = await server.call("POST", SESSIONS)
    assert status == 202
    return headers["Location"]


async def assert_pushed(server: registry.Server, repository: str = "a") -> None:
    status, _, body = await server.call("GET", f"/v2/{repository}/blobs/{DIGEST}")
    assert (status, body) == (200, LAYER)


async def test_monolithic_in_one_post(server: registry.Server) -> None:
    status, headers, _ = await server.call("POST", f"{SESSIONS}?digest={DIGEST}", LAYER)
    assert (status, headers["Location"]) == (201, f"/v2/a/blobs/{DIGEST}")
    await assert_pushed(server)


async def test_monolithic_by_post_then_put(server: registry.Server) -> None:
    location = await begin(server)
    status, headers, _ = await server.call("PUT", f"{location}?digest={DIGEST}", LAYER)
    assert (status, headers["Docker-Content-Digest"]) == (201, DIGEST)
    await assert_pushed(server)


async def test_chunked(server: registry.Server) -> None:
    location = await begin(server)
    for start, end in ((0, 1000), (1000, 70_000), (70_000, len(LAYER))):
        status, headers, _ = await server.call("PATCH", location, LAYER[start:end], Content_Range=f"{start}-{end - 1}")
        assert (status, headers["Range"]) == (202, f"0-{end - 1}")
        location = headers["Location"]
    status, headers, _ = await server.call("GET", location)
    assert (status, headers["Range"]) == (204, f"0-{len(LAYER) - 1}")
    assert (await server.call("PUT", f"{location}?digest={DIGEST}"))[0] == 201
    await assert_pushed(server)


async def test_the_last_chunk_may_come_with_the_put(server: registry.Server) -> None:
    location = await begin(server)
    await server.call("PATCH", location, LAYER[:5000], Content_Range="0-4999")
    status, _, _ = await server.call(
        "PUT", f"{location}?digest={DIGEST}", LAYER[5000:], Content_Range=f"5000-{len(LAYER) - 1}"
    )
    assert status == 201
    await assert_pushed(server)


async def test_streamed_without_a_range_appends(server: registry.Server) -> None:
    location = await begin(server)
    for piece in (LAYER[:777], LAYER[777:]):
        assert (await server.call("PATCH", location, piece))[0] == 202
    assert (await server.call("PUT", f"{location}?digest={DIGEST}"))[0] == 201
    await assert_pushed(server)


async def test_chunks_out_of_order_are_416_and_tell_where_the_upload_stands(server: registry.Server) -> None:
    location = await begin(server)
    await server.call("PATCH", location, LAYER[:1000], Content_Range="0-999")
    for first, last in ((0, 999), (999, 1998), (2000, 2999)):
        body = LAYER[first : last + 1]
        status, headers, _ = await server.call("PATCH", location, body, Content_Range=f"{first}-{last}")
        assert (status, headers["Range"], headers[oci.OFFSET_HEADER]) == (416, "0-999", "1000")
    status, _, _ = await server.call("PUT", f"{location}?digest={DIGEST}", LAYER[5:9], Content_Range="5-8")
    assert status == 416
    await server.call("PATCH", location, LAYER[1000:], Content_Range=f"1000-{len(LAYER) - 1}")
    assert (await server.call("PUT", f"{location}?digest={DIGEST}"))[0] == 201
    await assert_pushed(server)


async def test_two_chunks_at_one_offset_at_once_one_wins(server: registry.Server) -> None:
    location = await begin(server)
    answers = await asyncio.gather(
        *(server.call("PATCH", location, LAYER, Content_Range=f"0-{len(LAYER) - 1}") for _ in range(5))
    )
    assert sorted(status for status, _, _ in answers) == [202, 416, 416, 416, 416]
    assert (await server.call("PUT", f"{location}?digest={DIGEST}"))[0] == 201
    await assert_pushed(server)


async def test_an_empty_blob(server: registry.Server) -> None:
    location = await begin(server)
    assert (await server.call("PUT", f"{location}?digest={oci.digest_of(b'')}"))[0] == 201
    assert (await server.call("GET", f"/v2/a/blobs/{oci.digest_of(b'')}"))[::2] == (200, b"")


async def test_the_closing_put_may_be_repeated(server: registry.Server) -> None:
    location = await begin(server)
    await server.call("PATCH", location, LAYER)
    answers = [await server.call("PUT", f"{location}?digest={DIGEST}") for _ in range(2)]
    assert [status for status, _, _ in answers] == [201, 201]


async def test_an_upload_may_be_cancelled(server: registry.Server, tmp_path: Path) -> None:
    location = await begin(server)
    await server.call("PATCH", location, LAYER)
    assert (await server.call("DELETE", location))[0] == 204
    assert (await server.error("GET", location))[:2] == (404, "BLOB_UPLOAD_UNKNOWN")
    assert (await server.error("PATCH", location, b"more"))[:2] == (404, "BLOB_UPLOAD_UNKNOWN")
    assert list((tmp_path / "uploads").iterdir()) == []


async def test_mount_from_another_repository_moves_nothing(server: registry.Server) -> None:
    await server.push_blob("source/of", LAYER)
    status, headers, _ = await server.call("POST", f"{SESSIONS}?mount={DIGEST}&from=source/of")
    assert (status, headers["Location"]) == (201, f"/v2/a/blobs/{DIGEST}")
    await assert_pushed(server)


async def test_mount_without_a_source_finds_it(server: registry.Server) -> None:
    await server.push_blob("source", LAYER)
    assert (await server.call("POST", f"{SESSIONS}?mount={DIGEST}"))[0] == 201
    await assert_pushed(server)


@pytest.mark.parametrize("source", ["empty", "../a", "%2e%2e"])
async def test_mount_of_what_the_source_lacks_opens_an_upload(server: registry.Server, source: str) -> None:
    await server.push_blob("elsewhere", LAYER)
    status, headers, _ = await server.call("POST", f"{SESSIONS}?mount={DIGEST}&from={source}")
    assert status == 202
    assert (await server.call("PUT", f"{headers['Location']}?digest={DIGEST}", LAYER))[0] == 201


async def test_a_manifest_by_tag_and_by_digest_alone(server: registry.Server) -> None:
    manifest = await server.manifest("a", LAYER)
    digest = oci.digest_of(manifest)
    status, headers, _ = await server.put_manifest("a", digest, manifest)
    assert (status, headers["Docker-Content-Digest"]) == (201, digest)
    assert json.loads((await server.call("GET", "/v2/a/tags/list"))[2])["tags"] == []
    assert (await server.put_manifest("a", "v1", manifest))[0] == 201
    assert (await server.call("GET", "/v2/a/manifests/v1"))[2] == manifest


async def test_a_plain_image_s_tag_may_move(server: registry.Server) -> None:
    await server.push_image("a", "latest", b"one")
    digest, _ = await server.push_image("a", "latest", b"two")
    assert (await server.call("HEAD", "/v2/a/manifests/latest"))[1]["Docker-Content-Digest"] == digest


async def test_an_index_names_manifests_of_its_repository(server: registry.Server) -> None:
    digest, manifest = await server.push_image("a", "amd64", LAYER)
    index = json.dumps(
        {"schemaVersion": 2, "mediaType": oci.OCI_INDEX, "manifests": [registry.descriptor(oci.OCI_MANIFEST, manifest)]}
    ).encode()
    assert (await server.put_manifest("a", "all", index, Content_Type=oci.OCI_INDEX))[0] == 201
    status, headers, body = await server.call("GET", "/v2/a/manifests/all")
    assert (status, headers["Content-Type"], body) == (200, oci.OCI_INDEX, index)
    assert (await server.put_manifest("b", "all", index, Content_Type=oci.OCI_INDEX))[0] == 404
    assert digest in index.decode()


async def test_a_subject_that_is_not_there_yet_is_taken_and_named(server: registry.Server) -> None:
    await server.push_blob("a", b"{}")
    subject = registry.descriptor(oci.OCI_MANIFEST, b"to come")
    status, headers, _ = await server.put_manifest("a", "sig", registry.image_manifest(b"{}", subject=subject))
    assert (status, headers["OCI-Subject"]) == (201, subject["digest"])
