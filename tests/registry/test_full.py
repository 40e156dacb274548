"""A full disk: a push fails cleanly, pulls go on, the server stays ready and says so, and deleting makes room again."""

import json
from pathlib import Path

from covey.client import oci
from tests.support import disk, registry

LAYER = bytes(range(256)) * 16_000  # 4 MB
MIB = 1 << 20


async def test_a_full_disk_refuses_pushes_and_nothing_else(tmp_path: Path) -> None:
    small = disk.Small(tmp_path / "small", 48)
    base = small.folder / "base"
    async with registry.process(base, within=small.within(), reserved_bytes=8 * MIB) as server:
        await server.push_image("a", "v1", LAYER)
        digest = oci.digest_of(LAYER)
        large = bytes(60 * MIB)
        path = f"/v2/a/blobs/uploads/?digest={oci.digest_of(large)}"
        status, code, message = await server.error("POST", path, large)
        assert (status, code) == (507, "DISK_FULL")
        assert "the registry's disk is full" in message
        assert not [name for name in small.files(server.pid, "base/uploads") if "data" in name]

        filler = bytes(1 * MIB)
        number = 0
        while True:
            filler = number.to_bytes(4, "big") + filler[4:]
            where = f"/v2/a/blobs/uploads/?digest={oci.digest_of(filler)}"
            status, _, _ = await server.call("POST", where, filler)
            if status != 201:
                break
            number += 1
        assert status == 507
        assert number > 10
        status, _, body = await server.call("GET", "/readyz")
        assert status == 200
        assert b"the disk is full: pushes are refused, pulls go on" in body
        assert json.loads((await server.call("GET", "/registry/status"))[2])["body"]["storage"]["pushes"] is False
        assert (await server.call("GET", f"/v2/a/blobs/{digest}"))[2] == LAYER
        assert (await server.call("DELETE", "/v2/a/manifests/v1"))[0] == 202  # the reserve is for this
        small.resize(server.pid, 128)
        await server.push_image("a", "v2", LAYER)
        assert b"the disk is full" not in (await server.call("GET", "/readyz"))[2]
