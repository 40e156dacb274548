"""Commits and mirror on a real etcd: what the unit tests show on memory holds there too."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from covey import errors, model, wire, world
from covey.decide import permission
from covey.store import base, commit, commit_births, commit_cloud, etcd, mirror
from tests.support import cloud, nouns
from tests.support import etcd as etcd_server


@pytest.fixture(scope="module")
def cluster() -> Iterator[etcd_server.Cluster]:
    with etcd_server.running() as running:
        yield running


@contextlib.asynccontextmanager
async def replica(cluster: etcd_server.Cluster) -> AsyncIterator[tuple[mirror.Mirror, cloud.Cloud]]:
    """One controller's mirror and commits, with a connection of its own."""
    store = etcd.Etcd(cluster.endpoints, world=world.System())
    one = cloud.Cloud(store, world.System())
    assert isinstance(await commit_cloud.start(one.writer), commit_cloud.Cloud)
    copy = mirror.Mirror(store, one.world)
    task = asyncio.create_task(copy.run())
    try:
        yield copy, one
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await one.writer.close()
        await store.close()


async def test_every_replica_shows_what_any_replica_answered(cluster: etcd_server.Cluster) -> None:
    """Promise I6: written here, read there, at once."""
    async with replica(cluster) as (here, one), replica(cluster) as (there, _):
        for _ in range(30):
            (id,) = await one.create()
            assert (await there.fresh()).instance(id) is not None
            assert (await here.fresh()).instance(id) is not None


async def test_a_hundred_at_once_and_all_their_lives(cluster: etcd_server.Cluster) -> None:
    """Safety S17: the largest request there is, with everything that can travel with it."""
    async with replica(cluster) as (copy, one):
        node = await one.join(facts=nouns.facts(slots=1000))
        spec = nouns.spec(external_id="e", name="n" * 200, script=model.Script(key=one.world.token()))
        ids = tuple(nouns.instance_id() for _ in range(100))
        start = commit_births.Start(
            spec=spec, ids=ids, who="w", body="b", key=one.world.token(), script_text="QUJD" * 80_000
        )
        created = await commit_births.create(one.writer, await copy.fresh(), start)
        assert isinstance(created, commit_births.Created)
        for first in range(0, 100, 25):
            assert isinstance(await one.place(node, *ids[first : first + 25]), int)
        items = [nouns.item(wire.ReportEvent.ACKNOWLEDGED, id) for id in ids]
        await one.report(node, *items)
        await asyncio.gather(*(one.terminate(id) for id in ids))
        await one.report(node, *(nouns.item(wire.ReportEvent.GONE, id) for id in ids))
        snapshot = await copy.fresh()
        states = {kept.noun.state for id in ids if (kept := snapshot.instance(id)) is not None}
        assert states == {model.State.TERMINATED}
        assert await one.claims(node) == []


async def test_many_placements_race_for_one_ledger(cluster: etcd_server.Cluster) -> None:
    """Safety S11, S23: transactions that conflict are never both right, also when they travel in one batch."""
    async with replica(cluster) as (copy, one), replica(cluster) as (_, two):
        node = await one.join(facts=nouns.facts(slots=1))
        ids = await one.create(20)
        await copy.fresh()
        results = await asyncio.gather(*(side.place(node, id) for id in ids[:10] for side in (one, two)))
        assert sum(isinstance(result, int) for result in results) == len(await one.claims(node))
        assert any(isinstance(result, commit.Lost) for result in results)


async def test_keys_of_other_programs_are_passed_over(cluster: etcd_server.Cluster) -> None:
    async with replica(cluster) as (copy, one):
        await one.store.commit(base.Txn((), (base.Put("/another/program", b"\xff\x00"),)))
        (id,) = await one.create()
        assert (await copy.fresh()).instance(id) is not None
        assert copy.broken == {}


@pytest.mark.parametrize("members", [1, 3])
async def test_a_restore_is_found_out_by_who_was_there_and_by_who_was_not(members: int, tmp_path: Path) -> None:
    """Safety S18: plain etcdctl, with the same names and token, so the cluster id stays; the cloud is a minute old."""
    with etcd_server.running(members) as cluster:
        async with replica(cluster) as (copy, one):
            await one.create()
            await asyncio.to_thread(cluster.save, tmp_path / "backup")
            before = await copy.fresh()
            cluster.restore(tmp_path / "backup")
            store = etcd.Etcd(cluster.endpoints, world=one.world)
            try:  # a controller that starts now: nothing was lost, and only the log tells
                writer = commit.Writer(store, one.world, who="a new one")
                assert isinstance(await commit_cloud.start(writer), commit_cloud.Cloud)
                restored = (await mirror.listing(store)).freeze()
                assert "raft index went back" in restored.breach_why
                assert restored.chain[-2] == before.chain[-1]
            finally:
                await store.close()
            async with asyncio.timeout(90):  # the one that was there sees it as soon as its watch goes on
                while not await sees(copy, restored.breach):
                    await asyncio.sleep(0.05)


async def sees(copy: mirror.Mirror, breach: permission.Link) -> bool:
    with contextlib.suppress(errors.StoreError):
        return (await copy.fresh()).breach == breach
    return False
