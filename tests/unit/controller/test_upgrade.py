"""Raising the store's format with programs of two formats side by side (safety S27).

There is one format so far, so a controller is told which one is its newest; the programs are the same otherwise.
"""

import contextlib
from collections.abc import AsyncIterator

import aiohttp
import pytest

from covey import errors, model, world
from covey.controller import replica
from covey.store import base, commit, commit_cloud, memory, mirror, schema, view
from tests.support import cloud as clouds
from tests.support import nouns
from tests.unit.controller import cloud

LIMIT_S = 30.0


class House:
    """Controllers on one store, each with the newest format that it knows."""

    def __init__(self, stack: contextlib.AsyncExitStack, registry: cloud.FakeRegistry) -> None:
        self.clock = world.System()
        self.store = memory.Memory(self.clock)
        self._stack = stack
        self._registry = registry

    async def controller(self, format: int, *, ready: bool = True) -> tuple[replica.Replica, cloud.Api]:
        chosen = cloud.chosen(COVEY_ANKA_REGISTRY=self._registry.url)
        one = replica.Replica(chosen, self.clock, self.store.client(), format=format)
        self._stack.push_async_callback(one.stop)
        await one.start()
        session = aiohttp.ClientSession(f"http://127.0.0.1:{one.server.port}")
        api = cloud.Api(await self._stack.enter_async_context(session))
        if ready:
            await cloud.until(lambda: cloud.is_ready(api), LIMIT_S)
            await cloud.until(lambda: any(noun.id == one._id for noun in self.listed(one)), LIMIT_S)
        return one, api

    def listed(self, one: replica.Replica) -> list[schema.Controller]:
        return [kept.noun for kept in one._mirror.snapshot().controllers()]

    async def format(self) -> int:
        return commit.format_of((await self.store.range(schema.FORMAT_KEY)).kvs[0])


@pytest.fixture
async def house() -> AsyncIterator[House]:
    async with contextlib.AsyncExitStack() as stack:
        registry = cloud.FakeRegistry()
        await registry.start()
        assert registry.server is not None
        stack.push_async_callback(registry.server.drain, 1.0)
        made = House(stack, registry)
        stack.push_async_callback(made.store.close)
        yield made


async def _says(api: cloud.Api, text: str) -> bool:
    status, envelope = await api.ask("GET", "/readyz")
    return status == 503 and text in envelope["message"]


async def test_the_format_is_raised_once_nobody_is_left_who_does_not_know_it(house: House) -> None:
    old, old_api = await house.controller(1)
    new, api = await house.controller(2)
    await cloud.until(lambda: len(house.listed(new)) == 2, LIMIT_S)
    [early] = await api.start()  # written by the newer program, in the store's format
    assert [one["instance_id"] for one in await old_api.ok("GET", "/api/v1/vm")] == [early]

    found = await api.ok("GET", "/api/v1/upgrade")
    assert (found["format"], found["target"], found["may_finish"]) == (1, 2, False)
    [blocker] = found["blockers"]
    assert old._id in blocker
    assert blocker.endswith("writes format 1 at most: upgrade it, or stop it")
    assert await api.fail("POST", "/api/v1/upgrade", {}) == blocker
    assert "ask a newer one" in await old_api.fail("POST", "/api/v1/upgrade", {"format": 2})
    assert await house.format() == 1

    await old.stop()
    await cloud.until(lambda: len(house.listed(new)) == 1, LIMIT_S)
    assert (await api.ok("GET", "/api/v1/upgrade"))["may_finish"]
    for _ in range(2):  # a repeat is harmless
        raised = await api.ok("POST", "/api/v1/upgrade", {"format": 2})
        assert (raised["format"], raised["may_finish"], raised["blockers"]) == (2, False, [])
    assert await house.format() == 2

    await api.start()
    _, other = await house.controller(2)
    assert len(await other.ok("GET", "/api/v1/vm")) == 2
    _, late = await house.controller(1, ready=False)
    await cloud.until(lambda: _says(late, "this program writes 1"), LIMIT_S)


async def test_a_controller_that_does_not_know_the_new_format_turns_red_and_writes_nothing(house: House) -> None:
    """It had started in the very moment in which the format was raised."""
    _, api = await house.controller(1)
    await house.store.commit(base.Txn((), (base.Put(schema.FORMAT_KEY, b'{"format":2}'),)))
    await cloud.until(lambda: _says(api, "the store holds data of format 2; this program writes 1"), LIMIT_S)
    status, _ = await api.ask("POST", "/api/v1/vm", {"vmid": cloud.TEMPLATE})
    assert status == 503
    assert (await house.store.range(schema.INSTANCES, base.prefix_end(schema.INSTANCES))).total == 0


# ---- the commit itself


@contextlib.asynccontextmanager
async def announced(*formats: int) -> AsyncIterator[tuple[clouds.Cloud, commit.Writer]]:
    """A store of format 1 on which controllers of these formats are announced, and a writer that knows format 2."""
    async with clouds.running() as c:
        for number, format in enumerate(formats):
            noun = schema.Controller(id=f"c{number}", version="1", format=format, url="", started_ns=0)
            await commit_cloud.announce(c.writer, noun, await c.store.grant(60))
        writer = commit.Writer(c.store, c.world, newest_format=2)
        writer.format = 1
        yield c, writer


async def test_what_was_decided_before_the_format_was_raised_is_not_written() -> None:
    async with announced(2) as (c, writer):
        (id,) = await c.create()
        before = await c.look()
        raised = await commit_cloud.raise_format(writer, before, 2, "tester")
        assert raised.format == 2
        with pytest.raises(errors.Unavailable, match="raised since"):
            await writer.run(before, _rename(id))
        assert await writer.run(await c.look(), _rename(id)) > before.revision
        assert writer.format == 2
        with pytest.raises(errors.Rejected, match="this program writes 1"):
            await c.terminate(id)


async def test_a_controller_that_came_back_with_less_meanwhile_is_seen() -> None:
    """The decision rests on what every controller announced: one that has changed since is looked at again."""
    async with announced(2, 2) as (c, writer):
        before = await c.look()
        noun = schema.Controller(id="c1", version="0", format=1, url="", started_ns=0)
        await commit_cloud.announce(c.writer, noun, await c.store.grant(60))
        verdict = await commit_cloud.raise_format(writer, before, 2, "tester")
        assert (verdict.format, len(verdict.blockers)) == (1, 1)
        assert (await c.look()).format == 1


async def test_one_that_is_gone_meanwhile_blocks_no_more_and_it_is_written_down_who_raised_it() -> None:
    async with announced(2, 2) as (c, writer):
        before = await c.look()
        await c.store.commit(base.Txn((), (base.Delete(schema.controller("c1")),)))
        assert (await commit_cloud.raise_format(writer, before, 2, "tester")).format == 2
        events = await c.store.range(schema.EVENTS, base.prefix_end(schema.EVENTS))
        assert any(b'"format raised"' in kv.value and b'"tester"' in kv.value for kv in events.kvs)


async def test_a_writer_without_a_view_goes_on_in_the_format_it_finds() -> None:
    async with announced(2) as (c, writer):
        other = commit.Writer(c.store, c.world, newest_format=2)
        other.format = 1
        await commit_cloud.raise_format(writer, await c.look(), 2, "tester")
        noun = schema.Controller(id="c9", version="2", format=2, url="", started_ns=0)
        await commit_cloud.announce(other, noun, await c.store.grant(60))
        assert other.format == 2
        assert (await mirror.listing(c.store)).controller("c9") is not None


def _rename(id: str) -> commit.Rule[int]:
    def rule(reading: commit.Reading) -> commit.Write[int] | int:
        kept = reading.instance(id)
        assert kept is not None
        renamed = nouns.instance(id=model.InstanceId(id), tx=reading.tx)
        return commit.Write((reading.put(schema.instance(id), renamed),), lambda revision: revision)

    return rule


def test_a_view_without_a_format_is_nothing_to_raise() -> None:
    assert not commit_cloud.upgradable(view.Snapshot()).may_finish
