"""A word that brings figures alone is gathered with others; one that brings news is written at once (safety S26)."""

import asyncio

import msgspec

from covey import model
from covey.controller import figures
from covey.decide import heartbeat
from covey.store import base
from tests.support import cloud as clouds
from tests.unit.controller import cloud


def word(node: model.NodeId, messages: int, **more: object) -> model.Word:
    return msgspec.structs.replace(model.Word(node=node, session=1, messages=messages, at_ns=0), **more)


async def test_of_figures_that_wait_together_the_newest_of_each_node_is_written_once() -> None:
    async with clouds.running() as c:
        nodes = [await c.join(host_key=f"key-{number}", secret=f"secret-{number}") for number in range(40)]
        before = await c.look()
        gathered = figures.Figures(c.writer, lambda: before)
        for node in nodes:
            gathered.later(word(node, 1, cpu_util=0.1))
            gathered.later(word(node, 2, cpu_util=0.2))  # the newest counts
            await asyncio.sleep(0.005)
        await cloud.until(lambda: c.writer.unfinished == 0)
        after = await c.look()
        words = [after.word(node) for node in nodes]
        assert [kept.noun.messages for kept in words if kept is not None] == [2] * len(nodes)
        assert after.revision - before.revision == len(nodes)


async def test_what_cannot_be_written_is_let_go() -> None:
    async with clouds.running() as c:
        node = await c.join()
        gathered = figures.Figures(c.writer, (await c.look()).__class__)
        gathered.later(word(node, 1))
        gathered.later(msgspec.structs.replace(word(node, 2), session=9))  # of a life that is over
        await cloud.until(lambda: c.writer.unfinished == 0)
        assert (await c.look()).word(node) is None


async def test_an_idle_nodes_word_is_written_by_and_by_and_its_news_at_once(house: cloud.Cloud) -> None:
    agent = cloud.Agent(house.api)
    joined = await agent.join()

    async def say(messages: int, **more: object) -> None:
        said = word(joined.node, messages, **more)
        status, _ = await agent.call("report", {"seen": {}, "messages": messages, "word": msgspec.to_builtins(said)})
        assert status == 200

    async def stored() -> model.Word:
        page = await house.store.range(f"/covey/word/{joined.node}", base.prefix_end(f"/covey/word/{joined.node}"))
        return msgspec.json.decode(page.kvs[0].value, type=model.Word)

    await say(1, cpu_util=0.1)
    assert (await stored()).messages == 1, "the first word is news"
    await say(2, cpu_util=0.2, free_disk_bytes=7)
    await say(3, cpu_util=0.3, trouble="the disk is full")
    assert (await stored()).messages == 3, "a trouble is news"
    await say(4, cpu_util=0.4, trouble="the disk is full")
    assert (await stored()).messages == 3
    await cloud.until(lambda: _is(stored, 4))


async def _is(stored: "object", messages: int) -> bool:
    return bool((await stored()).messages == messages)  # type: ignore[operator]


def test_news_is_what_is_no_figure() -> None:
    before = word(model.NodeId("n"), 1)
    assert not heartbeat.is_news(word(model.NodeId("n"), 2, cpu_util=0.9, image_bytes=3, at_ns=8, tx="x"), before)
    assert heartbeat.is_news(before, None)
    assert heartbeat.is_news(word(model.NodeId("n"), 2, foreign_vms=1), before)
