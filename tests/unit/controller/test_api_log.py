"""GET /api/v1/vm/log: what a start script wrote, read from its node, by any replica (safety S26)."""

import asyncio
import base64
import contextlib
import time
from collections.abc import AsyncIterator
from typing import Any

import aiohttp

from covey import model, wire, world
from covey import server as servers
from covey.controller import api_log
from covey.store import base, schema
from tests.unit.controller import cloud

Said = wire.ReportEvent
SCRIPT = base64.b64encode(b"echo hello").decode()
STREAM = bytes(range(256)) * 4096  # 1 MiB


class Node:
    """An agent by hand at the second replica, that keeps STREAM."""

    def __init__(self, house: cloud.Cloud) -> None:
        self.agent = cloud.Agent(house.apis[-1])
        self.answers = 0

    async def booted(self, house: cloud.Cloud) -> str:
        await self.agent.join()
        (id,) = await house.api.start(startup_script=SCRIPT)
        want = await self.agent.work(wire.Verb.RUN)
        assert (await self.agent.launch(want)).granted
        await self.agent.report(self.agent.item(want, Said.BOOTED, vm=cloud.vm_info(id)))
        return id

    async def question(self) -> model.Question:
        """The next one, as a parked poll is answered with it."""
        while True:
            state = await self.agent.wanted(wait_s=5.0)
            if state.questions:
                (question,) = state.questions
                return question

    async def answer(self, nonce: str, output: model.Output | None, fault: str = "") -> bool:
        body = wire.Answer(nonce=nonce, seen=self.agent.seen, messages=self.agent.messages, output=output, fault=fault)
        status, envelope = await self.agent.call("answer", body)
        assert (status, envelope["status"]) == (200, "OK"), envelope
        self.answers += 1
        return bool(envelope["body"].get("taken", False))

    async def serve(self) -> None:
        """Answer all that is asked."""
        while True:
            question = await self.question()
            start = question.offset if question.offset >= 0 else len(STREAM) + question.offset
            data = STREAM[start : start + question.limit]
            end = start + len(data) == len(STREAM)
            assert await self.answer(question.nonce, model.Output(data=data, offset=start, size=len(STREAM), end=end))


async def read(house: cloud.Cloud, id: str, more: str = "") -> dict[str, Any]:
    return dict(await house.api.ok("GET", f"/api/v1/vm/log?id={id}{more}"))


async def leftovers(house: cloud.Cloud) -> list[str]:
    keys = []
    for prefix in (schema.ASKS, schema.ANSWERS):
        keys += [kv.key for kv in (await house.store.range(prefix, base.prefix_end(prefix))).kvs]
    return keys


async def test_the_reader_and_the_node_use_different_replicas(pair: cloud.Cloud) -> None:
    node = Node(pair)
    id = await node.booted(pair)
    serving = asyncio.create_task(node.serve())
    try:
        text, offset, end = b"", 0, False
        while not end:
            part = await read(pair, id, f"&offset={offset}")
            data = base64.b64decode(part["data"])
            assert (part["offset"], part["size"]) == (offset, len(STREAM))
            assert len(data) <= schema.ANSWER_LIMIT_BYTES
            text, offset, end = text + data, offset + len(data), part["end"]
        assert text == STREAM
        last = await read(pair, id, "&stream=stderr&offset=-10&limit=5")
        assert base64.b64decode(last["data"]) == STREAM[-10:-5]
    finally:
        serving.cancel()
        await asyncio.gather(serving, return_exceptions=True)

    async def gone() -> bool:
        return await leftovers(pair) == []

    await cloud.until(gone)


async def test_a_question_answers_the_parked_poll_at_once_and_its_end_does_not(pair: cloud.Cloud) -> None:
    node = Node(pair)
    id = await node.booted(pair)
    await node.agent.wanted()
    begun = time.monotonic()
    parked = asyncio.create_task(node.agent.wanted(wait_s=8.0))
    await asyncio.sleep(0)
    reading = asyncio.create_task(read(pair, id))
    (question,) = (await parked).questions
    assert time.monotonic() - begun < 7.5
    assert (question.instance, question.epoch, question.stream, question.offset) == (id, 1, "stdout", 0)
    assert await node.answer(question.nonce, model.Output(data=b"hello\n", offset=0, size=6, end=True))
    assert base64.b64decode((await reading)["data"]) == b"hello\n"
    begun = time.monotonic()
    assert (await node.agent.wanted(wait_s=0.5)).questions == ()
    assert time.monotonic() - begun >= 0.5
    assert not await node.answer(question.nonce, model.Output(data=b"again", offset=0, size=5))


@contextlib.asynccontextmanager
async def impatient(house: cloud.Cloud, wait_s: float) -> AsyncIterator[cloud.Api]:
    """The first replica's route, waiting less long for the node."""
    parts = house.replicas[0]
    routes = api_log.LogApi(parts._mirror, parts._writer, wait_s=wait_s).routes()
    server = servers.Server(routes, world=world.System())
    await server.start("127.0.0.1", 0)
    try:
        async with aiohttp.ClientSession(f"http://127.0.0.1:{server.port}") as http:
            yield cloud.Api(http)
    finally:
        await server.drain(1.0)


async def test_a_node_that_does_not_answer(pair: cloud.Cloud) -> None:
    node = Node(pair)
    id = await node.booted(pair)
    async with impatient(pair, 0.3) as api:
        said = await api.fail("GET", f"/api/v1/vm/log?id={id}")
    assert said == "the node does not answer; the last 64 KiB are shown by GET /api/v1/vm?id="

    async def gone() -> bool:
        return await leftovers(pair) == []

    await cloud.until(gone)


async def test_a_node_that_has_nothing_says_why(pair: cloud.Cloud) -> None:
    node = Node(pair)
    id = await node.booted(pair)
    reading = asyncio.create_task(pair.api.fail("GET", f"/api/v1/vm/log?id={id}"))
    await node.answer((await node.question()).nonce, None, "there is no such VM")
    assert "there is no such VM" in await reading


async def test_what_cannot_be_read_is_refused_without_asking_anybody(pair: cloud.Cloud) -> None:
    node = Node(pair)
    id = await node.booted(pair)
    (waiting,) = await pair.api.start(startup_script=SCRIPT, count=1, node_id=node.agent.me.node)
    (scriptless,) = await pair.api.start()
    for query, said in (
        ("", "id"),
        ("id=nope", "Not found"),
        (f"id={scriptless}", "no start script"),
        (f"id={waiting}", "no VM"),
        (f"id={id}&stream=stdin", "stream"),
        (f"id={id}&offset=many", "offset"),
        (f"id={id}&offset={10**30}", "offset"),
        (f"id={id}&offset=%D9%A1", "offset"),
        (f"id={id}&limit=0", "limit"),
        (f"id={id}&limit={schema.ANSWER_LIMIT_BYTES + 1}", "limit"),
    ):
        assert said in await pair.api.fail("GET", f"/api/v1/vm/log?{query}"), query
    assert await leftovers(pair) == []


async def test_too_much_at_once_is_asked_for_again_later(pair: cloud.Cloud) -> None:
    node = Node(pair)
    id = await node.booted(pair)
    async with impatient(pair, 2.0) as api:
        many = [api.ask("GET", f"/api/v1/vm/log?id={id}") for _ in range(schema.ASK_SLOTS + 3)]
        answers = await asyncio.gather(*many)
    assert sorted(status for status, _ in answers) == [200] * schema.ASK_SLOTS + [503] * 3


async def test_an_answer_that_is_too_large_is_refused(pair: cloud.Cloud) -> None:
    node = Node(pair)
    await node.booted(pair)
    large = model.Output(data=bytes(schema.ANSWER_LIMIT_BYTES + 1), offset=0, size=1 << 30)
    body = wire.Answer(nonce="n", seen=node.agent.seen, messages=node.agent.messages, output=large)
    status, envelope = await node.agent.call("answer", body)
    assert (status, envelope["status"]) == (200, "FAIL")
    assert "at most" in envelope["message"]
