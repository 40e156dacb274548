"""JSON lines over a unix socket: QEMU's machine protocol (QMP), and the guest agent's dialect of it.

Each question has a deadline, and a connection on which one was missed is never used again: a late answer would be
taken for the next one's. QMP takes one client at a time, so a connection is opened for a few commands and closed
(3 ms); a stopped or hung QEMU accepts and says nothing, which the deadline turns into NoAnswer.

What the guest agent says comes from inside the VM and is not trusted: lines are limited, in number too, and decoded
strictly. Nor is the socket's place: it lies in a directory that QEMU's user owns, and a QEMU that its guest took over
could put a link to another VM's socket there. So the kernel is asked who listens, before a word is said.
"""

import asyncio
import contextlib
import os
import socket
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from covey import errors

_LINE_LIMIT = 4 << 20
_LINES = 1000  # that may be passed over before an answer
_CREDENTIALS = struct.Struct("3i")  # pid, uid, gid: socket(7), unix(7)
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
        with self._deadline():
            async with asyncio.timeout(timeout_s):
                for _ in range(_LINES):
                    line = await self._line()
                    if line.error is not None:
                        raise CommandFailed(f"{self._who}: {line.error.desc}")
                    if line.result is not msgspec.UNSET:
                        return line.result
        raise NoAnswer(f"{self._who} says much and answers nothing")

    async def greeting(self, timeout_s: float) -> None:
        with self._deadline():
            async with asyncio.timeout(timeout_s):
                await self._line()

    async def synchronise(self, number: int, timeout_s: float) -> None:
        """Pass over everything up to the answer `number` that follows a byte 0xFF."""
        with self._deadline():
            async with asyncio.timeout(timeout_s):
                for _ in range(_LINES):
                    await self._reader.readuntil(_SENTINEL)
                    if (await self._line()).result == number:
                        return
        raise NoAnswer(f"{self._who} says much and answers nothing")

    @contextlib.contextmanager
    def _deadline(self) -> Iterator[None]:
        """What may become of waiting for the other side, as NoAnswer."""
        try:
            yield
        except TimeoutError as fault:
            raise NoAnswer(f"{self._who} did not answer in time") from fault
        except (OSError, ValueError, asyncio.IncompleteReadError, asyncio.LimitOverrunError) as fault:
            raise NoAnswer(f"{self._who} broke the connection: {fault}") from fault

    async def _line(self) -> _Line:
        raw = await self._reader.readline()  # ValueError: a line beyond the limit
        if not raw.endswith(b"\n"):
            raise NoAnswer(f"{self._who} closed the connection")
        try:
            return msgspec.json.decode(raw, type=_Line)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as fault:
            raise NoAnswer(f"{self._who} does not speak the protocol: {fault}") from fault

    def close(self) -> None:
        self._writer.close()


async def connect(path: Path, who: str, user: int, *, timeout_s: float) -> Connection:
    """Connect to the unix socket `path`, on which `user` must be the one who listens. Its name may be of any length: a
    socket address holds 107 bytes only."""
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
    if _listener(writer) != user:
        writer.close()
        raise NoAnswer(f"{who} is not there: somebody else listens on its socket")
    return Connection(reader, writer, who)


def _listener(writer: asyncio.StreamWriter) -> int:
    """The user id of the process that listens at the other end, by the kernel's word."""
    end = writer.get_extra_info("socket")
    _, user, _ = _CREDENTIALS.unpack(end.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))
    return int(user)


class Monitor:
    """QEMU's monitor, as a context: ``async with qmp.Monitor(socket, user) as monitor``. `user` is QEMU's."""

    def __init__(self, path: Path, user: int, *, timeout_s: float = 3.0) -> None:
        self._path = path
        self._user = user
        self._timeout_s = timeout_s
        self._connection: Connection | None = None

    async def __aenter__(self) -> "Monitor":
        connection = await connect(self._path, "QEMU", self._user, timeout_s=self._timeout_s)
        try:
            await connection.greeting(self._timeout_s)
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
    await connection.synchronise(number, timeout_s)
