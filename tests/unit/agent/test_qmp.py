"""What a hostile guest, or a QEMU that it took over, can say on our sockets: it costs a deadline, never a verb."""

import asyncio
import contextlib
import json
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest

from covey import errors
from covey.agent import guest, qmp, tail

Talk = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@contextlib.asynccontextmanager
async def listening(path: Path, talk: Talk) -> AsyncIterator[Path]:
    """Somebody on the socket `path` who says whatever `talk` says."""
    talking: set[asyncio.Task[None]] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        talking.add(task)
        with contextlib.suppress(OSError, asyncio.CancelledError):
            await talk(reader, writer)
        writer.close()

    server = await asyncio.start_unix_server(serve, path)
    try:
        yield path
    finally:
        server.close()
        for task in talking:
            task.cancel()
        await asyncio.gather(*talking, return_exceptions=True)


def answering(value: object) -> Talk:
    """A guest agent that is in step, and then answers every question with `value`."""
    return repeating(json.dumps({"return": value}).encode())


def repeating(line: bytes) -> Talk:
    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        sync = json.loads((await reader.readline()).lstrip(b"\xff"))
        writer.write(b"\xff" + json.dumps({"return": sync["arguments"]["id"]}).encode() + b"\n")
        while await reader.readline():
            writer.write(line + b"\n")

    return talk


def flooding(line: bytes) -> Talk:
    """Never stops saying `line`, asked or not."""

    async def talk(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            writer.write(line * (60000 // len(line)))
            await writer.drain()

    return talk


@pytest.mark.parametrize("line", [b'{"event":"X"}\n', b"{}\n", b"\xff{}\n", b'\xff{"return":0}\n'], ids=repr)
async def test_a_flood_ends_with_the_deadline_of_the_question(tmp_path: Path, line: bytes) -> None:
    async with listening(tmp_path / "s", flooding(line)) as path:
        began = time.monotonic()
        with pytest.raises(qmp.NoAnswer):
            await guest.Guest(path, os.geteuid()).call("guest-ping", timeout_s=0.5)
        with pytest.raises(qmp.NoAnswer):
            async with qmp.Monitor(path, os.geteuid(), timeout_s=0.5):
                pass
        assert time.monotonic() - began < 30


async def test_a_trickle_ends_with_the_deadline_of_the_question(tmp_path: Path) -> None:
    async def talk(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            writer.write(b'{"event":"X"}\n')
            await asyncio.sleep(0.05)

    async with listening(tmp_path / "s", talk) as path:
        began = time.monotonic()
        with pytest.raises(qmp.NoAnswer):
            async with qmp.Monitor(path, os.geteuid(), timeout_s=0.4):
                pass
        assert time.monotonic() - began < 30


@pytest.mark.parametrize(
    "line",
    [b'{"return":' + b"[" * 200_000, b'{"return":"\xfe\xfe"}', b"\xff", b"nonsense"],
    ids=["deep", "utf8", "ff", "no"],
)
async def test_what_is_no_protocol_is_no_answer(tmp_path: Path, line: bytes) -> None:
    async with listening(tmp_path / "s", repeating(line)) as path:
        with pytest.raises(qmp.NoAnswer):
            await guest.Guest(path, os.geteuid()).call("guest-ping", timeout_s=2)


async def test_a_socket_that_leads_to_somebody_else_is_not_spoken_to(tmp_path: Path) -> None:
    """A QEMU that was taken over owns its directory: its sockets may become links to another VM's, or to any service
    that listens on a socket. Commands and start scripts must not go there."""
    heard: list[bytes] = []

    async def talk(reader: asyncio.StreamReader, _writer: asyncio.StreamWriter) -> None:
        heard.append(await reader.read(100))

    async with listening(tmp_path / "another", talk):
        link = tmp_path / "qmp.sock"
        link.symlink_to("another")
        with pytest.raises(qmp.NoAnswer, match="somebody else"):
            await guest.Guest(link, os.geteuid() + 1).call("guest-ping", timeout_s=2)
        with pytest.raises(qmp.NoAnswer, match="somebody else"):
            async with qmp.Monitor(link, os.geteuid() + 1, timeout_s=2):
                pass
        await asyncio.sleep(0)
        assert not any(heard)


@pytest.mark.parametrize("value", ["1" * 5000, "7" * 30, "999999999999"])
async def test_a_nonsensical_exit_code_is_said_to_be_nonsense(tmp_path: Path, value: str) -> None:
    class Agent(guest.Guest):
        async def read(self, path: str, limit: int = 4096) -> bytes | None:
            return value.encode()

    follower = guest.Follower(Agent(tmp_path / "s", 0), "/d", tmp_path / "out", tmp_path / "err")
    with pytest.raises(errors.HypervisorError, match="nonsense"):
        await follower.wait(1)


async def test_output_without_end_does_not_hold_up_the_time_limit(tmp_path: Path) -> None:
    """A script, or a guest that lies, may write faster than we read."""
    killed: list[str] = []

    class Endless(guest.Guest):
        async def call(self, command: str, *, timeout_s: float = 10, **arguments: object) -> object:
            await asyncio.sleep(0)
            match command:
                case "guest-file-open":
                    return 1
                case "guest-file-seek":
                    return {"position": 1 << 60, "eof": False}
                case "guest-file-read":
                    return {"count": 256 << 10, "buf-b64": "eHh4" * ((256 << 10) // 3) + "eA=="}
            return {}

        async def read(self, path: str, limit: int = 4096) -> bytes | None:
            return None

        async def shell(self, text: str, name: str, *arguments: str, **_: object) -> guest.Status:
            killed.append(name)
            return guest.Status(exited=True, code=2)

    follower = guest.Follower(Endless(tmp_path / "s", 0), "/d", tmp_path / "out", tmp_path / "err")
    async with asyncio.timeout(60):
        assert await follower.wait(0.1) is None
    assert killed
    assert (tmp_path / "out").stat().st_size <= 2 * tail.KEPT_BYTES
