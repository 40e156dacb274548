"""The agent program shares layers unless it was told not to, and says so when it joins."""

import contextlib
import os
import socket
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp

from covey import model, settings, world
from covey.agent import program
from tests.unit.agent import fake


@contextlib.asynccontextmanager
async def joined(tmp_path: Path, **environ: str) -> AsyncIterator[model.Facts]:
    """What a node says of itself that was started with these settings."""
    controller = fake.Controller()
    await controller.start()
    given = {
        "COVEY_CONFIG": os.devnull,
        "COVEY_CONTROLLER": controller.url,
        "COVEY_DATA_DIR": str(tmp_path),
        "COVEY_HYPERVISOR": "synthetic",
        **environ,
    }
    one = program.Program(settings.agent(given), world.System(), tmp_path / "agent")
    try:
        await one.start()
        await fake.until(lambda: controller.joins, "the node has joined")
        yield controller.joins[0].facts
    finally:
        await one.stop()
        await controller.stop()


async def test_a_node_listens_for_others_and_lets_nobody_in_without_a_ticket(tmp_path: Path) -> None:
    async with joined(tmp_path) as facts, aiohttp.ClientSession() as session:
        assert facts.share_port and facts.ip == "127.0.0.1"
        digest = "sha256:" + "a" * 64
        async with session.get(f"http://127.0.0.1:{facts.share_port}/layers/v1/{digest}/{digest}") as answer:
            assert answer.status == 403


async def test_two_agents_on_one_host_listen_at_different_ports(tmp_path: Path) -> None:
    async with joined(tmp_path / "one") as one, joined(tmp_path / "two") as two:
        assert one.share_port and two.share_port and one.share_port != two.share_port


async def test_a_node_that_opted_out_neither_listens_nor_says_so(tmp_path: Path) -> None:
    async with joined(tmp_path, COVEY_SHARE_LAYERS="false") as facts:
        assert facts.share_port == 0


async def test_the_given_address_is_the_only_one_and_without_it_the_node_does_its_other_work(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        async with joined(tmp_path, COVEY_SHARE_LISTEN=f"127.0.0.1:{port}") as facts:
            assert facts.share_port == 0
    async with joined(tmp_path / "again", COVEY_SHARE_LISTEN="127.0.0.1:0") as facts:
        assert facts.share_port
