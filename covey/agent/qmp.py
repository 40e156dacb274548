"""JSON lines over a unix socket: QEMU's machine protocol (QMP), and the guest agent's dialect of it.

Each question has a deadline, and a connection on which one was missed is never used again: a late answer would be
taken for the next one's. QMP takes one client at a time, so a connection is opened for a few commands and closed
(3 ms); a stopped or hung QEMU accepts and says nothing, which the deadline turns into NoAnswer.

What the guest agent says comes from inside the VM and is not trusted: lines are limited and decoded strictly.
"""

import asyncio
import os
from pathlib import Path
from typing import Any

import msgspec

from covey import errors

_LINE_LIMIT = 4 << 20
_SENTINEL = b"\xff"


class NoAnswer(errors.HypervisorError):
    """Nobody listens, or no answer came in time: nothing is known."""


class CommandFailed(errors.HypervisorError):
    """The other side understood the command and refused it."""


class _Fault(msgspec.Struct):
    desc: str = ""


class _Line(msgspec.Struct):
    """One line from the other side: a greeting, an event, an answer or an error."""

    result: Any = msgspec.field(name="return", default=msgspec.UNSET)
    error: _Fault | None = None
    event: str = ""


class Connection:
    """One open connection. `who` names the other side in faults."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, who: str) -> None:
        self._reader = reader
        self._writer = writer
        self._who = who

    async def ask(self, command: str, arguments: dict[str, Any] | None = None, *, timeout_s: float) -> Any:
        """Send one command and return its answer."""
        await self.tell(command, arguments)
        return await self.answer(timeout_s)

    async def tell(self, command: str, arguments: dict[str, Any] | None = None, *, prefix: bytes = b"") -> None:
        message = {"execute": command, **({"arguments": arguments} if arguments else {})}
        self._writer.write(prefix + msgspec.json.encode(message) + b"\n")

    async def answer(self, timeout_s: float) -> Any:
        """The next answer; events before it are passed over."""
        while True:
            line = await self.line(timeout_s)
            if line.error is not None:
                raise CommandFailed(f"{self._who}: {line.error.desc}")
            if line.result is not msgspec.UNSET:
                return line.result

    async def line(self, timeout_s: float) -> _Line:
        try:
            async with asyncio.timeout(timeout_s):
                raw = await self._reader.readline()
        except TimeoutError as fault:
            raise NoAnswer(f"{self._who} did not answer within {timeout_s:.0f} s") from fault
        except (OSError, ValueError) as fault:  # ValueError: a line beyond the limit
            raise NoAnswer(f"{self._who} broke the connection: {fault}") from fault
        if not raw.endswith(b"\n"):
            raise NoAnswer(f"{self._who} closed the connection")
        try:
            return msgspec.json.decode(raw, type=_Line)
        except msgspec.MsgspecError as fault:
            raise NoAnswer(f"{self._who} does not speak the protocol: {fault}") from fault

    async def skip_to_sentinel(self, timeout_s: float) -> None:
        """Pass over everything up to the next byte 0xFF."""
        try:
            async with asyncio.timeout(timeout_s):
                while _SENTINEL not in await self._reader.readuntil(_SENTINEL):
                    pass
        except (TimeoutError, OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError) as fault:
            raise NoAnswer(f"{self._who} did not answer") from fault

    def close(self) -> None:
        self._writer.close()


async def connect(path: Path, who: str, *, timeout_s: float) -> Connection:
    """Connect to the unix socket `path`, however long its name is: a socket address holds 107 bytes only."""
    try:
        directory = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as fault:
        raise NoAnswer(f"{who} is not there: {fault.strerror}") from fault
    try:
        short = f"/proc/self/fd/{directory}/{path.name}"
        async with asyncio.timeout(timeout_s):
            reader, writer = await asyncio.open_unix_connection(short, limit=_LINE_LIMIT)
    except TimeoutError as fault:
        raise NoAnswer(f"{who} did not take the connection within {timeout_s:.0f} s") from fault
    except OSError as fault:
        raise NoAnswer(f"{who} is not there: {fault.strerror}") from fault
    finally:
        os.close(directory)
    return Connection(reader, writer, who)


class Monitor:
    """QEMU's monitor, as a context: ``async with qmp.Monitor(socket) as monitor``."""

    def __init__(self, path: Path, *, timeout_s: float = 3.0) -> None:
        self._path = path
        self._timeout_s = timeout_s
        self._connection: Connection | None = None

    async def __aenter__(self) -> "Monitor":
        connection = await connect(self._path, "QEMU", timeout_s=self._timeout_s)
        try:
            await connection.line(self._timeout_s)  # the greeting
            await connection.ask("qmp_capabilities", timeout_s=self._timeout_s)
        except BaseException:
            connection.close()
            raise
        self._connection = connection
        return self

    async def __aexit__(self, *_fault: object) -> None:
        if self._connection is not None:
            self._connection.close()

    async def ask(self, command: str, **arguments: Any) -> Any:
        assert self._connection is not None  # noqa: S101  used as a context only
        spelled = {name.replace("_", "-"): value for name, value in arguments.items()}
        return await self._connection.ask(command, spelled, timeout_s=self._timeout_s)

    async def human(self, line: str) -> str:
        """A command of the human monitor, for what QMP lacks."""
        return str(await self.ask("human-monitor-command", command_line=line))


async def sync_guest(connection: Connection, number: int, timeout_s: float) -> None:
    """Bring a fresh connection to the guest agent into step: the byte 0xFF resets its parser, and its answer to
    ``guest-sync-delimited`` begins with the same byte (QEMU's qga/qapi-schema.json)."""
    await connection.tell("guest-sync-delimited", {"id": number}, prefix=_SENTINEL)
    while True:
        await connection.skip_to_sentinel(timeout_s)
        if (await connection.line(timeout_s)).result == number:
            return
