"""Safety S27: whatever this program writes, it keeps what a newer one has added, at the top and nested.

Before every step each stored noun gets unknown fields, in every object that it holds; after the step they must still be
in every object that is still there.
"""

from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import msgspec

from covey import model, wire
from covey.store import base, commit_births, commit_instances, commit_nodes, schema
from tests.support import cloud, nouns

Said = wire.ReportEvent
_FUTURE = {"future": {"of": ["a newer program"]}}
_NOT_OURS = {"metadata", "future"}  # objects whose members are no fields
_KINDS = (schema.INSTANCES, schema.NODES, schema.SESSIONS, schema.WORDS, schema.LEDGERS, schema.ORDERS, schema.TWINS)
_SPEC: dict[str, Any] = {
    "external_id": "e",
    "name": "n",
    "script": model.Script(key="s", monitored=True),
    "forwards": (model.Forward(name="ssh", guest_port=22), model.Forward(name="web", guest_port=80)),
}


def objects(value: Any, path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Every object in a stored value, by a path that names the elements of lists by what they are about."""
    if isinstance(value, dict):
        yield path, value
        for name, member in value.items():
            if name not in _NOT_OURS:
                yield from objects(member, f"{path}/{name}")
    elif isinstance(value, list):
        for element in value:
            if isinstance(element, dict):
                naming = [str(element.get(name, "")) for name in ("instance", "epoch", "name")]
                yield from objects(element, f"{path}[{'.'.join(naming)}]")


class Walk:
    """One cloud whose stored nouns are always those of a newer program."""

    def __init__(self, c: cloud.Cloud, node: model.NodeId, join: wire.Join, id: model.InstanceId) -> None:
        self.c, self.node, self.join, self.id = c, node, join, id
        self.epoch = 1
        self.checked = 0

    async def values(self) -> dict[str, Any]:
        return {kv.key: msgspec.json.decode(kv.value) for kind in _KINDS for kv in await self.c.values(kind)}

    async def infect(self) -> dict[str, set[str]]:
        """Add unknown fields everywhere; answers with the paths of the objects by key."""
        infected: dict[str, set[str]] = {}
        for key, value in (await self.values()).items():
            found = list(objects(value))
            for _, one in found:
                one.update(_FUTURE)
            infected[key] = {path for path, _ in found}
            await self.c.store.commit(base.Txn((), (base.Put(key, msgspec.json.encode(value)),)))
        return infected

    async def step(self, name: str, work: Callable[[], Awaitable[object]]) -> None:
        infected = await self.infect()
        before = (await self.c.look()).revision
        await work()
        assert (await self.c.look()).revision > before, f"{name} wrote nothing"
        for key, value in (await self.values()).items():
            for path, one in objects(value):
                if path in infected.get(key, ()):
                    self.checked += 1
                    assert one.get("future") == _FUTURE["future"], f"{name} lost unknown fields of {key} at {path!r}"

    async def say(self, event: Said, **more: Any) -> None:
        await self.step(event, lambda: self.c.report(self.node, nouns.item(event, self.id, self.epoch, **more)))


async def begin(c: cloud.Cloud) -> Walk:
    join = nouns.join(facts=nouns.facts(slots=9))
    joined = await commit_nodes.join(c.writer, await c.look(), join)
    assert isinstance(joined, commit_nodes.Joined)
    (id,) = await c.create(**_SPEC)
    return Walk(c, joined.node.noun.id, join, model.InstanceId(id))


async def test_from_placement_to_the_end() -> None:
    async with cloud.running() as c:
        w = await begin(c)
        await w.step("place", lambda: c.place(w.node, w.id))
        await w.say(Said.ACKNOWLEDGED)
        await w.say(Said.PROGRESS, progress=0.5)
        await w.say(Said.REFUSED, message="busy")
        await w.say(Said.GONE)
        await w.step("place again", lambda: c.place(w.node, w.id))
        w.epoch = 2
        await w.step("launch", lambda: c.launch(w.node, w.id, 2))
        forwards = (model.Forward(name="ssh", guest_port=22, host_port=1022),)
        await w.say(Said.BOOTED, vm=nouns.vm(forwards=forwards), script=model.ScriptResult(return_code=0))
        await w.say(Said.INFO, vm=nouns.vm(ip="10.0.0.9", forwards=forwards))
        await w.step("word", lambda: c.say(w.node, 1, (w.id, 2), ("stray", 1)))
        await w.step("another word", lambda: c.say(w.node, 2, (w.id, 2)))

        async def put() -> object:
            return await commit_instances.update(c.writer, await c.look(), w.id, name="other", metadata={"a": 1})

        await w.step("update", put)
        await w.say(Said.FAILED, message="it crashed", script=model.ScriptResult(return_code=3))
        await w.step("terminate", lambda: c.terminate(w.id))
        await w.say(Said.GONE)
        assert (await c.instance(w.id)).state == model.State.TERMINATED
        assert w.checked > 100


async def test_what_controllers_decide() -> None:
    async with cloud.running() as c:
        w = await begin(c)
        await c.place(w.node, w.id)

        async def withdraw() -> object:
            return await commit_instances.withdraw(c.writer, await c.look(), await c.kept(w.id), cloud.WHO)

        async def order() -> object:
            return await commit_nodes.order(c.writer, await c.look(), w.node, model.InstanceId("stray"), 1, cloud.WHO)

        async def order_more() -> object:
            return await commit_nodes.order(c.writer, await c.look(), w.node, model.InstanceId("stray"), 2, cloud.WHO)

        async def fail() -> object:
            return await commit_instances.fail(c.writer, await c.look(), await c.kept(w.id), "no")

        async def reap() -> object:
            return await commit_instances.reap(c.writer, await c.look(), await c.kept(w.id), cloud.WHO)

        await w.step("withdraw", withdraw)
        await w.step("order", order)
        await w.step("order of a newer epoch", order_more)
        await w.step("fail", fail)
        await w.step("reap", reap)


async def test_births_and_repeats() -> None:
    async with cloud.running() as c:
        w = await begin(c)
        twin = nouns.spec(external_id="t", name="t")

        async def create() -> commit_births.Answer:
            start = commit_births.Start(spec=twin, ids=(nouns.instance_id(),), who="tester", body="b")
            return await commit_births.create(c.writer, await c.look(), start, [w.node])

        await w.step("create and place", create)
        await w.step("repeat", create)
        assert isinstance(await create(), commit_births.Repeated)


async def test_nodes() -> None:
    async with cloud.running() as c:
        w = await begin(c)

        async def configure() -> object:
            return await commit_nodes.configure(c.writer, await c.look(), w.node, {"drain": True}, "op")

        async def takeover() -> object:
            again = nouns.join(node=w.node, host_key=w.join.host_key, last_secret=w.join.secret)
            return await commit_nodes.join(c.writer, await c.look(), again)

        async def remove() -> object:
            return await commit_nodes.remove(c.writer, await c.look(), w.node, "op")

        await w.step("configure", configure)
        await w.step("takeover", takeover)
        await c.place(w.node, w.id)
        await w.step("remove", remove)
        assert (await c.instance(w.id)).state == model.State.ERROR
