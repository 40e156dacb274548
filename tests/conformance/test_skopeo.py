"""An existing OCI tool, skopeo, copies an image in, looks at it, copies it out and deletes it."""

import asyncio
import json
import shutil
from pathlib import Path

from covey.client import oci
from tests.support import registry

LAYER = bytes(range(256)) * 4000


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


def oci_layout(folder: Path) -> Path:
    """An image of one layer as the OCI image layout on disk."""
    blobs = folder / "blobs" / "sha256"
    blobs.mkdir(parents=True)
    config = json.dumps(
        {"architecture": "amd64", "os": "linux", "rootfs": {"type": "layers", "diff_ids": [oci.digest_of(LAYER)]}}
    ).encode()
    manifest = registry.image_manifest(config, LAYER)
    for content in (config, LAYER, manifest):
        (blobs / oci.digest_of(content)[7:]).write_bytes(content)
    described = {
        **registry.descriptor(oci.OCI_MANIFEST, manifest),
        "annotations": {"org.opencontainers.image.ref.name": "v1"},
    }
    (folder / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": [described]}))
    (folder / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')
    return folder


async def test_an_image_goes_in_and_comes_out(server: registry.Server, tmp_path: Path) -> None:
    source, target = oci_layout(tmp_path / "in"), tmp_path / "out"
    remote = f"docker://127.0.0.1:{server.port}/lib/image"
    plain = ("--preserve-digests", "--dest-tls-verify=false", "--src-tls-verify=false")
    await skopeo("copy", *plain, f"oci:{source}:v1", f"{remote}:v1")
    await skopeo("copy", *plain, f"{remote}:v1", f"docker://127.0.0.1:{server.port}/other:v2")
    assert json.loads(await skopeo("list-tags", "--tls-verify=false", remote))["Tags"] == ["v1"]
    assert json.loads(await skopeo("inspect", "--tls-verify=false", f"{remote}:v1"))["Architecture"] == "amd64"
    await skopeo("copy", *plain, f"docker://127.0.0.1:{server.port}/other:v2", f"oci:{target}:v1")
    name = oci.digest_of(LAYER)[7:]
    assert (target / "blobs" / "sha256" / name).read_bytes() == LAYER
    await skopeo("delete", "--tls-verify=false", f"{remote}:v1")
    assert (await server.call("GET", "/v2/lib/image/manifests/v1"))[0] == 404
    assert (await server.call("GET", "/v2/other/manifests/v2"))[0] == 200
