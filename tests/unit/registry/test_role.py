"""Who takes pushes: what an appointed server makes of what it hears, and what etcd accepts (safety S33, S34)."""

import asyncio
import itertools
from collections.abc import Awaitable, Callable
from pathlib import Path

import msgspec
import pytest

from covey import errors, world
from covey.registry import elected, heads, journal, role
from covey.store import base, memory
from tests.support import flaky, virtual

ME, YOU, THEY = "http://me", "http://you", "http://they"
LOG = "templates/one"


def appointed(folder: Path, *known: tuple[int, str]) -> role.Appointed:
    terms = role.Terms(folder, world.System(), fsync=False)
    for term, holder in known:
        terms.enter(term, holder)
    return role.Appointed(ME, terms, YOU, world.System())


KNOWN: tuple[tuple[tuple[int, str], ...], ...] = (
    (),
    ((1, YOU),),
    ((1, YOU), (2, ME)),
    ((1, ME), (2, YOU)),
    ((2, ME), (2, YOU)),
    ((2, YOU), (2, THEY)),
)


@pytest.mark.parametrize("known", KNOWN, ids=str)
async def test_what_an_appointed_server_makes_of_what_it_hears(
    tmp_path: Path, known: tuple[tuple[int, str], ...]
) -> None:
    """Every state with every word: an older term changes nothing, a newer one counts at once, and one of the same term
    with another holder is a dispute. Nobody becomes the holder by hearsay."""
    for number, (term, holder) in enumerate(itertools.product((0, 1, 2, 3), ("", ME, YOU, THEY))):
        folder = tmp_path / str(number)
        server = appointed(folder, *known)
        before = server.view()
        await server.heard(term, holder)
        now = server.view()
        news = holder and term >= max(before.term, 1) and not (holder == ME and term > before.term)
        if not news or (term, holder) in known:
            assert now == before
        elif term > before.term:
            assert now == role.View(term=term, holder=holder)
        else:
            assert (now.term, now.holder, now.mine) == (before.term, before.holder, False)
            assert "both" in now.why_not
        assert not (now.mine and not before.mine)
        await server.heard(term, holder)
        assert server.view() == now
        assert appointed(folder).view() == now  # as other processes of this server see it, and the next ones


async def test_an_appointed_holder_that_gave_the_role_away_confirms_nothing(tmp_path: Path) -> None:
    server = appointed(tmp_path, (1, ME))
    view = server.view()
    assert view.mine
    await server.accept(view, LOG, 0, b"entry")
    await server.settle(view, LOG, 0, entered=True)
    await server.heard(2, YOU)
    with pytest.raises(errors.Unsure, match=YOU):
        await server.settle(view, LOG, 0, entered=True)
    with pytest.raises(role.NotHolder, match=f"{YOU} takes pushes"):
        await server.accept(view, LOG, 1, b"entry")
    server.take(3)
    with pytest.raises(errors.Unsure):  # it holds the role again, but what it gave away in between is not known here
        await server.settle(view, LOG, 0, entered=True)


class Somebody:
    """`role.Others`: one of them was promoted."""

    def __init__(self, server: role.Appointed) -> None:
        self.server = server
        self.asked = 0

    async def hear(self) -> None:
        self.asked += 1
        await self.server.heard(2, YOU)


async def test_an_appointed_holder_asks_the_others_before_it_answers(tmp_path: Path) -> None:
    """It stood still while another one was promoted by force, which could not be told to it (safety S33)."""
    server = appointed(tmp_path, (1, ME))
    view = server.view()
    await server.accept(view, LOG, 0, b"entry")
    server.others = others = Somebody(server)
    with pytest.raises(errors.Unsure, match=YOU):
        await server.settle(view, LOG, 0, entered=True)
    assert not await server.certain()
    assert others.asked == 1  # and not again a moment later


# ---- with etcd -----------------------------------------------------------------------------------------------------


class _World(world.System):
    def boot_ns(self) -> int:
        return int(asyncio.get_running_loop().time() * 1e9)


class Holder:
    """A server that holds the role, over a store with weather."""

    def __init__(self, folder: Path) -> None:
        system = _World()
        self.memory = memory.Memory(system)
        self.store = flaky.Flaky(self.memory)
        self.logs = _Inline(folder, system, fsync=False)
        self.role = elected.Elected(self.store, ME, self.logs, system)
        self.role.folds = self

    async def take(self, term: int, holder: str = ME) -> None:
        reign = elected.Reign(holder=holder, term=term, id=str(term))
        await self.store.commit(base.Txn((), (base.Delete(elected.ROLE_KEY),)))
        await self.store.commit(base.Txn((), (base.Put(elected.ROLE_KEY, msgspec.json.encode(reign)),)))
        page = await self.store.range(elected.ROLE_KEY)
        self.role.learn(page.kvs[0])

    async def fold(self, log: str) -> heads.Fold:
        found = heads.Fold(1)
        found.add((await self.logs.read({log: 0}))[log])
        return found

    async def enter(self, *entries: bytes) -> None:
        """As if they had been accepted."""
        for entry in entries:
            await self.logs.append(LOG, (await self.fold(LOG)).count, entry)

    async def accepted(self) -> dict[int, bytes]:
        page = await self.store.range(elected.ACCEPTED, base.prefix_end(elected.ACCEPTED))
        return {elected.parse_accepted(kv.key)[1]: kv.value for kv in page.kvs}


class _Inline(journal.Journal):
    """Without threads."""

    async def _run(self, work: Callable[[], object]) -> object:  # type: ignore[override]
        return work()


def played(folder: Path, story: Callable[[Holder], Awaitable[None]]) -> None:
    async def main() -> None:
        holder = Holder(folder)
        await holder.take(1)
        await story(holder)
        holder.logs.close()

    virtual.run(main())


def test_only_the_reign_that_it_was_decided_in_is_accepted(tmp_path: Path) -> None:
    async def story(holder: Holder) -> None:
        view = holder.role.view()
        await holder.role.accept(view, LOG, 0, b"first")
        await holder.enter(b"first")
        await holder.take(2)  # ours again, but another reign
        with pytest.raises(role.NotHolder):
            await holder.role.accept(view, LOG, 1, b"second")
        await holder.role.accept(holder.role.view(), LOG, 1, b"third")
        await holder.enter(b"third")
        await holder.take(3, YOU)
        with pytest.raises(role.NotHolder, match=YOU):
            await holder.role.accept(view, LOG, 2, b"fourth")
        assert await holder.accepted() == {0: b"first", 1: b"third"}

    played(tmp_path, story)


@pytest.mark.parametrize("fate", [flaky.Fate.LOST_REQUEST, flaky.Fate.LOST_REPLY, flaky.Fate.LATE], ids=str)
def test_an_answer_that_was_lost_is_asked_for_again(tmp_path: Path, fate: flaky.Fate) -> None:
    async def story(holder: Holder) -> None:
        holder.store.plan(fate, fate)
        await holder.role.accept(holder.role.view(), LOG, 0, b"first")
        await asyncio.sleep(1)
        assert await holder.accepted() == {0: b"first"}

    played(tmp_path, story)


def test_who_cannot_ask_etcd_is_not_certain_to_hold_the_role(tmp_path: Path) -> None:
    """A process whose watch is cut off believes for long what was true once (safety S14)."""

    async def story(holder: Holder) -> None:
        assert await holder.role.certain()
        reign = msgspec.json.encode(elected.Reign(holder=YOU, term=2, id="2"))
        await holder.store.commit(base.Txn((), (base.Delete(elected.ROLE_KEY),)))
        await holder.store.commit(base.Txn((), (base.Put(elected.ROLE_KEY, reign),)))
        assert holder.role.view().mine
        assert not await holder.role.certain()
        holder.store.partition(True)
        with pytest.raises(errors.StoreError):
            await holder.role.certain()

    played(tmp_path, story)


def test_a_store_that_went_back_is_read_again(tmp_path: Path) -> None:
    """A watch waits for a revision that a restored store has not reached."""

    async def story(holder: Holder) -> None:
        await holder.role.start()
        backup = holder.memory.backup()
        for term in (2, 3, 4):
            await holder.take(term, YOU)
        assert holder.role.view().holder == YOU
        holder.memory.restore(backup)
        await asyncio.sleep(20)
        assert (holder.role.view().holder, holder.role.view().term) == (ME, 1)
        await holder.take(2, THEY)
        await asyncio.sleep(20)
        assert holder.role.view().holder == THEY
        await holder.role.stop()

    played(tmp_path, story)


def test_what_cannot_be_known_is_said(tmp_path: Path) -> None:
    async def story(holder: Holder) -> None:
        view = holder.role.view()
        holder.store.partition(True)
        with pytest.raises(errors.Unsure):
            await holder.role.accept(view, LOG, 0, b"first")
        holder.store.partition(False)
        holder.store.plan(flaky.Fate.UNAVAILABLE)
        with pytest.raises(errors.Unavailable, match="etcd"):
            await holder.role.accept(view, LOG, 0, b"first")

    played(tmp_path, story)


def test_a_number_that_is_taken_is_filled_in_first(tmp_path: Path) -> None:
    """Another process of this server had its entry accepted, and died before it was linked."""

    async def story(holder: Holder) -> None:
        view = holder.role.view()
        await holder.role.accept(view, LOG, 0, b"of the dead one")
        with pytest.raises(role.Taken):
            await holder.role.accept(view, LOG, 0, b"ours")
        assert (await holder.logs.read({LOG: 0}))[LOG] == [b"of the dead one"]
        await holder.role.accept(view, LOG, 1, b"ours")
        assert await holder.accepted() == {0: b"of the dead one", 1: b"ours"}

    played(tmp_path, story)


def test_a_number_is_not_given_again_after_all_have_its_entry(tmp_path: Path) -> None:
    """What was accepted is removed from etcd then; the head of its log stays."""

    async def story(holder: Holder) -> None:
        view = holder.role.view()
        await holder.role.accept(view, LOG, 0, b"first")
        await holder.logs.append(LOG, 0, b"first")
        await holder.store.commit(base.Txn((), (base.Delete(elected.accepted_key(LOG, 0)),)))
        with pytest.raises(role.Taken):
            await holder.role.accept(view, LOG, 0, b"of one that slept")
        await holder.role.accept(view, LOG, 0, b"first")  # its own answer was lost, for long

    played(tmp_path, story)


def test_a_log_from_before_goes_on_where_it_stands(tmp_path: Path) -> None:
    async def story(holder: Holder) -> None:
        await holder.enter(*(b"%d" % number for number in range(57)))
        await holder.role.accept(holder.role.view(), LOG, 57, b"first that etcd hears of")
        await holder.enter(b"first that etcd hears of")
        await holder.role.accept(holder.role.view(), LOG, 58, b"next")
        assert sorted(await holder.accepted()) == [57, 58]

    played(tmp_path, story)
