"""A controller with more to do than its store can take: latency and refusals, no wrong answer, then all is well."""

import asyncio
import contextlib
import functools
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from typing import Any, TypeVar

import msgspec

from covey import wire
from tests.support import flaky
from tests.unit.controller import cloud

T = TypeVar("T")
Answer = tuple[int, dict[str, Any]]
FLOOD = 1400  # more than one client may have at work and waiting
WAVE = 200  # of them in one turn of the loop: all in one would take a busy machine so long that it counts as frozen
TRIES = 4  # a controller that is not ready for a moment, on a busy machine, hears nobody before the flood is over
SLOW_S = 0.15  # each way


class Slow:
    """A cloud of one controller whose store can be slowed down."""

    def __init__(self, house: cloud.Cloud, store: flaky.Flaky) -> None:
        self.house = house
        self.api = house.api
        self.store = store

    def slow_down(self, seconds: float) -> None:
        self.store.delay = lambda: seconds

    async def start(self, program: str, number: int, *, patient: bool = False) -> tuple[int, list[str]]:
        """A start by a program: its status and ids. `patient`: see `heard`."""
        body = json.dumps({"vmid": cloud.TEMPLATE, "name": f"{program}-{number}"}).encode()
        hand = functools.partial(self.hand, "/api/v1/vm", body, {"User-Agent": program})
        status, envelope = await (heard(hand) if patient else hand())
        assert status in (200, 503), envelope
        return status, list(envelope.get("body", ()))

    async def hand(self, path: str, body: bytes, headers: dict[str, str]) -> tuple[int, dict[str, Any]]:
        """A POST without a socket: thousands at once in the loop that answers them would measure the loop."""
        reply = await self.house.replicas[0].server.hand("POST", path, headers, body, peer="10.0.0.9")
        assert reply.status != 503 or "Retry-After" in reply.headers
        return reply.status, json.loads(reply.body)

    async def listed(self) -> set[str]:
        return {one["instance_id"] for one in await self.api.ok("GET", "/api/v1/vm")}


async def heard(call: Callable[[], Awaitable[Answer]]) -> Answer:
    """Again while the controller is not ready, as it is now and then where others take the processor for seconds: only
    a refusal because of all that others ask for is one."""
    while True:
        status, envelope = await call()
        if status != 503 or "too much to do" in envelope["message"]:
            return status, envelope
        await asyncio.sleep(0.1)


async def flood(one: Callable[[int], Coroutine[Any, Any, T]]) -> list["asyncio.Task[T]"]:
    """So many at once that the store is behind for seconds."""
    tasks = []
    for number in range(FLOOD):
        tasks.append(asyncio.create_task(one(number)))
        if number % WAVE == WAVE - 1:
            await asyncio.sleep(0)
    return tasks


async def amid_a_flood(
    one: Callable[[int], Coroutine[Any, Any, T]], act: Callable[[], Awaitable[None]], who: str
) -> list[T]:
    """`act` to its end before the flood is over: what the flood came to."""
    for _ in range(TRIES):
        many = await flood(one)
        await act()
        was_amid = not all(task.done() for task in many)
        ended = await asyncio.gather(*many)
        if was_amid:
            return ended
    raise AssertionError(f"each flood ended before {who} was heard")


@contextlib.asynccontextmanager
async def slow() -> AsyncIterator[Slow]:
    stores = cloud.Wraps(flaky.Flaky)
    async with cloud.running(wrap=stores) as house:
        yield Slow(house, stores[0])


async def test_a_flood_on_a_slow_store_is_refused_in_part_and_done_in_part_and_all_is_well_afterwards() -> None:
    async with slow() as one:
        one.slow_down(SLOW_S)
        many = await flood(lambda number: one.start("flood", number))
        polite = [await one.start("polite", number, patient=True) for number in range(5)]
        assert [status for status, _ in polite] == [200] * 5, "one client with many requests locked out another"
        ended = await asyncio.gather(*many)
        one.slow_down(0)

        statuses = [status for status, _ in ended]
        assert statuses.count(503) >= 100
        assert statuses.count(200) >= 128
        promised = {id for _, ids in (*ended, *polite) for id in ids}
        assert await one.listed() == promised, "what was refused was not done, and what was answered was"
        assert (await one.start("polite", 99, patient=True))[0] == 200


async def test_a_flood_of_requests_by_people_leaves_agents_their_room() -> None:
    async with slow() as one:
        agent = cloud.Agent(one.api)
        await agent.join()
        one.slow_down(SLOW_S)
        report = wire.Report(seen=agent.seen, messages=agent.messages)

        async def be_heard() -> None:
            assert (await heard(lambda: agent.call("report", report)))[0] == 200

        await amid_a_flood(lambda number: one.start(f"flood-{number % 7}", number), be_heard, "the agent")


async def test_a_flood_by_agents_leaves_people_theirs() -> None:
    async with slow() as one:
        agent = cloud.Agent(one.api)
        await agent.join()
        one.slow_down(SLOW_S)
        credentials = {"Authorization": f"Covey {agent.me.node}.{agent.me.session}.{agent.secret}"}
        report = msgspec.json.encode(wire.Report(seen=agent.seen, messages=9))

        async def be_heard() -> None:
            assert (await one.start("person", 1, patient=True))[0] == 200

        report_once = functools.partial(one.hand, "/agent/v1/report", report, credentials)
        ended = await amid_a_flood(lambda _: report_once(), be_heard, "the person")
        assert {status for status, _ in ended} == {200, 503}


async def test_large_answers_are_made_one_in_a_turn_of_the_loop() -> None:
    """Those who ask at the same moment share a read of the store, and so are woken at the same moment. Of a large cloud
    thirty lists take seconds: made in one turn, the controller would take itself for frozen (safety S24)."""
    async with cloud.running() as house:
        [id] = await house.api.start()
        turn, turns = 0, []

        async def count() -> None:
            nonlocal turn
            while True:
                await asyncio.sleep(0)
                turn += 1

        async def ask(number: int) -> None:
            path = ("/api/v1/vm", "/api/v1/node", f"/api/v1/vm/explain?id={id}")[number % 3]
            assert (await house.replicas[0].server.hand("GET", path, peer="10.0.0.9")).status == 200
            turns.append(turn)

        counting = asyncio.create_task(count())
        await asyncio.gather(*map(ask, range(30)))
        counting.cancel()
        assert len(set(turns)) == 30


async def test_a_store_that_hangs_turns_the_controller_red_and_passes_without_a_trace() -> None:
    async with slow() as one:
        before = {id for number in range(3) for id in (await one.start("a", number))[1]}
        one.slow_down(4.0)
        waiting = [asyncio.create_task(one.start("a", 10 + number)) for number in range(50)]
        await cloud.until(lambda: _red(one.api))
        assert (await one.start("b", 0))[0] == 503
        one.slow_down(0)
        await cloud.until(lambda: cloud.is_ready(one.api))
        ended = await asyncio.gather(*waiting)
        promised = before | {id for _, ids in ended for id in ids}
        await cloud.until(lambda: _lists(one, promised))
        assert (await one.start("c", 0))[0] == 200


async def _red(api: cloud.Api) -> bool:
    return (await api.ask("GET", "/readyz"))[0] == 503


async def _lists(one: Slow, ids: set[str]) -> bool:
    return await one.listed() == ids


async def test_a_node_parks_two_polls_and_the_oldest_gives_way(house: cloud.Cloud) -> None:
    agent = cloud.Agent(house.api)
    await agent.join()
    await agent.wanted()
    polls = []
    for _ in range(4):
        polls.append(asyncio.create_task(agent.wanted(wait_s=8.0)))
        await asyncio.sleep(0.2)
    await cloud.until(lambda: [poll.done() for poll in polls] == [True, True, False, False], limit_s=6.0)
    [id] = await house.api.start()
    assert [want.instance for want in (await polls[-1]).wanted] == [id]
    await asyncio.gather(*polls)
