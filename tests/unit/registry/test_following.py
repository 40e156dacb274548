"""Following, copying, fetching: what a replica does with what its peers tell (safety S33, S35, S36, S37)."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from covey import errors, failpoint, model, world
from covey.client import oci
from covey.decide import garbage
from covey.registry import blobs, disk, replica_disk, sweep
from tests.support import near_peer, node, storage

BIG = bytes(range(256)) * 4096  # 1 MiB


@contextlib.asynccontextmanager
async def a_set(folder: Path, count: int = 2) -> AsyncIterator[list[node.Node]]:
    found = node.several(folder, count)
    try:
        yield found
    finally:
        for one in found:
            await one.close()


def near(one: node.Node, other: node.Node) -> near_peer.Near:
    """What `one` sees of `other`."""
    return one.others[other.url]


async def test_entries_are_the_same_bytes_and_blobs_come_after_them(tmp_path: Path) -> None:
    async with a_set(tmp_path) as (holder, follower):
        for tag in ("v1", "v2"):
            await holder.push("a", tag, tag.encode(), BIG)
        await follower.follower.follow_once()
        assert await follower.log("a") == await holder.log("a")
        assert await follower.shelf() == set()
        assert follower.follower.standing().missing_blobs == 6  # two manifests, two small layers, BIG, the config
        await follower.catch_up()
        assert await follower.shelf() == await holder.shelf()
        assert follower.follower.standing().lag_s == 0


async def test_only_what_is_new_is_told(tmp_path: Path) -> None:
    async with a_set(tmp_path) as (holder, follower):
        await holder.push("a", "v1", b"1")
        await holder.push("b", "v1", b"1")
        first = await holder.feed.feed("", 0.0, asyncio.Event(), None)
        assert set(first.heads) == {"a", "b"}
        await holder.push("b", "v2", b"2")
        second = await holder.feed.feed(first.cursor, 0.0, asyncio.Event(), None)
        assert set(second.heads) == {"b"}
        again = await holder.feed.feed("made up", 0.0, asyncio.Event(), None)
        assert set(again.heads) == {"a", "b"}
        await follower.catch_up()
        same = await follower.feed.feed(second.cursor, 0.0, asyncio.Event(), None)
        assert same.heads == {}  # a cursor stands for a state, whoever gave it out


async def test_a_blob_that_nobody_has_holds_up_nothing(tmp_path: Path) -> None:
    async with a_set(tmp_path) as (holder, follower):
        await holder.push("a", "v1", b"lost")
        near(follower, holder).lacks.add(oci.digest_of(b"lost"))
        await holder.push("a", "v2", b"found")
        await follower.catch_up()
        assert oci.digest_of(b"found") in await follower.shelf()
        told = follower.follower.standing()
        assert (told.missing_blobs, told.nowhere) == (1, (oci.digest_of(b"lost"),))
        assert "push their templates again" in " ".join(told.troubles())


async def test_what_is_deleted_meanwhile_is_wanted_no_more(tmp_path: Path) -> None:
    async with a_set(tmp_path) as (holder, follower):
        digest = await holder.push("a", "v1", b"lost")
        near(follower, holder).lacks.add(oci.digest_of(b"lost"))
        await follower.catch_up()
        await holder.catalog.delete("a", digest)
        await follower.catch_up()
        assert follower.follower.standing().missing_blobs == 0
        assert (await follower.repository("a")).tags == {}


async def test_wrong_bytes_never_become_a_blob(tmp_path: Path) -> None:
    async with a_set(tmp_path) as (holder, follower):
        await holder.push("a", "v1", BIG)
        near(follower, holder).lies = True
        with pytest.raises(errors.RemoteError, match="peers sent"):
            await follower.fetching.fetch(oci.digest_of(BIG))
        assert await follower.shelf() == set()
        near(follower, holder).lies = False
        await follower.catch_up()
        assert await follower.shelf() == await holder.shelf()


async def test_a_fetch_goes_on_where_it_was_cut_and_at_another_peer(tmp_path: Path) -> None:
    async with a_set(tmp_path, 3) as (holder, second, follower):
        await holder.push("a", "v1", BIG)
        await second.catch_up()
        first, other = near(follower, holder), near(follower, second)
        first.cut_after = 500_000
        other.sent_bytes = 0
        await follower.fetching.fetch(oci.digest_of(BIG))
        assert first.sent_bytes == len(BIG)  # it moved, so it was asked again, from there on
        await storage_of(follower, oci.digest_of(BIG))
        first.away = True
        await follower.fetching.fetch(oci.digest_of(b"{}"))
        assert other.sent_bytes == 2


async def storage_of(one: node.Node, digest: model.Digest) -> None:
    blob = await one.content.stat(digest)
    assert blob is not None
    assert blob.path is not None
    assert oci.digest_of(blob.path.read_bytes()) == digest


async def test_what_a_killed_process_left_is_continued_or_found_out(tmp_path: Path) -> None:
    async with a_set(tmp_path) as (holder, follower):
        await holder.push("a", "v1", BIG)
        place = follower.base / "fetching" / oci.digest_of(BIG).replace(":", "-")
        place.write_bytes(BIG[:700_000])
        await follower.fetching.fetch(oci.digest_of(BIG))
        assert near(follower, holder).sent_bytes == len(BIG) - 700_000
        other = bytes(1_000_000) + BIG
        await holder.push("a", "v2", other)
        place = follower.base / "fetching" / oci.digest_of(other).replace(":", "-")
        place.write_bytes(b"what a disk without power made of it")
        await follower.fetching.fetch(oci.digest_of(other))
        await storage_of(follower, oci.digest_of(other))
        assert not list((follower.base / "fetching").iterdir())


async def test_a_whole_file_that_was_left_is_only_verified(tmp_path: Path) -> None:
    async with a_set(tmp_path) as (holder, follower):
        await holder.push("a", "v1", BIG)
        (follower.base / "fetching" / oci.digest_of(BIG).replace(":", "-")).write_bytes(BIG)
        await follower.fetching.fetch(oci.digest_of(BIG))
        assert near(follower, holder).sent_bytes == 0
        await storage_of(follower, oci.digest_of(BIG))


async def test_one_process_writes_and_the_other_waits(tmp_path: Path) -> None:
    """Two processes of one server, by two `ReplicaDisk`s: the lock is the kernel's."""
    async with a_set(tmp_path) as (holder, follower):
        await holder.push("a", "v1", BIG)
        digest = oci.digest_of(BIG)
        partial = await follower.held.take(digest)
        assert partial is not None
        assert await follower.held.take(digest) is None
        waiting = asyncio.create_task(follower.fetching.fetch(digest))
        await asyncio.sleep(0.05)
        assert not waiting.done()
        partial.close()
        await waiting
        assert digest in await follower.shelf()


# ---- served while it comes -----------------------------------------------------------------------------------------


async def read(chunks: AsyncIterator[bytes]) -> bytes:
    return b"".join([chunk async for chunk in chunks])


async def test_the_end_is_held_back_until_the_digest_is_right(tmp_path: Path) -> None:
    async with a_set(tmp_path) as (holder, follower):
        await holder.push("a", "v1", BIG)
        digest, peer = oci.digest_of(BIG), near(follower, holder)
        peer.gate = asyncio.Event()
        tail = follower.fetching.tail(digest, len(BIG))
        first = await anext(tail)
        assert first
        assert BIG.startswith(first)
        peer.gate.set()
        assert first + await read(tail) == BIG
        assert digest in await follower.shelf()


async def test_a_client_of_wrong_bytes_never_has_them_all(tmp_path: Path) -> None:
    async with a_set(tmp_path) as (holder, follower):
        await holder.push("a", "v1", BIG)
        near(follower, holder).lies = True
        got = bytearray()
        with pytest.raises(ConnectionResetError):
            async for piece in follower.fetching.tail(oci.digest_of(BIG), len(BIG)):
                got += piece
        assert len(got) <= len(BIG) - (64 << 10)


async def test_ranges_come_from_who_has_it_verified(tmp_path: Path) -> None:
    async with a_set(tmp_path) as (holder, follower):
        await holder.push("a", "v1", BIG)
        assert await read(follower.fetching.part(oci.digest_of(BIG), 1000, 5000)) == BIG[1000:5000]
        assert await follower.shelf() == set()


# ---- a full disk ---------------------------------------------------------------------------------------------------


class Clock(world.System):
    ahead_ns = 0

    def boot_ns(self) -> int:
        return super().boot_ns() + self.ahead_ns


class Small(disk.Disk):
    """Of which so much is free."""

    room = 1 << 40

    def _space(self) -> blobs.Space:
        return blobs.Space(total_bytes=1 << 40, free_bytes=self.room)


@contextlib.asynccontextmanager
async def a_small_follower(folder: Path) -> AsyncIterator[tuple[node.Node, node.Node, Small, Clock]]:
    clock = Clock()
    found = node.several(folder, 2, node.Parts(content=Small), clock)
    assert isinstance(found[1].content, Small)
    try:
        yield found[0], found[1], found[1].content, clock
    finally:
        for one in found:
            await one.close()


async def test_what_does_not_fit_waits_and_says_so(tmp_path: Path) -> None:
    async with a_small_follower(tmp_path) as (holder, follower, small, clock):
        small.room = len(BIG) // 2
        await holder.push("a", "v1", b"small", BIG)
        await holder.push("b", "v1", b"small too")
        await follower.catch_up()
        assert await follower.shelf() == await holder.shelf() - {oci.digest_of(BIG)}
        told = follower.follower.standing()
        assert (told.missing_blobs, told.nowhere_blobs) == (1, 0)
        assert "the registry's disk is full: 1 MiB of a blob do not fit" in told.trouble
        asked = len(near(follower, holder).asked)
        assert not await follower.follower.fetch_once()  # not again and again
        assert len(near(follower, holder).asked) == asked
        small.room = 2 * len(BIG)
        clock.ahead_ns += 10 * 10**9
        await follower.catch_up()
        assert await follower.shelf() == await holder.shelf()
        assert follower.follower.standing().troubles() == []


async def test_blobs_that_come_at_once_share_what_is_free(tmp_path: Path) -> None:
    async with a_small_follower(tmp_path) as (holder, follower, small, _):
        other = BIG[::-1]
        await holder.push("a", "v1", BIG, other)
        small.room = len(BIG) + len(BIG) // 2
        near(follower, holder).gate = gate = asyncio.Event()
        first = asyncio.create_task(follower.fetching.fetch(oci.digest_of(BIG)))
        while not near(follower, holder).sent_bytes:
            await asyncio.sleep(0.01)
        with pytest.raises(blobs.DiskFull):
            await follower.fetching.fetch(oci.digest_of(other))
        gate.set()
        await first


async def test_a_client_gets_what_does_not_fit_here(tmp_path: Path) -> None:
    """Without being kept, and verified before its end."""
    async with a_small_follower(tmp_path) as (holder, follower, small, _):
        await holder.push("a", "v1", BIG)
        small.room = 0
        digest = oci.digest_of(BIG)
        assert await read(follower.fetching.tail(digest, len(BIG))) == BIG
        assert await follower.shelf() == set()
        near(follower, holder).lies = True
        got = bytearray()
        with pytest.raises(ConnectionResetError):
            async for piece in follower.fetching.tail(digest, len(BIG)):
                got += piece
        assert len(got) <= len(BIG) - (64 << 10)


async def test_a_disk_that_is_full_in_the_middle_loses_nothing(tmp_path: Path) -> None:
    async with a_set(tmp_path) as (holder, follower):
        await holder.push("a", "v1", BIG)
        digest = oci.digest_of(BIG)
        failpoint.arm("registry.fetch.write=full")
        try:
            with pytest.raises(blobs.DiskFull):
                await follower.fetching.fetch(digest)
            assert await read(follower.fetching.tail(digest, len(BIG))) == BIG
        finally:
            failpoint.arm("")
        await follower.fetching.fetch(digest)
        assert await follower.shelf() == {digest}


# ---- who is believed -----------------------------------------------------------------------------------------------


async def test_an_older_term_is_refused(tmp_path: Path) -> None:
    async with a_set(tmp_path) as (holder, follower):
        await holder.push("a", "v1", b"1")
        follower.who.term = 2
        assert not await follower.follower.follow_once()
        assert await follower.log("a") == []
        holder.who.term = 2
        assert await follower.follower.follow_once()
        assert await follower.log("a") == await holder.log("a")


async def test_a_holder_that_hears_of_nobody_says_so(tmp_path: Path) -> None:
    """Another one may have been promoted by force, and it would not know (safety S33)."""
    clock = Clock()
    holder, *others = found = node.several(tmp_path, 3, clock=clock)
    try:
        near(holder, others[0]).away = True
        clock.ahead_ns = 60 * 10**9
        for other in others:
            await holder.follower._hear(near(holder, other))
        assert holder.follower.standing().alone_s == 0
        near(holder, others[1]).away = True
        clock.ahead_ns += 60 * 10**9
        for other in others:
            await holder.follower._hear(near(holder, other))
        assert 60 <= holder.follower.standing().alone_s < 120
        assert "no other server of the set" in " ".join(holder.follower.standing().troubles())
        assert others[0].follower.standing().alone_s == 0  # it follows: it says that the holder does not answer
    finally:
        for one in found:
            await one.close()


async def test_what_the_holder_does_not_have_is_set_aside_and_kept(tmp_path: Path) -> None:
    async with a_set(tmp_path, 3) as (old, new, third):
        await old.push("a", "v1", b"shared")
        await new.catch_up()
        await third.catch_up()
        lost = await old.push("a", "v2", b"never copied")
        await old.push("b", "v1", b"a whole repository that nobody else has")
        for one in (new, third):
            one.who.term, one.who.holder = 2, new.url
        won = await new.push("a", "v2", b"the new holder's")
        await old.follower._hear(near(old, new))
        await old.catch_up()
        await old.follower.compare_once()
        assert await old.log("a") == await new.log("a")
        assert (await old.repository("a")).tags["v2"] == won
        assert await old.log("b") == []
        told = old.follower.standing()
        assert told.aside == {"a": 1, "b": 1}
        assert lost in b"".join((await old.held.aside())["a"]).decode()

        storage.age(old.base, hours=100)
        await sweep.Collector(old.catalog, old.care, old.care, garbage.Periods(), aside=old.held.aside).run()
        assert oci.digest_of(b"never copied") in await old.shelf()
        await old.catch_up()
        assert await old.shelf() >= await new.shelf()
        await third.catch_up()
        assert await third.log("a") == await new.log("a")


async def test_a_log_made_anew_is_seen_by_every_fold(tmp_path: Path) -> None:
    async with a_set(tmp_path) as (holder, _):
        for tag in ("v1", "v2"):
            await holder.push("a", tag, tag.encode())
        await holder.heads.look()
        before = (await holder.heads.fold("a")).head
        entries = await holder.log("a")
        await holder.repository("a")
        await holder.held.set_aside("a", 1, [])
        assert set((await holder.repository("a")).tags) == {"v1"}
        assert (await holder.heads.fold("a")).count == 1
        await holder.logs.append("a", 1, entries[1])
        assert (await holder.heads.fold("a")).head == before
        assert set((await holder.repository("a")).tags) == {"v1", "v2"}


async def test_an_empty_holder_is_not_followed_into_nothing(tmp_path: Path) -> None:
    async with a_set(tmp_path, 3) as (holder, follower, empty):
        await holder.push("a", "v1", b"1")
        await follower.catch_up()
        for one in (follower, empty):
            one.who.term, one.who.holder = 2, empty.url
        await follower.catch_up()
        await follower.follower.compare_once()
        assert set((await follower.repository("a")).tags) == {"v1"}
        assert "empty storage" in follower.follower.standing().trouble


async def test_a_follower_that_was_away_finds_what_was_deleted(tmp_path: Path) -> None:
    async with a_set(tmp_path) as (holder, follower):
        digest = await holder.push("a", "v1", b"1")
        await follower.catch_up()
        await holder.catalog.delete("a", "v1")
        await holder.catalog.delete("a", digest)
        await holder.push("b", "v1", b"2")
        await follower.follower.compare_once()
        await follower.catch_up()
        assert (await follower.repository("a")).manifests == {}
        assert set((await follower.repository("b")).tags) == {"v1"}


async def test_a_blob_that_got_lost_is_found_by_comparing(tmp_path: Path) -> None:
    async with a_set(tmp_path) as (holder, follower):
        await holder.push("a", "v1", BIG)
        await follower.catch_up()
        blob = await follower.content.stat(oci.digest_of(BIG))
        assert blob is not None
        assert blob.path is not None
        blob.path.unlink()
        await follower.follower.compare_once()
        await follower.catch_up()
        await storage_of(follower, oci.digest_of(BIG))


async def test_hints_tell_what_to_look_at(tmp_path: Path) -> None:
    async with a_set(tmp_path) as (holder, _):
        mark, told = await holder.held.hints(None)
        assert told is None
        await holder.push("a", "v1", b"1")
        mark, told = await holder.held.hints(mark)
        assert told is None  # the file was not there before
        await holder.push("a", "v2", b"1")
        await holder.push("b", "v1", b"1")
        mark, told = await holder.held.hints(mark)
        assert told == ["a", "b"]
        assert await holder.held.hints(mark) == (mark, [])
        for _ in range(replica_disk._CHANGES_LIMIT // 100 + 1):
            holder.held.hint("x" * 100)
        _, told = await holder.held.hints(mark)
        assert told is None
