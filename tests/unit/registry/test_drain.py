"""Going down politely: short requests finish, an upload still running ends at a durable offset, exit code 0."""

import asyncio
import signal
from collections.abc import AsyncIterator
from pathlib import Path

from covey import model
from covey.client import oci, templates
from tests.support import registry

PIECE = bytes(range(256)) * 4096  # 1 MiB
PIECES = 12


async def slowly(gate: asyncio.Event) -> AsyncIterator[bytes]:
    """Half of the bytes, and the rest when the gate opens."""
    for number in range(PIECES):
        if number == PIECES // 2:
            await gate.wait()
        yield PIECE


async def test_a_running_upload_is_cut_at_an_offset_from_which_it_resumes(tmp_path: Path) -> None:
    content = PIECE * PIECES
    digest = oci.digest_of(content)
    async with registry.process(tmp_path, grace_s=1.0) as server:
        _, headers, _ = await server.call("POST", "/v2/a/blobs/uploads/")
        location = headers["Location"]
        gate = asyncio.Event()
        upload = asyncio.create_task(server.call("PATCH", location, slowly(gate), Content_Length=str(len(content))))
        async with asyncio.timeout(60):
            while not any(path.stat().st_size for path in tmp_path.glob("uploads/*/data.*")):
                await asyncio.sleep(0.01)
        server.send(signal.SIGTERM)
        status, headers, _ = await upload
        gate.set()
        assert status == 503
        offset = int(headers[oci.OFFSET_HEADER])
        assert 0 < offset <= len(content) // 2
        assert await server.ended() == 0
    async with registry.process(tmp_path) as other:
        assert (await other.call("GET", location))[1][oci.OFFSET_HEADER] == str(offset)
        assert (await other.call("PATCH", location, content[offset:]))[0] == 202
        assert (await other.call("PUT", f"{location}?digest={digest}"))[0] == 201
        assert (await other.call("GET", f"/v2/a/blobs/{digest}"))[2] == content


async def test_the_client_resumes_by_itself_after_a_restart(tmp_path: Path) -> None:
    """The same address is served by a new process: the push ends well."""
    path = tmp_path / "layer"
    path.write_bytes(PIECE * 40)
    async with registry.process(tmp_path / "base", grace_s=0.2) as first, registry.talking(first) as remote:
        stopped = asyncio.Event()

        def stop_once(title: str, done: int, _size: int) -> None:
            if title == path.name and done > 8 * len(PIECE) and not stopped.is_set():
                first.send(signal.SIGTERM)
                stopped.set()

        push = asyncio.create_task(
            templates.push_template(remote, "mac", "v1", [path], arch=model.Arch.AMD64, progress=stop_once)
        )
        await stopped.wait()
        assert await first.ended() == 0
        async with registry.process(tmp_path / "base", port=first.port):
            pushed = await push
            pulled = await templates.pull_template(remote, "mac", tmp_path / "out")
    assert pulled.digest == pushed.digest
    assert pulled.files[0].read_bytes() == path.read_bytes()


async def test_a_push_begun_while_the_registry_starts_waits_for_it(tmp_path: Path) -> None:
    path = tmp_path / "layer"
    path.write_bytes(PIECE)
    async with registry.process(tmp_path / "base") as first, registry.talking(first) as remote:
        first.send(signal.SIGTERM)
        assert await first.ended() == 0
        push = asyncio.create_task(templates.push_template(remote, "mac", "v1", [path], arch=model.Arch.AMD64))
        async with registry.process(tmp_path / "base", port=first.port):
            assert (await push).version == 0


async def test_a_download_that_runs_is_finished(tmp_path: Path) -> None:
    async with registry.process(tmp_path, grace_s=5.0) as server:
        content = PIECE * 30
        digest = await server.push_blob("a", content)
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port, limit=1 << 16)
        writer.write(f"GET /v2/a/blobs/{digest} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        head = await reader.readuntil(b"\r\n\r\n")
        server.send(signal.SIGTERM)
        body = await reader.readexactly(len(content))
        writer.close()
        await writer.wait_closed()
        assert (head.split(b"\r\n")[0], body) == (b"HTTP/1.1 200 OK", content)
        assert await server.ended() == 0
