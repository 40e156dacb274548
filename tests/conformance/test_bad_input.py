"""What no registry should swallow: each gets a clear error in the specification's form, and leaves nothing behind.

These look into the registry's folder: on a disk only.
"""

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from covey import failpoint
from covey.client import oci
from tests.support import registry

LAYER = bytes(range(256)) * 1000
DIGEST = oci.digest_of(LAYER)
WRONG = oci.digest_of(b"something else")
SESSIONS = "/v2/a/blobs/uploads/"


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[registry.Server]:
    async with registry.serving(tmp_path) as server:
        yield server


def files(base: Path) -> list[str]:
    """Every file below the registry's folder but the one that an empty registry has."""
    return sorted(str(path.relative_to(base)) for path in base.rglob("*") if path.is_file() and path.name != "format")


async def wait_until_no_files(base: Path) -> None:
    async with asyncio.timeout(60):
        while files(base):
            await asyncio.sleep(0.01)


@pytest.fixture
def disk_full() -> Iterator[None]:
    yield
    failpoint.arm("")


async def test_a_wrong_digest_is_refused_in_one_post(server: registry.Server, tmp_path: Path) -> None:
    status, code, message = await server.error("POST", f"{SESSIONS}?digest={WRONG}", LAYER)
    assert (status, code) == (400, "DIGEST_INVALID")
    assert DIGEST in message and WRONG in message
    assert files(tmp_path) == []


async def test_a_wrong_digest_is_refused_after_chunks(server: registry.Server, tmp_path: Path) -> None:
    _, headers, _ = await server.call("POST", SESSIONS)
    location = headers["Location"]
    for half in (LAYER[:500], LAYER[500:]):
        await server.call("PATCH", location, half)
    assert (await server.error("PUT", f"{location}?digest={WRONG}"))[:2] == (400, "DIGEST_INVALID")
    assert (await server.error("GET", location))[:2] == (404, "BLOB_UPLOAD_UNKNOWN")
    assert files(tmp_path) == []


@pytest.mark.parametrize(
    "digest", ["sha256:12", "sha256:" + "G" * 64, "sha256:" + "A" * 64, "md5:" + "0" * 32, "x", "", "sha256:../../x"]
)
async def test_a_malformed_digest(server: registry.Server, tmp_path: Path, digest: str) -> None:
    assert (await server.error("POST", f"{SESSIONS}?digest={digest}", LAYER))[:2] == (400, "DIGEST_INVALID")
    assert files(tmp_path) == []


async def test_a_closing_put_without_digest(server: registry.Server) -> None:
    _, headers, _ = await server.call("POST", SESSIONS)
    assert (await server.error("PUT", headers["Location"]))[:2] == (400, "DIGEST_INVALID")


async def raw(server: registry.Server, head: str, body: bytes, *, end: bool) -> None:
    """Send a request that promises more bytes than it brings, and hang up."""
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    writer.write(f"{head}\r\nHost: x\r\nContent-Length: {len(LAYER)}\r\n\r\n".encode() + body)
    await writer.drain()
    if end:
        writer.write_eof()
        await reader.read()
    writer.close()
    await writer.wait_closed()


@pytest.mark.parametrize("end", [True, False], ids=["half-closed", "closed"])
async def test_a_truncated_post_leaves_nothing(server: registry.Server, tmp_path: Path, end: bool) -> None:
    await raw(server, f"POST {SESSIONS}?digest={DIGEST} HTTP/1.1", LAYER[:200_000], end=end)
    await wait_until_no_files(tmp_path)
    assert (await server.call("HEAD", f"/v2/a/blobs/{DIGEST}"))[0] == 404


async def test_a_truncated_chunk_counts_as_far_as_it_came(server: registry.Server, tmp_path: Path) -> None:
    content = LAYER * 40  # several batches: what was written can be seen while the request goes on
    digest = oci.digest_of(content)
    _, headers, _ = await server.call("POST", SESSIONS)
    location = headers["Location"]
    _, writer = await asyncio.open_connection("127.0.0.1", server.port)
    writer.write(f"PATCH {location} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(content)}\r\n\r\n".encode())
    writer.write(content[:-1000])
    async with asyncio.timeout(60):
        while not any(path.stat().st_size for path in tmp_path.glob("uploads/*/data.*")):
            await asyncio.sleep(0.01)
        writer.close()
        await writer.wait_closed()
        while (offset := int((await server.call("GET", location))[1][oci.OFFSET_HEADER])) == 0:
            await asyncio.sleep(0.01)
    assert offset <= len(content) - 1000
    assert (await server.call("PATCH", location, content[offset:]))[0] == 202
    assert (await server.call("PUT", f"{location}?digest={digest}"))[0] == 201
    assert (await server.call("GET", f"/v2/a/blobs/{digest}"))[2] == content


@pytest.mark.parametrize(
    "text", ["abc", "5-", "-5", "bytes 1-2-3", "9-3", "0-5", "", "0-٣", "0-" + "9" * 5000, "0x0-0x3", "0-3, 4-7"]
)
async def test_a_content_range_that_makes_no_sense(server: registry.Server, text: str) -> None:
    _, headers, _ = await server.call("POST", SESSIONS)
    status, code, _ = await server.error("PATCH", headers["Location"], b"four", Content_Range=text)
    assert (status, code) in ((400, "BLOB_UPLOAD_INVALID"), (400, "SIZE_INVALID"))


async def exchange(server: registry.Server, *pieces: bytes) -> bytes:
    """Everything that comes back for these bytes until the server hangs up."""
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    for piece in pieces:
        writer.write(piece)
        await writer.drain()
    async with asyncio.timeout(60):
        answer = await reader.read()
    writer.close()
    await writer.wait_closed()
    return answer


async def test_a_body_longer_than_announced_is_no_blob(server: registry.Server) -> None:
    digest = oci.digest_of(b"1234567890")
    head = f"POST {SESSIONS}?digest={digest} HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\n".encode()
    answer = await exchange(server, head + b"1234567890\r\n\r\n")
    assert answer.startswith((b"HTTP/1.1 400", b"HTTP/1.0 400"))
    assert (await server.call("GET", f"/v2/a/blobs/{digest}"))[0] == 404


@pytest.mark.parametrize("length", ["-1", "x", "5, 6", "0x5", "9" * 5000])
async def test_a_length_that_is_none(server: registry.Server, tmp_path: Path, length: str) -> None:
    head = f"POST {SESSIONS}?digest={DIGEST} HTTP/1.1\r\nHost: x\r\nContent-Length: {length}\r\n\r\n".encode()
    answer = await exchange(server, head, b"12345")
    assert answer.startswith((b"HTTP/1.1 400", b"HTTP/1.0 400")), answer
    assert files(tmp_path) == []


async def test_two_lengths_are_one_too_many(server: registry.Server, tmp_path: Path) -> None:
    both = b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n5\r\n12345\r\n0\r\n\r\n"
    answer = await exchange(server, f"POST {SESSIONS}?digest={DIGEST} HTTP/1.1\r\nHost: x\r\n".encode() + both)
    assert answer.startswith((b"HTTP/1.1 400", b"HTTP/1.0 400")), answer
    assert files(tmp_path) == []


async def test_a_chunked_body_that_breaks_off_is_gone_on_with(server: registry.Server, tmp_path: Path) -> None:
    content = LAYER * 40  # several batches: what was written can be seen while the request goes on
    digest, half = oci.digest_of(content), len(content) // 2
    _, headers, _ = await server.call("POST", SESSIONS)
    location = headers["Location"]
    head = f"PATCH {location} HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n{half:x}\r\n".encode()
    _, writer = await asyncio.open_connection("127.0.0.1", server.port)
    writer.write(head + content[:half] + f"\r\n{half:x}\r\n".encode() + content[half : half + 50_000])
    async with asyncio.timeout(60):
        while not any(path.stat().st_size for path in tmp_path.glob("uploads/*/data.*")):
            await asyncio.sleep(0.01)
        writer.close()
        await writer.wait_closed()
        while not (offset := int((await server.call("GET", location))[1][oci.OFFSET_HEADER])):
            await asyncio.sleep(0.01)
    assert offset <= half + 50_000
    wrong = f"{offset + 1}-{len(content) - 1}"
    assert (await server.call("PATCH", location, content[offset + 1 :], Content_Range=wrong))[0] == 416
    right = f"{offset}-{len(content) - 1}"
    assert (await server.call("PATCH", location, content[offset:], Content_Range=right))[0] == 202
    assert (await server.call("PUT", f"{location}?digest={digest}"))[0] == 201
    assert (await server.call("GET", f"/v2/a/blobs/{digest}"))[2] == content


@pytest.mark.parametrize("path", ["/v2/" + "a/" * 50_000 + "tags/list", "/v2/" + "%61" * 3000 + "/tags/list"])
async def test_a_path_that_is_too_long(server: registry.Server, path: str) -> None:
    answer = await exchange(server, f"GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
    assert answer.startswith((b"HTTP/1.1 400", b"HTTP/1.0 400", b"HTTP/1.1 414", b"HTTP/1.0 414")), answer[:200]


@pytest.mark.parametrize("query", ["n=" + "9" * 5000, "n=1&n=x", "last=" + "z" * 5000, "last=%00", "last=%ff"])
async def test_pages_of_nonsense(server: registry.Server, query: str) -> None:
    await server.push_image("a", "v1", b"x")
    assert (await server.call("GET", f"/v2/a/tags/list?{query}"))[0] in (200, 400)


@pytest.mark.parametrize("wanted", ["bytes=" + "9" * 5000 + "-", "bytes=-" + "9" * 5000, "bytes=٣-٤", "bytes=0-\x7f"])
async def test_ranges_of_nonsense(server: registry.Server, wanted: str) -> None:
    digest = await server.push_blob("a", LAYER)
    head = f"GET /v2/a/blobs/{digest} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nRange: {wanted}\r\n\r\n".encode()
    assert (await exchange(server, head)).startswith((b"HTTP/1.1 200", b"HTTP/1.1 400", b"HTTP/1.0 400"))


@pytest.mark.parametrize("session", ["x", "0" * 32, "..", "%2e%2e", "..%2f..", "%00"])
async def test_an_upload_session_that_does_not_exist(server: registry.Server, session: str) -> None:
    for method, query in (("GET", ""), ("PATCH", ""), ("PUT", f"?digest={DIGEST}"), ("DELETE", "")):
        status, _, body = await server.call(method, f"{SESSIONS}{session}{query}", None if method == "GET" else b"x")
        assert status in (400, 404, 405), body
        assert "errors" in json.loads(body)


@pytest.mark.parametrize(
    "name",
    [
        "..",
        "%2e%2e",
        "a/../b",
        "a/%2e%2e/b",
        "%2e%2e%2f%2e%2e%2fetc",
        "a%2f..%2fb",
        "A",
        "a__",
        "-a",
        "a_-b",
        "_names/x",
        "a/_log",
        "a%00b",
        "a%0ab",
        "a b",
        "é",
        "x" * 256,
        "a\\b",
    ],
)
async def test_path_tricks_in_repository_names(server: registry.Server, tmp_path: Path, name: str) -> None:
    for method, path in (
        ("POST", f"/v2/{name}/blobs/uploads/?digest={DIGEST}"),
        ("PUT", f"/v2/{name}/manifests/v1"),
        ("GET", f"/v2/{name}/tags/list"),
        ("GET", f"/v2/{name}/blobs/{DIGEST}"),
    ):
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        body = LAYER if method in ("POST", "PUT") else b""
        head = f"{method} {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {len(body)}\r\n\r\n"
        writer.write(head.encode() + body)
        answer = await reader.read()
        writer.close()
        await writer.wait_closed()
        assert answer.startswith((b"HTTP/1.1 400", b"HTTP/1.0 400", b"HTTP/1.1 404")), (path, answer)
    assert files(tmp_path) == []


@pytest.mark.parametrize("reference", [".x", "-x", "a b", "x" * 129, "a/b", "sha256:12", "%2e%2e", "é"])
async def test_a_reference_that_is_neither_tag_nor_digest(server: registry.Server, reference: str) -> None:
    manifest = await server.manifest("a", LAYER)
    status, _, body = await server.put_manifest("a", reference, manifest)
    assert status in (400, 404), body


async def test_a_manifest_naming_a_missing_blob(server: registry.Server, tmp_path: Path) -> None:
    await server.push_blob("a", b"{}")
    before = files(tmp_path)
    missing = registry.image_manifest(b"{}", LAYER)
    status, _, body = await server.put_manifest("a", "v1", missing)
    (fault,) = json.loads(body)["errors"]
    assert (status, fault["code"]) == (404, "MANIFEST_BLOB_UNKNOWN")
    assert DIGEST in fault["message"]
    assert files(tmp_path) == before


async def test_a_blob_of_another_repository_is_missing_too(server: registry.Server) -> None:
    await server.push_blob("a", b"{}")
    await server.push_blob("other", LAYER)
    assert (await server.put_manifest("a", "v1", registry.image_manifest(b"{}", LAYER)))[0] == 404


async def test_a_manifest_that_lies_about_a_size(server: registry.Server) -> None:
    manifest = json.loads(await server.manifest("a", LAYER))
    manifest["layers"][0]["size"] += 1
    status, _, body = await server.put_manifest("a", "v1", json.dumps(manifest).encode())
    assert (status, json.loads(body)["errors"][0]["code"]) == (400, "MANIFEST_INVALID")


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"not json",
        b"[]",
        b"{}",
        b'{"schemaVersion": 1}',
        b'{"schemaVersion": 2}',
        b'{"schemaVersion": "2"}',
        b'{"schemaVersion": 2, "layers": {}}',
        b'{"schemaVersion": 2, "config": {"mediaType": "x", "digest": "../../etc/passwd", "size": 1}}',
        b'{"schemaVersion": 2, "config": {"mediaType": "x", "digest": "sha256:' + b"0" * 64 + b'", "size": -1}}',
        b'{"schemaVersion": 2, "mediaType": "application/vnd.oci.image.index.v1+json"}',
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"schemaVersion": 2, "x": ' + b"[" * 100_000,
        b'{"schemaVersion": 2, "x": ' + b"9" * 10_000 + b"}",
        b'{"schemaVersion": 2, "config": null, "layers": null}',
        b'{"schemaVersion": 2, "config": {"mediaType": "x", "digest": "md5:00", "size": 1}}',
        b'{"schemaVersion": 2, "config": {"mediaType": "x", "digest": "sha512:' + b"0" * 64 + b'", "size": 1}}',
        b'{"schemaVersion": 2, "layers": [null]}',
        b'{"schemaVersion": 2, "annotations": {"k": 1}}',
    ],
)
async def test_what_is_no_manifest(server: registry.Server, tmp_path: Path, body: bytes) -> None:
    status, _, answer = await server.put_manifest("a", "v1", body)
    assert (status, json.loads(answer)["errors"][0]["code"]) == (400, "MANIFEST_INVALID")
    assert files(tmp_path) == []


async def test_a_manifest_of_a_foreign_type(server: registry.Server) -> None:
    manifest = await server.manifest("a", LAYER)
    status, _, body = await server.put_manifest("a", "v1", manifest, Content_Type="text/html")
    assert (status, json.loads(body)["errors"][0]["code"]) == (400, "MANIFEST_INVALID")


async def test_a_document_that_is_image_and_index_at_once(server: registry.Server) -> None:
    manifest = await server.manifest("a", LAYER)
    both = json.dumps({**json.loads(manifest), "manifests": [registry.descriptor(oci.OCI_MANIFEST, manifest)]}).encode()
    for media_type in (oci.OCI_MANIFEST, oci.OCI_INDEX):
        plain = both.replace(b'"mediaType": "application/vnd.oci.image.manifest.v1+json", "config"', b'"config"')
        status, _, body = await server.put_manifest("a", "v1", plain, Content_Type=media_type)
        assert (status, json.loads(body)["errors"][0]["code"]) == (400, "MANIFEST_INVALID")


async def test_a_template_that_is_no_image(server: registry.Server) -> None:
    repository = "templates/12345678-1234-1234-1234-123456789abc"
    annotations = {oci.NAME: "x", oci.TAG: "v1"}
    for media_type in (oci.OCI_INDEX, oci.OCI_ARTIFACT):
        document = {"mediaType": media_type, "artifactType": oci.TEMPLATE, "annotations": annotations}
        body = json.dumps({"schemaVersion": 2, **document}).encode()
        status, _, answer = await server.put_manifest(repository, "v1", body, Content_Type=media_type)
        assert (status, json.loads(answer)["errors"][0]["code"]) == (400, "MANIFEST_INVALID")


async def test_text_that_no_encoding_has_is_refused_or_kept(server: registry.Server) -> None:
    manifest = (await server.manifest("a", LAYER))[:-1] + b', "annotations": {"k": "\\ud800"}}'
    status, _, body = await server.put_manifest("a", "v1", manifest)
    assert status in (201, 400), body
    assert (await server.call("GET", "/v2/a/tags/list"))[0] in (200, 404)


async def test_a_manifest_under_another_digest(server: registry.Server) -> None:
    manifest = await server.manifest("a", LAYER)
    status, _, body = await server.put_manifest("a", WRONG, manifest)
    assert (status, json.loads(body)["errors"][0]["code"]) == (400, "DIGEST_INVALID")


async def test_a_manifest_may_have_four_mebibytes_and_no_more(server: registry.Server) -> None:
    manifest = await server.manifest("a", LAYER)
    room = oci.MANIFEST_LIMIT - len(manifest)
    assert (await server.put_manifest("a", "v1", manifest + b" " * room))[0] == 201
    status, _, body = await server.put_manifest("a", "v2", manifest + b" " * (room + 1))
    assert (status, json.loads(body)["errors"][0]["code"]) == (413, "SIZE_INVALID")


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("PUT", "/v2/", 405, "UNSUPPORTED"),
        ("POST", "/v2/a/manifests/v1", 405, "UNSUPPORTED"),
        ("PATCH", "/v2/a/tags/list", 405, "UNSUPPORTED"),
        ("GET", "/v2/a", 404, "NOT_FOUND"),
        ("GET", "/v2/a/what", 404, "NOT_FOUND"),
    ],
)
async def test_paths_and_methods_that_are_not_there(
    server: registry.Server, method: str, path: str, status: int, code: str
) -> None:
    assert (await server.error(method, path, None if method == "GET" else b"{}"))[:2] == (status, code)


@pytest.mark.parametrize("point", ["registry.part.write", "registry.part.written", "registry.part.entered"])
@pytest.mark.usefixtures("disk_full")
async def test_a_full_disk_ends_a_push_cleanly_and_pulls_go_on(
    server: registry.Server, tmp_path: Path, point: str
) -> None:
    there = await server.push_blob("a", b"there before")
    before = files(tmp_path)
    _, headers, _ = await server.call("POST", SESSIONS)
    failpoint.arm(f"{point}=full")
    status, code, message = await server.error("PATCH", headers["Location"], LAYER)
    assert (status, code) == (507, "DISK_FULL")
    assert "full" in message
    assert (await server.error("POST", f"{SESSIONS}?digest={DIGEST}", LAYER))[:2] == (507, "DISK_FULL")
    assert files(tmp_path) == before
    assert (await server.call("GET", f"/v2/a/blobs/{there}"))[0] == 200
    assert (await server.call("GET", "/readyz"))[0] == 200


async def test_the_reserve_is_never_given_away(tmp_path: Path) -> None:
    async with registry.serving(tmp_path, reserved_bytes=1 << 60) as server:
        assert (await server.error("POST", f"{SESSIONS}?digest={DIGEST}", LAYER))[:2] == (507, "DISK_FULL")
        _, headers, _ = await server.call("POST", SESSIONS)
        assert (await server.error("PATCH", headers["Location"], LAYER))[:2] == (507, "DISK_FULL")
        assert (await server.error("GET", headers["Location"]))[0] == 404
        assert files(tmp_path) == []
        assert list((tmp_path / "uploads").iterdir()) == []
        status, _, body = await server.call("GET", "/readyz")
        assert status == 200
        assert "full" in json.loads(body)["body"]["trouble"]
        assert json.loads((await server.call("GET", "/registry/disk"))[2])["body"]["free"] == 0
