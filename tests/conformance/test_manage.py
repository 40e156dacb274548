"""OCI distribution specification 1.1: content discovery (tags) and content management (delete)."""

import json
import re

import pytest

from covey.client import oci
from tests.support import registry

TAGS = ["1", "1.0", "B", "_x", "a", "latest", "z9"]


async def tags(server: registry.Server, query: str = "") -> tuple[list[str], str]:
    status, headers, body = await server.call("GET", f"/v2/a/tags/list{query}")
    assert status == 200
    document = json.loads(body)
    assert document["name"] == "a"
    return document["tags"], headers.get("Link", "")


async def test_tags_are_listed_in_lexical_order(server: registry.Server) -> None:
    for tag in reversed(TAGS):
        await server.push_image("a", tag, tag.encode())
    assert await tags(server) == (TAGS, "")


async def test_tags_come_in_pages_that_link_to_each_other(server: registry.Server) -> None:
    for tag in TAGS:
        await server.push_image("a", tag, b"same")
    seen: list[str] = []
    path = "/v2/a/tags/list?n=3"
    while path:
        _, headers, body = await server.call("GET", path)
        page = json.loads(body)["tags"]
        assert len(page) <= 3
        seen += page
        link = headers.get("Link", "")
        path = re.fullmatch(r'<(.+)>; rel="next"', link)[1] if link else ""  # type: ignore[index]
    assert seen == TAGS


async def test_a_page_may_be_empty_and_start_anywhere(server: registry.Server) -> None:
    for tag in TAGS:
        await server.push_image("a", tag, b"same")
    assert (await tags(server, "?n=0"))[0] == []
    assert (await tags(server, "?last=a"))[0] == ["latest", "z9"]
    assert (await tags(server, "?n=2&last=B"))[0] == ["_x", "a"]
    assert await tags(server, "?n=100") == (TAGS, "")


@pytest.mark.parametrize("n", ["-1", "x", "1.5", "٣"])
async def test_a_page_of_nonsense_is_400(server: registry.Server, n: str) -> None:
    await server.push_image("a", "v", b"x")
    assert (await server.error("GET", f"/v2/a/tags/list?n={n}"))[:2] == (400, "PAGINATION_NUMBER_INVALID")


async def test_an_unknown_repository_has_no_tags(server: registry.Server) -> None:
    assert (await server.error("GET", "/v2/never/tags/list"))[:2] == (404, "NAME_UNKNOWN")


async def test_deleting_a_tag_leaves_its_manifest(server: registry.Server) -> None:
    digest, _ = await server.push_image("a", "v1", b"x")
    assert (await server.call("DELETE", "/v2/a/manifests/v1"))[0] == 202
    assert (await server.error("GET", "/v2/a/manifests/v1"))[0] == 404
    assert (await server.call("GET", f"/v2/a/manifests/{digest}"))[0] == 200
    assert await tags(server) == ([], "")
    assert (await server.error("DELETE", "/v2/a/manifests/v1"))[:2] == (404, "MANIFEST_UNKNOWN")


async def test_deleting_a_manifest_takes_its_tags_along(server: registry.Server) -> None:
    digest, manifest = await server.push_image("a", "v1", b"x")
    await server.put_manifest("a", "v2", manifest)
    await server.push_image("a", "other", b"y")
    assert (await server.call("DELETE", f"/v2/a/manifests/{digest}"))[0] == 202
    assert await tags(server) == (["other"], "")
    assert (await server.error("GET", f"/v2/a/manifests/{digest}"))[:2] == (404, "MANIFEST_UNKNOWN")
    assert (await server.put_manifest("a", "v1", manifest))[0] == 201
    assert (await server.call("GET", "/v2/a/manifests/v1"))[2] == manifest


async def test_deleting_a_blob_takes_it_from_this_repository_only(server: registry.Server) -> None:
    digest = await server.push_blob("a", b"x")
    await server.push_blob("b", b"x")
    assert (await server.call("DELETE", f"/v2/a/blobs/{digest}"))[0] == 202
    assert (await server.error("GET", f"/v2/a/blobs/{digest}"))[:2] == (404, "BLOB_UNKNOWN")
    assert (await server.error("DELETE", f"/v2/a/blobs/{digest}"))[:2] == (404, "BLOB_UNKNOWN")
    assert (await server.call("GET", f"/v2/b/blobs/{digest}"))[::2] == (200, b"x")


async def test_a_blob_that_a_manifest_needs_is_not_deleted(server: registry.Server) -> None:
    digest, _ = await server.push_image("a", "v1", b"x")
    layer = await server.push_blob("a", b"x")
    status, code, message = await server.error("DELETE", f"/v2/a/blobs/{layer}")
    assert (status, code) == (405, "UNSUPPORTED")
    assert digest in message
    await server.call("DELETE", f"/v2/a/manifests/{digest}")
    assert (await server.call("DELETE", f"/v2/a/blobs/{layer}"))[0] == 202


async def test_referrers_of_a_manifest_with_and_without_a_filter(server: registry.Server) -> None:
    digest, manifest = await server.push_image("a", "v1", b"x")
    subject = registry.descriptor(oci.OCI_MANIFEST, manifest)
    pushed = {}
    for kind in ("sbom", "signature"):
        content = registry.image_manifest(b"{}", artifactType=f"x/{kind}", subject=subject, annotations={"k": kind})
        pushed[kind] = registry.descriptor(oci.OCI_MANIFEST, content)
        assert (await server.put_manifest("a", str(pushed[kind]["digest"]), content))[0] == 201

    async def referrers(of: str, query: str = "") -> tuple[list[dict[str, object]], str]:
        status, headers, body = await server.call("GET", f"/v2/a/referrers/{of}{query}")
        index = json.loads(body)
        assert (status, headers["Content-Type"], index["mediaType"]) == (200, oci.OCI_INDEX, oci.OCI_INDEX)
        return index["manifests"], headers.get("OCI-Filters-Applied", "")

    found, _ = await referrers(digest)
    expected = [
        {**pushed[kind], "artifactType": f"x/{kind}", "annotations": {"k": kind}} for kind in ("sbom", "signature")
    ]
    assert found == expected
    assert await referrers(digest, "?artifactType=x/sbom") == (expected[:1], "artifactType")
    assert await referrers("sha256:" + "0" * 64) == ([], "")
    await server.call("DELETE", f"/v2/a/manifests/{pushed['sbom']['digest']}")
    assert (await referrers(digest))[0] == expected[1:]
