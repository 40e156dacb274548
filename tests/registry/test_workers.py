"""One server of several processes: a death that nobody notices, figures of all of them, an orderly end."""

import asyncio
import os
import signal
import sys
import urllib.request
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import aiohttp
import pytest

from covey import errors, settings, world
from covey.registry import service, tally, workers
from tests.support import registry

DEADLINE_S = 60.0


async def until(true: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while not await true():
            await asyncio.sleep(0.05)


def made(base: Path, **more: object) -> workers.Workers:
    chosen = {"workers": 2, "grace_s": 5.0, "metrics": settings.Metrics(port=0, path="/figures"), **more}
    config = service.Config(base_path=base, port=0, **chosen)  # type: ignore[arg-type]
    environ = {
        **os.environ,
        "COVEY_CONFIG": "/dev/null",
        "COVEY_BASE_PATH": str(base),
        "COVEY_REGISTRY_WORKERS": "2",
        "COVEY_GRACEFUL_SHUTDOWN_TIMEOUT": "5s",
    }
    return workers.Workers(config, world.System(), environ)


async def figures(program: workers.Workers) -> dict[str, float]:
    assert program.metrics is not None
    url = f"http://127.0.0.1:{program.metrics.port}/figures"
    text = (await asyncio.to_thread(_get, url)).decode()
    lines = [line.rpartition(" ") for line in text.splitlines() if not line.startswith("#")]
    return {name: float(value) for name, _, value in lines}


def _get(url: str) -> bytes:
    with urllib.request.urlopen(url, timeout=DEADLINE_S) as answer:  # noqa: S310
        content: bytes = answer.read()
    return content


@pytest.mark.timeout(480)
async def test_a_worker_dies_and_another_one_goes_on(tmp_path: Path) -> None:
    program = made(tmp_path)
    try:
        await program.start()
        async with aiohttp.ClientSession() as session:
            server = registry.Server(program.port, session)
            digest = await server.push_blob("a", b"layer" * 1000)
            for _ in range(20):
                async with aiohttp.ClientSession() as fresh:  # a connection of its own may be anybody's
                    status, _, content = await registry.Server(program.port, fresh).call("GET", f"/v2/a/blobs/{digest}")
                    assert (status, content) == (200, b"layer" * 1000)

            before = await figures(program)
            assert before["covey_registry_workers"] == 2
            assert before['covey_registry_requests_total{status="2xx"}'] >= 21
            assert before["covey_registry_received_bytes_total"] == 5000
            assert before["covey_registry_sent_bytes_total"] >= 20 * 5000
            assert before["covey_registry_space_total_bytes"] > 0

            old = program.pids
            os.kill(old[0], signal.SIGKILL)
            for _ in range(10):
                async with aiohttp.ClientSession() as fresh:
                    assert (await registry.Server(program.port, fresh).call("GET", f"/v2/a/blobs/{digest}"))[0] == 200

            async def replaced() -> bool:
                return program.pids[0] != old[0] and (await figures(program))["covey_registry_workers"] == 2

            await until(replaced)
            after = await figures(program)
            assert all(after[name] >= before[name] for name in before if name.endswith("_total"))
    finally:
        await program.stop()
    with pytest.raises(ConnectionRefusedError):
        await asyncio.open_connection("127.0.0.1", program.port)


@pytest.mark.timeout(480)
async def test_the_end_waits_for_what_runs(tmp_path: Path) -> None:
    """An upload in the middle is cut at a durable offset, and goes on at the next server."""
    program = made(tmp_path, metrics=None)
    await program.start()
    try:
        async with aiohttp.ClientSession() as session:
            server = registry.Server(program.port, session)
            _, headers, _ = await server.call("POST", "/v2/a/blobs/uploads/", b"")
            sent, end = asyncio.Event(), asyncio.Event()

            async def body() -> AsyncIterator[bytes]:
                yield b"x" * 100_000
                sent.set()
                await end.wait()

            patch = asyncio.create_task(server.call("PATCH", headers["Location"], body()))
            await sent.wait()
            stopping = asyncio.create_task(program.stop())
            status, answered, _ = await asyncio.wait_for(patch, DEADLINE_S)
            assert status == 503
            end.set()
            await stopping
    finally:
        await program.stop()
    async with registry.serving(tmp_path) as later:
        status, found, _ = await later.call("GET", headers["Location"])
        assert (status, found["Range"]) == (204, answered["Range"])


@pytest.mark.timeout(480)
async def test_a_worker_that_cannot_start_stops_the_start(tmp_path: Path) -> None:
    config = service.Config(base_path=tmp_path, port=0, workers=2, grace_s=1.0)
    program = workers.Workers(config, world.System(), dict(os.environ), (sys.executable, "-c", "raise SystemExit(3)"))
    with pytest.raises(errors.SettingError, match=r"registry worker \d ended with exit code 3 at its start"):
        await program.start()
    await program.stop()


def test_rows_are_added_up_and_outlive_their_process() -> None:
    supervisor = tally.Tally(2)
    worker = tally.Tally(2, 1, os.dup(supervisor.file))
    worker.add(tally.Count.SENT_BYTES, 1 << 40)
    supervisor.add(tally.Count.SENT_BYTES, 7)
    worker.close()
    assert supervisor.sums()[tally.Count.SENT_BYTES] == (1 << 40) + 7
    assert supervisor.row(1)[tally.Count.SENT_BYTES] == 1 << 40
    supervisor.close()
