"""Several processes on one listening socket: the first takes what it can, the others what is left waiting."""

import asyncio
import contextlib
import functools
import socket
from collections.abc import Iterator

import pytest

from covey import accepting

WAIT_S = 60.0


class House:
    """Acceptors of one socket, as if each were a process; `taken` is by whom each connection was taken."""

    def __init__(self, listener: socket.socket, ranks: list[int]) -> None:
        self.busy = [0 for _ in ranks]
        self.taken: list[int] = []
        self.more = asyncio.Condition()
        self.port: int = listener.getsockname()[1]
        self.all = [
            accepting.Accepting(
                socket.socket(fileno=listener.dup().detach()),
                self._greeter(number),
                rank=rank,
                busy=functools.partial(self.busy.__getitem__, number),
            )
            for number, rank in enumerate(ranks)
        ]

    def _greeter(self, number: int) -> "type[asyncio.Protocol]":
        house = self

        class Greeter(asyncio.Protocol):
            def connection_made(self, transport: asyncio.BaseTransport) -> None:
                house.taken.append(number)
                assert isinstance(transport, asyncio.Transport)
                transport.write(b"%d" % number)
                transport.close()

        return Greeter

    async def greeted(self) -> int:
        await asyncio.sleep(0.02)  # who still waits for its turn since the last one would take this one at once
        async with asyncio.timeout(WAIT_S):
            reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
            number = int(await reader.read())
            writer.close()
            await writer.wait_closed()
            return number


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with contextlib.closing(socket.create_server(("127.0.0.1", 0), backlog=64)) as made:
        made.setblocking(False)
        yield made


@pytest.mark.parametrize("ranks", [[1, 0], [0, 1]])
async def test_the_first_takes_what_it_can_and_the_next_when_it_is_away(
    listener: socket.socket, ranks: list[int]
) -> None:
    house = House(listener, ranks)
    for one in house.all:
        one.start()
    first, second = ranks.index(0), ranks.index(1)
    assert {await house.greeted() for _ in range(5)} == {first}
    house.all[first].close()
    assert {await house.greeted() for _ in range(5)} == {second}
    house.all[second].close()


async def test_one_that_is_busy_leaves_new_ones_to_the_others(listener: socket.socket) -> None:
    house = House(listener, [0, 0])
    for one in house.all:
        one.start()
    for first in (0, 1):
        house.busy[:] = [1, 1]
        house.busy[first] = 0
        assert {await house.greeted() for _ in range(3)} == {first}
    house.busy[:] = [30, 30]  # however busy all are
    assert await house.greeted() in (0, 1)
    for one in house.all:
        one.close()


async def test_many_at_once_are_all_taken(listener: socket.socket) -> None:
    house = House(listener, [0, 1, 2])
    for one in house.all:
        one.start()
    assert len(await asyncio.gather(*(house.greeted() for _ in range(40)))) == 40
    for one in house.all:
        one.close()


async def test_one_that_waits_for_its_turn_can_be_closed(listener: socket.socket) -> None:
    house = House(listener, [1])
    house.all[0].start()
    with socket.create_connection(("127.0.0.1", house.port)):
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        house.all[0].close()
        await asyncio.sleep(0.02)  # longer than its turn would have taken
    assert house.taken == []
