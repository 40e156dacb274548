"""The gate: what is let in, who waits behind whom, and what is refused before it costs anything."""

import asyncio
import contextlib
from collections.abc import AsyncIterator

import pytest

from covey import answer, gate

PEOPLE, AGENTS = gate.Lane.PEOPLE, gate.Lane.AGENTS


@contextlib.asynccontextmanager
async def entered(of: gate.Gate, lane: gate.Lane, client: str) -> AsyncIterator[gate.Ticket | None]:
    """A request's time at work."""
    ticket = await of.enter(lane, client)
    try:
        yield ticket
    finally:
        if ticket is not None:
            ticket.end()


class Hall:
    """A gate with requests that stay inside until they are told to leave."""

    def __init__(self, limits: gate.Limits) -> None:
        self.gate = gate.Gate({PEOPLE: limits, AGENTS: limits})
        self.inside: list[str] = []
        self.refused: list[str] = []
        self.tasks: list[asyncio.Task[None]] = []
        self._exits: dict[str, list[asyncio.Event]] = {}

    async def send(self, client: str, count: int = 1, lane: gate.Lane = PEOPLE, body_bytes: int = 0) -> None:
        for _ in range(count):
            self.tasks.append(asyncio.create_task(self._request(client, lane, body_bytes)))
        await settle()

    async def _request(self, client: str, lane: gate.Lane, body_bytes: int) -> None:
        leave = asyncio.Event()
        try:
            async with entered(self.gate, lane, client) as ticket:
                assert ticket is not None
                ticket.hold(body_bytes)
                self.inside.append(client)
                self._exits.setdefault(client, []).append(leave)
                await leave.wait()
                self.inside.remove(client)
        except answer.Fault as fault:
            assert (fault.status, fault.headers["Retry-After"]) == (503, "1")
            self.refused.append(client)

    async def let_out(self, client: str) -> None:
        self._exits[client].pop(0).set()
        await settle()


async def settle() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


@pytest.fixture
async def halls() -> AsyncIterator[list[Hall]]:
    made: list[Hall] = []
    yield made
    for hall in made:
        for task in hall.tasks:
            task.cancel()
        await asyncio.gather(*hall.tasks, return_exceptions=True)
        await settle()
        assert all(not lane._clients and not lane._turns for lane in hall.gate._lanes.values()), "something stayed"


def a_hall(halls: list[Hall], **limits: float) -> Hall:
    halls.append(Hall(gate.Limits(pause_s=0, **limits)))  # type: ignore[arg-type]
    return halls[-1]


async def test_a_client_fills_half_a_lane_and_waits_behind_itself(halls: list[Hall]) -> None:
    hall = a_hall(halls, at_once=4)
    await hall.send("flood", 1000)
    assert hall.inside == ["flood"] * 2
    await hall.send("other")
    assert "other" in hall.inside


async def test_clients_get_in_by_turns(halls: list[Hall]) -> None:
    hall = a_hall(halls, at_once=2)
    await hall.send("flood", 500)
    await hall.send("one")
    await hall.send("two")
    await hall.send("three")
    assert sorted(hall.inside) == ["flood", "one"]
    await hall.let_out("flood")
    assert sorted(hall.inside) == ["flood", "one"]  # whose turn it was: the first that had waited
    await hall.let_out("flood")
    assert sorted(hall.inside) == ["one", "two"]
    await hall.let_out("one")
    assert sorted(hall.inside) == ["three", "two"]


async def test_a_full_queue_makes_room_for_a_client_with_less_in_it(halls: list[Hall]) -> None:
    hall = a_hall(halls, at_once=1, waiting=10)
    await hall.send("flood", 30)
    assert hall.refused == ["flood"] * 19
    await hall.send("other")
    assert hall.refused == ["flood"] * 20
    await hall.let_out("flood")
    await hall.let_out("flood")
    assert hall.inside == ["other"]


async def test_many_clients_share_the_places_to_wait(halls: list[Hall]) -> None:
    hall = a_hall(halls, at_once=1, waiting=4)
    await hall.send("first")
    for name in "abcd":
        await hall.send(name)
    await hall.send("late")
    assert hall.refused == ["late"]


async def test_nobody_waits_for_long(halls: list[Hall]) -> None:
    hall = a_hall(halls, at_once=1, wait_s=0.05)
    await hall.send("a")
    await hall.send("b")
    async with asyncio.timeout(60):
        while not hall.refused:
            await asyncio.sleep(0.005)
    assert (hall.inside, hall.refused) == (["a"], ["b"])


async def test_who_gives_up_leaves_no_gap_in_the_queue(halls: list[Hall]) -> None:
    hall = a_hall(halls, at_once=1)
    await hall.send("a")
    await hall.send("b")
    await hall.send("c")
    hall.tasks[1].cancel()
    await settle()
    await hall.let_out("a")
    assert hall.inside == ["c"]


async def test_who_is_let_in_at_the_moment_of_giving_up_keeps_no_place(halls: list[Hall]) -> None:
    hall = a_hall(halls, at_once=1)
    await hall.send("a")
    await hall.send("b")
    await hall.send("c")
    hall._exits["a"].pop(0).set()
    while hall.inside:
        await asyncio.sleep(0)  # b is let in now, and has not run yet
    hall.tasks[1].cancel()
    await settle()
    assert hall.inside == ["c"]


async def test_lanes_share_nothing(halls: list[Hall]) -> None:
    hall = a_hall(halls, at_once=2, waiting=0)
    await hall.send("flood", 50)
    await hall.send("flood2", 50)
    await hall.send("node", lane=AGENTS)
    assert hall.inside.count("node") == 1
    assert "node" not in hall.refused


async def test_bodies_are_bounded_in_sum_and_by_client(halls: list[Hall]) -> None:
    hall = a_hall(halls, at_once=10, body_bytes=100)
    await hall.send("a", 2, body_bytes=30)
    assert (hall.inside, hall.refused) == (["a"], ["a"])  # half is the most for one client
    await hall.send("b", body_bytes=50)
    await hall.send("c", body_bytes=50)
    assert (sorted(hall.inside), hall.refused) == (["a", "b"], ["a", "c"])
    await hall.let_out("a")
    await hall.send("c", body_bytes=50)
    assert sorted(hall.inside) == ["b", "c"]


async def test_what_is_parked_takes_nobodys_place() -> None:
    parked = gate.Gate({AGENTS: gate.Limits(at_once=1, waiting=0, pause_s=0)})
    async with entered(parked, AGENTS, "a") as ticket:
        assert ticket is not None
        with ticket.aside():
            async with entered(parked, AGENTS, "b"):
                pass
        with pytest.raises(answer.Fault):
            async with entered(parked, AGENTS, "b"):
                pass
    async with entered(parked, AGENTS, "b"):
        pass


async def test_who_is_in_no_lane_is_not_counted() -> None:
    async with entered(gate.Gate({PEOPLE: gate.Limits(at_once=0, waiting=0)}), gate.Lane.OPEN, "probe") as ticket:
        assert ticket is None
