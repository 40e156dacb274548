"""Tools of other people's making against the registry: skopeo (Debian) and oras (PyPI).

What they cannot do is done by hand beside them: the oras of PyPI attaches by giving `push` a subject, but it has no
call that lists referrers, none that copies, and its delete takes the manifest of a tag and not the tag alone.
"""

import asyncio
import json
import shutil
import urllib.parse
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from covey.client import oci
from tests.conformance import workflow
from tests.support import registry

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import oras.client
    import oras.oci

LAYER = bytes(range(256)) * 4000
PLAIN = ("--preserve-digests", "--dest-tls-verify=false", "--src-tls-verify=false")


async def skopeo(*arguments: str) -> bytes:
    program = shutil.which("skopeo")
    assert program, "skopeo is not installed (Debian: apt-get install skopeo)"
    child = await asyncio.create_subprocess_exec(
        program, "--insecure-policy", *arguments, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    try:
        async with asyncio.timeout(60):
            out, err = await child.communicate()
    finally:
        if child.returncode is None:
            child.kill()
            await child.wait()
    assert child.returncode == 0, err.decode()
    return out


def host(repo: workflow.Repo) -> str:
    return urllib.parse.urlsplit(repo.server.url).netloc


def remote(repo: workflow.Repo, reference: str = "") -> str:
    return f"docker://{host(repo)}/{repo.name}{reference}"


def image_of(layer: bytes) -> tuple[bytes, bytes]:
    config = {"architecture": "amd64", "os": "linux", "rootfs": {"type": "layers", "diff_ids": [oci.digest_of(layer)]}}
    raw = json.dumps(config).encode()
    return raw, registry.image_manifest(raw, layer)


def layout(folder: Path, *layers: bytes) -> Path:
    """The OCI image layout on disk: one image, tagged v1, or an index of several."""
    blobs = folder / "blobs" / "sha256"
    blobs.mkdir(parents=True)
    manifests = []
    for layer in layers:
        config, manifest = image_of(layer)
        manifests.append(manifest)
        for content in (config, layer, manifest):
            (blobs / oci.digest_of(content)[7:]).write_bytes(content)
    media_type, top = oci.OCI_MANIFEST, manifests[0]
    if len(manifests) > 1:
        media_type, top = oci.OCI_INDEX, workflow.index(*manifests)
        (blobs / oci.digest_of(top)[7:]).write_bytes(top)
    named = {**registry.descriptor(media_type, top), "annotations": {"org.opencontainers.image.ref.name": "v1"}}
    (folder / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": [named]}))
    (folder / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')
    return folder


# ---- skopeo --------------------------------------------------------------------------------------------------------


async def test_skopeo_copies_an_image_in_on_and_out_and_deletes_it(
    repo: workflow.Repo, other: workflow.Repo, tmp_path: Path
) -> None:
    source, target = layout(tmp_path / "in", LAYER), tmp_path / "out"
    await skopeo("copy", *PLAIN, f"oci:{source}:v1", remote(repo, ":v1"))
    await skopeo("copy", *PLAIN, remote(repo, ":v1"), remote(other, ":v2"))
    assert json.loads(await skopeo("list-tags", "--tls-verify=false", remote(repo)))["Tags"] == ["v1"]
    assert json.loads(await skopeo("inspect", "--tls-verify=false", remote(repo, ":v1")))["Architecture"] == "amd64"
    await skopeo("copy", *PLAIN, remote(other, ":v2"), f"oci:{target}:v1")
    assert (target / "blobs" / "sha256" / oci.digest_of(LAYER)[7:]).read_bytes() == LAYER
    await skopeo("delete", "--tls-verify=false", remote(repo, ":v1"))
    assert await repo.status("/manifests/v1") == 404
    assert await other.status("/manifests/v2") == 200


async def test_skopeo_copies_an_index_with_all_its_images(
    repo: workflow.Repo, other: workflow.Repo, tmp_path: Path
) -> None:
    source = layout(tmp_path / "in", LAYER, LAYER[::-1])
    await skopeo("copy", "--all", *PLAIN, f"oci:{source}:v1", remote(repo, ":v1"))
    await skopeo("copy", "--all", *PLAIN, remote(repo, ":v1"), remote(other, ":v1"))
    _, headers, body = await other.call("GET", "/manifests/v1")
    assert headers["Content-Type"] == oci.OCI_INDEX
    for described in json.loads(body)["manifests"]:
        assert await other.status(f"/manifests/{described['digest']}") == 200


async def test_skopeo_pushes_a_docker_image(repo: workflow.Repo, tmp_path: Path) -> None:
    source = layout(tmp_path / "in", LAYER)
    await skopeo("copy", "--format=v2s2", "--dest-tls-verify=false", f"oci:{source}:v1", remote(repo, ":v1"))
    assert (await repo.call("HEAD", "/manifests/v1"))[1]["Content-Type"] == oci.DOCKER_MANIFEST
    await skopeo("copy", "--src-tls-verify=false", remote(repo, ":v1"), f"dir:{tmp_path / 'out'}")


# ---- oras ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def client(repo: workflow.Repo) -> Iterator[Any]:
    client = oras.client.OrasClient(hostname=host(repo), insecure=True)
    yield client
    client.session.close()


def target(repo: workflow.Repo, tag: str) -> str:
    return f"{host(repo)}/{repo.name}:{tag}"


async def push(client: Any, repo: workflow.Repo, tag: str, file: Path, **more: Any) -> None:
    await asyncio.to_thread(
        client.push,
        target(repo, tag),
        files=[f"{file}:application/vnd.example.file"],
        disable_path_validation=True,
        **more,
    )


@pytest.mark.parametrize("chunked", [False, True], ids=["monolithic", "chunked"])
async def test_oras_pushes_and_pulls_files(client: Any, repo: workflow.Repo, tmp_path: Path, chunked: bool) -> None:
    file, out = tmp_path / "file.bin", tmp_path / "out"
    file.write_bytes(LAYER)
    await push(client, repo, "v1", file, do_chunked=chunked, chunk_size=300_000)
    (found,) = await asyncio.to_thread(client.pull, target(repo, "v1"), outdir=str(out))
    assert Path(found).read_bytes() == LAYER
    assert await asyncio.to_thread(client.get_tags, target(repo, "v1")) == ["v1"]


async def test_oras_lists_many_tags_page_by_page(client: Any, repo: workflow.Repo) -> None:
    _, manifest = await repo.push_image()
    tags = [f"t{number:02}" for number in range(12)]
    for tag in tags:
        await repo.push(tag, manifest)
    assert await asyncio.to_thread(client.get_tags, f"{host(repo)}/{repo.name}", 12) == tags


async def test_oras_attaches_to_a_manifest_and_deletes_the_attachment(
    client: Any, repo: workflow.Repo, tmp_path: Path
) -> None:
    file = tmp_path / "sbom.json"
    file.write_text('{"spdx": true}')
    digest, manifest = await repo.push_image("v1", LAYER)
    subject = oras.oci.Subject(mediaType=oci.OCI_MANIFEST, digest=digest, size=len(manifest))
    await push(client, repo, "sbom", file, subject=subject, manifest_annotations={"what": "sbom"})
    (found,) = await repo.referrers(digest)
    assert found["annotations"] == {"what": "sbom"}
    _, _, body = await repo.call("GET", f"/manifests/{found['digest']}")
    assert json.loads(body)["subject"]["digest"] == digest
    assert await asyncio.to_thread(client.delete_tags, target(repo, "sbom"), "sbom") == ["sbom"]
    assert await repo.referrers(digest) == []
    assert await repo.tags() == ["v1"]
