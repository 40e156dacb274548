"""What a storage may ask of the clients that push to it."""

from pathlib import Path

import pytest

from covey import server, world
from covey.registry import catalog, disk, journal, upload_api


@pytest.mark.parametrize("chunk_min_bytes", [0, 5 << 20])
async def test_a_smallest_chunk_is_announced_where_there_is_one(tmp_path: Path, chunk_min_bytes: int) -> None:
    clock = world.System()
    store, logs = disk.Disk(tmp_path, clock), journal.Journal(tmp_path, clock)
    api = upload_api.UploadApi(catalog.Catalog(store, logs, clock), chunk_min_bytes=chunk_min_bytes)
    door = server.Server(api.routes(), world=clock)
    door.begin()
    try:
        begun = await door.hand("POST", "/v2/a/blobs/uploads/")
        assert (begun.status, begun.headers.get("OCI-Chunk-Min-Length")) == (
            202,
            str(chunk_min_bytes) if chunk_min_bytes else None,
        )
        smaller = await door.hand("PATCH", begun.headers["Location"], body=b"a smaller one is taken")
        assert smaller.status == 202
    finally:
        await door.drain(1.0)
        store.close()
        logs.close()
