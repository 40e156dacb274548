"""A TCP proxy that a test can turn nasty: the reply that never comes, the connection that breaks, the silent peer."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from enum import StrEnum


class Mood(StrEnum):
    """What the proxy does with bytes and connections from now on."""

    HONEST = "honest"
    MUTE = "mute"  # questions pass, answers are swallowed
    DEAF = "deaf"  # nothing passes, nothing closes: a frozen peer
    CLOSED = "closed"  # connections are cut, new ones refused


class Proxy:
    """Between 127.0.0.1:`port` and another port of this machine."""

    def __init__(self, target: int) -> None:
        self.target = target
        self.port = 0
        self.mood = Mood.HONEST
        self.up_bytes = self.down_bytes = 0  # passed to the target, and back
        self._alarms: list[tuple[int, bool, Callable[[], None]]] = []
        self._server: asyncio.Server | None = None
        self._pairs: dict[asyncio.Task[None], tuple[asyncio.StreamWriter, ...]] = {}

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    async def turn(self, mood: Mood) -> None:
        """Change the mood. CLOSED breaks what is open and gives up the port until the mood changes again."""
        self.mood = mood
        if mood is Mood.CLOSED:
            await self._stop()
        elif self._server is None:
            await self._start()

    def after(self, count: int, act: Callable[[], None], *, up: bool = False) -> None:
        """Call `act` as soon as `count` more bytes have passed, downwards or up, and cut all connections at that byte:
        what is on its way beyond it is lost."""
        self._alarms.append(((self.up_bytes if up else self.down_bytes) + count, up, act))

    async def _start(self) -> None:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]

    async def _stop(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None
        for _ in range(2):  # some may be half-way between the kernel and `_accept`
            for task, writers in list(self._pairs.items()):
                task.cancel()
                for writer in writers:
                    writer.transport.abort()
            await asyncio.gather(*self._pairs, return_exceptions=True)
            await asyncio.sleep(0.01)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        if self._server is None:
            writer.transport.abort()
            return
        self._pairs[task] = (writer,)
        try:
            far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self.target)
            self._pairs[task] = (writer, far_writer)
            async with asyncio.TaskGroup() as group:
                group.create_task(self._pump(reader, far_writer, (Mood.HONEST, Mood.MUTE), up=True))
                group.create_task(self._pump(far_reader, writer, (Mood.HONEST,), up=False))
        except* OSError:
            pass  # one side broke: so does the other
        except* asyncio.CancelledError:
            pass
        finally:
            for end in self._pairs.pop(task):
                end.transport.abort()

    async def _pump(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, open_in: tuple[Mood, ...], *, up: bool
    ) -> None:
        while data := await reader.read(65536):
            if self.mood in open_in:
                while data:
                    part, data = self._until_alarm(data, up)
                    writer.write(part)
                    await writer.drain()
                    self._count(len(part), up)
        raise ConnectionResetError("the peer closed")

    def _until_alarm(self, data: bytes, up: bool) -> tuple[bytes, bytes]:
        passed = self.up_bytes if up else self.down_bytes
        cut = min((at - passed for at, upwards, _ in self._alarms if upwards == up and at > passed), default=len(data))
        return data[:cut], data[cut:]

    def _count(self, count: int, up: bool) -> None:
        if up:
            self.up_bytes += count
        else:
            self.down_bytes += count
        passed = self.up_bytes if up else self.down_bytes
        due = [alarm for alarm in self._alarms if alarm[1] == up and alarm[0] <= passed]
        self._alarms = [alarm for alarm in self._alarms if alarm not in due]
        for _, _, act in due:
            act()
            for writer in [end for pair in self._pairs.values() for end in pair]:
                writer.transport.abort()


@contextlib.asynccontextmanager
async def before(target: int) -> AsyncIterator[Proxy]:
    """A proxy before a port of this machine."""
    proxy = Proxy(target)
    await proxy.turn(Mood.HONEST)
    try:
        yield proxy
    finally:
        await proxy.turn(Mood.CLOSED)
