"""Random histories of replicas on disks of their own, in one process, from a seed: pushes, deletes, the role moves, and
servers are killed at any step of following, fetching and setting aside.

    python -m tests.histories.following --histories 1000
    python -m tests.histories.following --first 77 --histories 1 -v

One event loop, no threads: what a server does to its disk is a step, before and after which others may go on, and at
which it may be killed; so may it be at every failpoint within. A killed server does nothing more: its coroutines stand
still for good, its locks are gone, as after kill -9. What decides is the product's own; peers talk without a network
(`tests.support.near_peer`), break off, lie, lack blobs and stay away.

In the end, when all is well again: all logs are the holder's, byte for byte; every blob that one of them needs is on
every disk, with the right bytes; what was acknowledged is in the log, or was set aside where the role was taken by
force; nothing half is left. And no reader that read along ever had a whole blob of wrong bytes.
"""

import argparse
import asyncio
import contextlib
import dataclasses
import io
import os
import random
import shutil
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from covey import errors, failpoint, model, observe
from covey.client import oci
from covey.registry import blobs, copying, disk, disk_care, fetching, follower, journal, peers, replica_disk, verify
from tests.histories import play
from tests.reigns import clockwork
from tests.support import near_peer, node

T = TypeVar("T")

Wrong = play.Wrong
URLS = tuple(node.urls(3))
REPOSITORIES = ("a", "b/c")
TAGS = ("v1", "v2", "v3")
LAYERS = tuple(f"layer {number} ".encode() * size for number, size in enumerate((3, 3, 40_000, 40_000, 90_000)))
TURNS = 50
_SETTLE_TURNS = 60


class Killed(BaseException):
    """Ends what a killed server was doing, when the history is over; or a step in the middle of its work."""


class World(play.Chance):
    """Time passes when the history says so."""

    now_ns = 10**9

    def boot_ns(self) -> int:
        return self.now_ns


class Life:
    """One life of a server."""

    def __init__(self, play: "Following", url: str) -> None:
        self.play, self.url = play, url
        self.dead = False
        self.over = False
        self.partials: list[replica_disk.Partial] = []
        self.tasks: list[asyncio.Task[Any]] = []
        self.answers: list[asyncio.Task[Any]] = []  # whose faults are for those who asked
        self.died = asyncio.Event()

    async def answer(self, work: Coroutine[Any, Any, T]) -> T:
        """What it answers to another server. Raises RemoteError when it dies meanwhile."""
        if self.dead:
            work.close()
            raise errors.RemoteError(f"{self.url} refuses connections")
        task, dying = asyncio.create_task(work), asyncio.create_task(self.died.wait())
        self.answers.append(task)
        try:
            await asyncio.wait([task, dying], return_when=asyncio.FIRST_COMPLETED)
        finally:
            dying.cancel()
        if not task.done():
            task.add_done_callback(_looked_at)
            raise errors.RemoteError(f"{self.url} died before it had answered")
        self.answers.remove(task)
        return task.result()

    async def step(self, work: Callable[[], Any]) -> Any:
        await self._pause()
        with self.play.working(self):
            found = work()
        try:
            await self._pause()
        except BaseException:
            if isinstance(found, io.IOBase):
                found.close()  # the kernel does it for one that was killed
            raise
        return found

    async def _pause(self) -> None:
        for _ in range(self.play.chance.randrange(3)):
            await asyncio.sleep(0)
        if not self.dead:
            self.play.maybe_kill(self, "between steps")
        if self.over:
            raise Killed
        if self.dead:
            await asyncio.Event().wait()

    def kill(self) -> None:
        self.dead = True
        self.died.set()
        for partial in self.partials:
            if partial._handle >= 0:  # the kernel closes them
                os.close(partial._handle)
                partial._handle = -1


def _looked_at(task: "asyncio.Task[Any]") -> None:
    """Nobody waits for it any more."""
    if not task.cancelled():
        task.exception()


class Mortal(near_peer.Near):
    """A peer that may die while it is asked."""

    life: Life

    async def feed(self, cursor: str, wait_s: float) -> peers.Feed:
        return await self.life.answer(super().feed(cursor, wait_s))

    async def entries(self, log: str, start: int, *, certain: bool = False) -> peers.Part:
        return await self.life.answer(super().entries(log, start, certain=certain))

    async def inventory(self) -> peers.Inventory:
        return await self.life.answer(super().inventory())

    async def size_bytes(self, digest: model.Digest) -> int:
        return await self.life.answer(super().size_bytes(digest))

    @contextlib.asynccontextmanager
    async def open(self, digest: model.Digest, start: int = 0, end: int | None = None) -> AsyncIterator[peers.Source]:
        async with contextlib.AsyncExitStack() as stack:
            source = await self.life.answer(stack.enter_async_context(super().open(digest, start, end)))
            yield _Mortal(self.life, source)


class _Mortal:
    """`peers.Source`"""

    def __init__(self, life: Life, source: peers.Source) -> None:
        self.size_bytes = source.size_bytes
        self._life = life
        self._pieces = source.pieces()

    async def pieces(self) -> AsyncIterator[bytes]:
        async def one() -> bytes:
            return await anext(self._pieces, b"")

        while piece := await self._life.answer(one()):
            yield piece


class _Stepped:
    life: Life


class SteppedDisk(disk.Disk, _Stepped):
    async def _run(self, work: Any, *args: Any, **kwargs: Any) -> Any:
        return await self.life.step(lambda: work(*args, **kwargs))


class SteppedJournal(journal.Journal, _Stepped):
    async def _run(self, work: Any) -> Any:
        return await self.life.step(work)


class SteppedCare(disk_care.DiskCare, _Stepped):
    async def _run(self, work: Any) -> Any:
        return await self.life.step(work)


class SteppedHeld(replica_disk.ReplicaDisk, _Stepped):
    async def run(self, work: Any) -> Any:
        return await self.life.step(work)

    async def take(self, digest: model.Digest) -> replica_disk.Partial | None:
        def work() -> replica_disk.Partial | None:
            partial = self._take(digest)
            if partial is not None:
                self.life.partials.append(partial)
            return partial

        found: replica_disk.Partial | None = await self.run(work)
        return found


@dataclasses.dataclass(frozen=True)
class Bugs:
    """What servers are made of: the real thing, or something planted."""

    held: type[SteppedHeld] = SteppedHeld
    copies: type[copying.Copying] = copying.Copying
    fetches: type[fetching.Fetching] = fetching.Fetching


@dataclasses.dataclass(frozen=True)
class Done:
    """An acknowledged push."""

    repository: str
    tag: str
    digest: str


class Following:
    def __init__(self, seed: int, bugs: Bugs, say: Callable[[str], None]) -> None:
        self.chance = random.Random(seed)
        self.bugs = bugs
        self.say = say
        self.world = World(self.chance)
        self.base = Path(tempfile.mkdtemp(prefix="covey-following-"))
        self.nodes: dict[str, node.Node] = {}
        self.lives: list[Life] = []
        self.term, self.holder = 1, URLS[0]
        self.forced = False
        self.done: list[Done] = []
        self.kills_left = self.chance.choice((0, 1, 3, 6))
        self.stormy = True
        self._working: Life | None = None
        self._steps = 0

    # ---- servers ---------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def working(self, life: Life) -> Iterator[None]:
        self._steps += 1
        self._working = life
        try:
            yield
        finally:
            self._working = None

    def maybe_kill(self, life: Life, where: str) -> None:
        if self.stormy and self.kills_left and self.chance.random() < 0.004:
            self.kills_left -= 1
            self.say(f"{life.url} is killed at {where}")
            life.kill()

    def reached(self, name: str) -> None:
        """A failpoint, in the middle of a server's work."""
        life = self._working
        if life is not None and not life.dead:
            if self.stormy and self.kills_left and self.chance.random() < 0.03:
                self.kills_left -= 1
                self.say(f"{life.url} is killed at {name}")
                life.kill()
            if life.dead:
                raise Killed

    def boot(self, url: str) -> node.Node:
        base = self.base / url.rpartition("/")[2]
        base.mkdir(exist_ok=True)
        life = Life(self, url)
        made = node.Parts(
            content=SteppedDisk,
            logs=SteppedJournal,
            care=SteppedCare,
            held=self.bugs.held,
            copies=self.bugs.copies,
            fetches=self.bugs.fetches,
        )
        who = node.Who(url, 1, URLS[0])
        if url in self.nodes:  # what it knew is on its disk
            who = dataclasses.replace(self.nodes[url].who)
        one = node.Node(base, who, self.world, made)
        for part in (one.content, one.logs, one.care, one.held):
            assert isinstance(part, _Stepped)
            part.life = life
        self.lives.append(life)
        self.nodes[url] = one
        for other in self.nodes.values():
            if other is not one:
                self.meet(one, other)
                self.meet(other, one)
        self.start(life, self.follow(one))
        self.start(life, self.read_along(one))
        return one

    def meet(self, one: node.Node, other: node.Node) -> None:
        far = Mortal(other.url, other.feed, other.content)
        far.life = self.life_of(other)
        one.others[other.url] = far

    def life_of(self, one: node.Node) -> Life:
        return next(life for life in reversed(self.lives) if life.url == one.url)

    def start(self, life: Life, work: Coroutine[Any, Any, None]) -> None:
        async def lived() -> None:
            with contextlib.suppress(Killed):
                await work

        life.tasks.append(asyncio.create_task(lived()))

    async def follow(self, one: node.Node) -> None:
        """What the follower's loops do, in any order."""
        while self.stormy:
            await asyncio.sleep(0)
            with contextlib.suppress(errors.CoveyError):
                await self.one_turn(one, self.chance.random())

    async def one_turn(self, one: node.Node, dice: float) -> None:
        if dice < 0.2:
            for peer in list(one.others.values()):
                await one.follower._hear(peer)
        elif dice < 0.25:
            await one.follower.compare_once()
        elif dice < 0.6:
            await one.follower.follow_once()
        else:
            await one.follower.fetch_once()

    async def read_along(self, one: node.Node) -> None:
        """A client of something that its log names, whether it is here or not."""
        while self.stormy:
            await asyncio.sleep(0)
            if self.chance.random() < 0.8:
                continue
            fold = await one.repository(self.chance.choice(REPOSITORIES))
            named = sorted({digest for known in fold.manifests.values() for digest in known.refers})
            if not named:
                continue
            digest = self.chance.choice(named)
            with contextlib.suppress(errors.CoveyError, ConnectionResetError):
                size = await one.fetching.size_bytes(digest)
                content = b"".join([piece async for piece in one.fetching.tail(digest, size)])
                if oci.digest_of(content) != digest:
                    raise Wrong(f"a reader at {one.url} had {len(content)} wrong bytes for {digest}")

    # ---- clients and troubles --------------------------------------------------------------------------------------

    async def client(self) -> None:
        while self.stormy:
            await asyncio.sleep(0)
            one, repository = self.nodes[self.holder], self.chance.choice(REPOSITORIES)
            life = self.life_of(one)
            if life.dead:
                continue
            work = self.push(one, repository) if self.chance.random() < 0.8 else self.delete(one, repository)
            self.start(life, work)
            task = life.tasks[-1]
            while not task.done() and not life.dead and self.stormy:
                await asyncio.sleep(0)

    async def push(self, one: node.Node, repository: str) -> None:
        tag = self.chance.choice(TAGS)
        layers = self.chance.sample(LAYERS, self.chance.choice((1, 2)))
        with contextlib.suppress(errors.StoreError):
            digest = await one.push(repository, tag, *layers)
            self.done.append(Done(repository, tag, digest))

    async def delete(self, one: node.Node, repository: str) -> None:
        with contextlib.suppress(errors.CoveyError):
            fold = await one.repository(repository)
            what = [*fold.tags, *fold.manifests] if self.chance.random() < 0.5 else [*fold.tags]
            if what:
                await one.catalog.delete(repository, self.chance.choice(what))

    async def trouble(self) -> None:
        for _ in range(TURNS):
            for _ in range(self.chance.randrange(10, 60)):
                await asyncio.sleep(0)
            self.world.now_ns += int(self.chance.choice((0.1, 1.0, 25.0)) * 1e9)
            dice = self.chance.random()
            one = self.nodes[self.chance.choice(URLS)]
            peer = self.chance.choice(list(one.others.values()))
            if self.life_of(one).dead and dice < 0.5:
                self.say(f"{one.url} is started again")
                self.boot(one.url)
            elif dice < 0.6:
                peer.cut_after = self.chance.choice((0, 1, 200_000))
            elif dice < 0.68:
                peer.lies = not peer.lies
            elif dice < 0.76:
                peer.away = not peer.away
            elif dice < 0.80:
                peer.lacks ^= {oci.digest_of(self.chance.choice(LAYERS))}
            elif dice < 0.84:
                self.take_the_role(one)

    def take_the_role(self, one: node.Node) -> None:
        """By force: what the old holder alone has will be set aside."""
        if self.life_of(one).dead or one.url == self.holder:
            return
        self.term, self.holder, self.forced = self.term + 1, one.url, True
        self.say(f"{one.url} takes the role, term {self.term}")
        one.who.term, one.who.holder = self.term, one.url

    # ---- the end ---------------------------------------------------------------------------------------------------

    async def run(self) -> int:
        failpoint.watch(self.reached)
        try:
            for url in URLS:
                self.boot(url)
            clients = [asyncio.create_task(self.client()) for _ in range(2)]
            await self.trouble()
            self.stormy = False
            await asyncio.gather(*clients)
            await self.settle()
            await self.judge()
            return self._steps
        finally:
            failpoint.watch(None)
            shutil.rmtree(self.base, ignore_errors=True)
            await self.end()

    async def end(self) -> None:
        """Let everything go that stands still; the folder is gone by now."""
        for life in self.lives:
            life.over = True
        me = asyncio.current_task()
        while left := [task for task in asyncio.all_tasks() if task is not me]:
            for task in left:
                task.cancel()
            await asyncio.gather(*left, return_exceptions=True)

    async def settle(self) -> None:
        """All servers run, nobody lies, time passes: until nothing is to be done any more."""
        for life in [life for life in self.lives if not life.dead]:
            for task in [*life.tasks, *life.answers]:  # what is under way comes to its end
                if not task.done():
                    await asyncio.wait([task], timeout=20)
            for task in life.tasks:
                if task.done() and not task.cancelled() and task.exception() is not None:
                    raise task.exception() or Wrong
        for url in URLS:
            if self.life_of(self.nodes[url]).dead:
                self.boot(url)
        for one in self.nodes.values():
            for peer in one.others.values():
                peer.away = peer.lies = False
                peer.cut_after = None
                peer.lacks.clear()
        for _ in range(_SETTLE_TURNS):
            self.world.now_ns += 30 * 10**9
            for one in self.nodes.values():
                for peer in one.others.values():
                    await one.follower._hear(peer)
                await one.follower.compare_once()
                await one.follower.follow_once()
                while await one.follower.fetch_once():
                    pass
            if all([await self.is_settled(one) for one in self.nodes.values()]):
                return
        told = {one.url: one.follower.standing() for one in self.nodes.values()}
        raise Wrong(f"it does not settle: {told}")

    async def is_settled(self, one: node.Node) -> bool:
        holder = self.nodes[self.holder]
        same = [await one.log(name) == await holder.log(name) for name in REPOSITORIES]
        return all(same) and not one.follower.standing().missing_blobs

    async def judge(self) -> None:
        asides: list[bytes] = []
        for one in self.nodes.values():
            report = await verify.Verification(one.catalog, one.care, one.care, quick=True).run()
            if report.problems:
                raise Wrong(f"{one.url}: " + "; ".join(report.problems))
            async for held in one.care.held(blobs.Place.SHELF):
                path = disk.locate(one.base, held.digest)
                if oci.digest_of(path.read_bytes()) != held.digest:
                    raise Wrong(f"{one.url}: {held.digest} has other bytes")
            await one.follower.compare_once()
            if left := list((one.base / "fetching").iterdir()):
                raise Wrong(f"{one.url}: left in fetching: {[path.name for path in left]}")
            for entries in (await one.held.aside()).values():
                asides += entries
        if asides and not self.forced:
            raise Wrong(f"{len(asides)} entries were set aside, and nobody took the role by force")
        holder = self.nodes[self.holder]
        logs = b"".join([entry for name in REPOSITORIES for entry in await holder.log(name)])
        for done in self.done:
            if done.digest.encode() not in logs and not any(done.digest.encode() in entry for entry in asides):
                raise Wrong(f"acknowledged, and neither in the log nor set aside: {done}")
        for one in self.nodes.values():
            for name in REPOSITORIES:
                for known in (await one.repository(name)).manifests.values():
                    for digest in follower.needs(known):
                        if await one.content.stat(digest) is None:
                            raise Wrong(f"{one.url} lacks {digest} of {name}")


# ---- bugs that must be found ---------------------------------------------------------------------------------------


class Trusts(fetching.Fetching):
    """What a peer sends becomes a blob, whatever it is."""

    async def _fill(self, partial: replica_disk.Partial) -> None:
        await self._all_peers(partial)
        await self._held.publish(partial)


class Forgets(SteppedHeld):
    """What is set aside is thrown away."""

    def _set_aside(self, log: str, number: int, instead: Sequence[bytes]) -> None:
        super()._set_aside(log, number, instead)
        for folder in (self._repositories / log).glob("_aside.*"):
            shutil.rmtree(folder)


class Ignores(copying.Copying):
    """Whether the log is a beginning of the holder's is not looked at."""

    async def copy(self, peer: peers.Peer, name: str, *, certain: bool = False, past: peers.Head | None = None) -> bool:
        own = (await self._heads.fold(name)).head
        for number, entry in enumerate((await peer.entries(name, own.count)).entries, own.count):
            await self._logs.append(name, number, entry)
        return True


BUGS = {
    "trusts": Bugs(fetches=Trusts),
    "forgets": Bugs(held=Forgets),
    "ignores": Bugs(copies=Ignores),
}


def run(seed: int, bugs: Bugs | None = None, say: Callable[[str], None] = lambda _: None) -> int:
    """One history; how many steps it had. Raises Wrong."""
    return clockwork.run(Following(seed, bugs or Bugs(), say).run(), [])


def say(text: str) -> None:
    sys.stdout.write(text + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--histories", type=int, default=100)
    parser.add_argument("--first", type=int, default=1, help="the first seed")
    parser.add_argument("--planted", choices=sorted(BUGS), help="with a bug that must be found")
    parser.add_argument("-v", action="store_true", help="tell what happens")
    options = parser.parse_args()
    observe.configure(level="critical")
    steps = wrong = 0
    for seed in range(options.first, options.first + options.histories):
        try:
            steps += run(seed, BUGS.get(options.planted), say if options.v else lambda _: None)
        except Wrong as error:
            wrong += 1
            say(f"seed {seed}: {error}")
            if options.planted:
                break
    sys.stdout.write(f"{options.histories} histories, {steps} steps: {wrong} wrong\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
