"""What clients do in a history, what goes wrong meanwhile, and what must hold at its end.

Three servers of one or two processes each; four clients, who push and delete tags of their own in two templates, at any
server, and repeat what they got no answer to now and then. Servers freeze, die and start again, are cut off from each
other and from etcd; answers of etcd get lost or come late; operators promote.

Never: a hole in a log. In the end, when everything is well again: all logs are the same; every push and delete that was
acknowledged is in them, each client's in the order in which it was acknowledged; no version number was given twice, and
each is the one that was told. With etcd nothing that could be seen was ever set aside; without, nothing that was
acknowledged, unless somebody promoted by force, or restored etcd: then it lies aside, so it is not lost.

Some histories *strand* what was accepted, instead of the storm: the holder is left alone until etcd keeps what it takes
no more; it goes, another one is promoted by force, which gives that up; and when that one has taken something in its
place, the old one is back alone. What was acknowledged after the promotion has to be in the logs all the same. So has
what was acknowledged after etcd was restored.
"""

import asyncio
import math
import random
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any

from covey import errors, model
from covey.client import oci
from covey.registry import accepted, catalog
from covey.store import memory
from tests.reigns import clockwork, parts, verdict
from tests.support import flaky, registry

CONFIG = registry.template_config()
CONFIG_DIGEST = model.Digest(oci.digest_of(CONFIG))
TEMPLATES = {
    "templates/7a3f5f5e-6d0c-4b87-9c15-3f1f2a3b4c5d": "one",
    "templates/0d9b1c9e-1f0b-4b55-8a53-6f1f2a3b4c5e": "two",
}
URLS = tuple(f"http://r{number}" for number in range(3))
CLIENTS = 4
STORM_S = 25.0
CALM_S = 120.0
Wrong = verdict.Wrong


@dataclass
class Seen:
    """What the clients know in the end."""

    done: list[verdict.Done] = field(default_factory=list)
    asked: int = 0
    forced: bool = False
    sure_s: float = math.inf  # what was begun later than that was not given up by force


class Play:
    def __init__(self, seed: int, bugs: parts.Bugs, say: Callable[[str], None], *, strands: bool = False) -> None:
        self.chance = random.Random(seed)
        self.bugs = bugs
        self._say = say
        self.processes: list[clockwork.Process] = []
        self.with_etcd = self.chance.random() < 0.7 or strands
        self.forces = not self.with_etcd and self.chance.random() < 0.3
        self.workers = self.chance.choice((1, 2))
        self.seen = Seen()
        more = random.Random(f"more {seed}")
        self.bounds = accepted.Bounds(2, 1 << 20) if more.random() < 0.3 else None
        self.restores = self.with_etcd and more.random() < 0.2 and not strands
        self.strands = strands or (self.with_etcd and not self.restores and more.random() < 0.15)
        if self.strands:
            self.bounds = accepted.Bounds(1, 1 << 20)

    def say(self, text: str) -> None:
        self._say(f"{asyncio.get_running_loop().time() - 1000:8.3f} {text}")

    async def run(self) -> None:
        self.world = parts.World(self.chance)
        self.net = parts.Net(self.chance)
        self.store = memory.Memory(self.world) if self.with_etcd else None
        self.shelves = {url: parts.Shelf(url) for url in URLS}
        self.net.homes = {url: [] for url in URLS}
        for url in URLS:
            await self.boot(url)
        self.say(f"etcd: {self.with_etcd}, force: {self.forces}, processes: {self.workers}")
        self.stormy = False
        for repository in TEMPLATES:  # a template that has lost its last version lives no more
            while not await self.attempt(verdict.Done(repository, "kept", "kept"), self.chance.choice(URLS)):
                await asyncio.sleep(0.2)
        self.stormy = True
        clients = [asyncio.create_task(self.client(number)) for number in range(CLIENTS)]
        try:
            if self.strands:
                await self.strand()
            else:
                await asyncio.gather(self.storm(), self.restore())
            await self.calm()
        finally:
            self.stormy = False
        await asyncio.gather(*clients)
        await self.settled()
        aside = {url: shelf.aside for url, shelf in self.shelves.items()}
        verdict.judge(
            *(self.shelves[URLS[0]].logs, aside, self.seen.done),
            with_etcd=self.with_etcd and not self.restores,
            forced=self.seen.forced or self.restores,
            sure_s=self.seen.sure_s,
        )

    # ---- servers ---------------------------------------------------------------------------------------------------

    async def boot(self, url: str) -> None:
        self.net.homes[url] = []
        for number in range(self.workers):
            process = clockwork.Process(f"{url}.{number}")
            self.processes.append(process)
            with process.running():
                server = parts.Server(
                    *(self.net, self.shelves[url], URLS, self.world, process, self.bugs, self.store),
                    first=number == 0,
                    bounds=self.bounds,
                )
            self.net.homes[url].append(server)
            self.whether(server)
            process.start(server.start())

    def whether(self, server: parts.Server) -> None:
        """The weather on the way to etcd."""
        if server.store is not None:
            server.store.weather = self.weather
            server.store.late_s = lambda: self.chance.uniform(0.0, 12.0)
            server.store.partition(server.url in self.net.cut_off)

    def weather(self) -> flaky.Fate:
        if not self.stormy or self.chance.random() < 0.9:
            return flaky.Fate.FINE
        return self.chance.choice(list(flaky.Fate))

    def kill(self, url: str) -> None:
        for server in self.net.homes[url]:
            server.process.dead = True

    # ---- what goes wrong -------------------------------------------------------------------------------------------

    async def storm(self) -> None:
        end_s = asyncio.get_running_loop().time() + STORM_S
        self.net.lost_share = self.chance.choice((0.0, 0.03))
        trouble: list[Callable[[], Coroutine[Any, Any, None]]] = [self.freeze, self.crash, self.cut, self.promote]
        while asyncio.get_running_loop().time() < end_s:
            await asyncio.sleep(self.chance.uniform(0.2, 6.0))
            await self.chance.choice(trouble)()

    def victim(self) -> str:
        """The holder more often than others."""
        holders = [url for url, servers in self.net.homes.items() if servers and servers[0].role.view().mine]
        return self.chance.choice(holders if holders and self.chance.random() < 0.7 else list(URLS))

    async def freeze(self) -> None:
        url = self.victim()
        some = list(self.net.homes[url])
        if self.chance.random() < 0.2:
            some = [self.chance.choice(some)]
        self.say(f"freeze {[server.process.name for server in some]}")
        for server in some:
            server.process.frozen = True
        await asyncio.sleep(self.chance.choice((0.3, 3.0, 9.0, 15.0)) * self.chance.uniform(0.5, 1.5))
        self.say(f"thaw {url}")
        for server in some:
            if not server.process.dead:
                server.process.thaw()

    async def crash(self) -> None:
        url = self.victim()
        self.say(f"kill {url}")
        self.kill(url)
        await asyncio.sleep(self.chance.choice((0.1, 2.0, 8.0)) * self.chance.uniform(0.5, 1.5))
        self.say(f"boot {url}")
        await self.boot(url)

    async def cut(self) -> None:
        url = self.victim()
        only_etcd = self.chance.random() < 0.3
        self.say(f"cut {url} off{' from etcd' if only_etcd else ''}")
        if not only_etcd:
            self.net.cut_off.add(url)
        for server in self.net.homes[url]:
            if server.store is not None:
                server.store.partition(True, deaf=self.chance.random() < 0.3)
        await asyncio.sleep(self.chance.choice((0.5, 5.0, 10.0)) * self.chance.uniform(0.5, 1.5))
        self.say(f"heal {url}")
        self.heal()

    def heal(self) -> None:
        self.net.cut_off.clear()
        for servers in self.net.homes.values():
            for server in servers:
                if server.store is not None:
                    server.store.partition(False)

    async def promote(self) -> None:
        url = self.chance.choice(URLS)
        force = self.forces and self.chance.random() < 0.5
        self.seen.forced |= force
        server = self.chance.choice(self.net.homes[url])
        self.say(f"promote {url}{' by force' if force else ''}")
        task = server.process.start(server.campaign.promote(force=force))
        await asyncio.wait([task], timeout=self.chance.choice((1.0, 20.0)))
        if task.done():
            self.say(f"promoted: {task.exception()}")

    async def restore(self) -> None:
        """etcd is put back to an older state. Whoever has more than that may be away meanwhile: as with force."""
        if self.restores and self.store is not None:
            await asyncio.sleep(self.chance.uniform(0.0, STORM_S / 2))
            backup = self.store.backup()
            await asyncio.sleep(self.chance.uniform(0.0, STORM_S / 2))
            self.say("etcd is restored")
            self.store.restore(backup)
            self.seen.sure_s = asyncio.get_running_loop().time()

    # ---- what only one server has, and gives up

    async def strand(self) -> None:
        while any(repository not in shelf.logs for repository in TEMPLATES for shelf in self.shelves.values()):
            await asyncio.sleep(0.1)  # else a template may be given up as a whole, and live no more
        old = await self.holder(URLS)
        others = [url for url in URLS if url != old]
        self.chance.shuffle(others)
        await self.leave(*others)
        await asyncio.sleep(self.chance.uniform(5.0, 30.0))
        await self.leave(old)
        await self.come_back(*others)
        new = await self.force(others[0])
        await asyncio.sleep(self.chance.uniform(0.5, 15.0))
        if self.chance.random() < 0.3:  # one that has followed since stays
            others.remove(next(url for url in others if url != new))
        await self.leave(*others)
        await self.come_back(old)
        await asyncio.sleep(self.chance.uniform(1.0, 20.0))
        await self.come_back(*others)

    async def holder(self, urls: Sequence[str]) -> str:
        while True:
            for url in urls:
                if any(server.role.view().mine for server in self.net.homes[url] if not server.process.stands_still()):
                    return url
            await asyncio.sleep(0.1)

    async def leave(self, *urls: str) -> None:
        """Die, or be cut off, or stand still."""
        for url in urls:
            way = self.chance.choice((self.kill, self.kill, self.stop, self.part))
            self.say(f"{way.__name__} {url}")
            way(url)
        await asyncio.sleep(self.chance.uniform(0.0, 2.0))

    def stop(self, url: str) -> None:
        for server in self.net.homes[url]:
            server.process.frozen = True

    def part(self, url: str) -> None:
        self.net.cut_off.add(url)
        for server in self.net.homes[url]:
            if server.store is not None:
                server.store.partition(True)

    async def come_back(self, *urls: str) -> None:
        for url in urls:
            self.say(f"{url} is back")
            self.net.cut_off.discard(url)
            if any(server.process.dead for server in self.net.homes[url]):
                await self.boot(url)
            for server in self.net.homes[url]:
                server.process.thaw()
                if server.store is not None:
                    server.store.partition(False)
        await asyncio.sleep(self.chance.uniform(0.0, 2.0))

    async def force(self, url: str) -> str:
        """Promote it, until it is done; who holds the role then."""
        self.seen.forced = True
        while True:
            server = self.net.homes[url][0]
            self.say(f"promote {url} by force")
            task = server.process.start(server.campaign.promote(force=True))
            await asyncio.wait([task])
            if task.exception() is None:
                break
            self.say(f"promoted: {task.exception()}")
            await asyncio.sleep(1.0)
        self.seen.sure_s = asyncio.get_running_loop().time()
        self.say(f"{url} was promoted")
        return url

    # ---- when all is well again ------------------------------------------------------------------------------------

    async def calm(self) -> None:
        self.say("calm")
        self.net.lost_share = 0.0
        self.stormy = False
        self.heal()
        for process in self.processes:
            if not process.dead:
                process.thaw()
        for url in URLS:
            if any(server.process.dead for server in self.net.homes[url]):
                await self.boot(url)
        if not self.with_etcd:  # an operator looks after it
            await asyncio.sleep(10)
            for url in URLS:
                if any(servers[0].role.view().mine for servers in self.net.homes.values()):
                    break
                server = self.net.homes[url][0]
                self.say(f"promote {url} at last")
                task = server.process.start(server.campaign.promote(force=self.seen.forced))
                await asyncio.wait([task], timeout=60)
                self.say(f"promoted: {task.exception() if task.done() else 'no answer'}")

    async def settled(self) -> None:
        """Until there is one holder, and all logs are the same."""
        loop = asyncio.get_running_loop()
        end_s = loop.time() + CALM_S
        ended = False
        while loop.time() < end_s:
            holders = [url for url in URLS if self.net.homes[url][0].role.view().mine]
            logs = [{log: found for log, found in shelf.logs.items() if found} for shelf in self.shelves.values()]
            if len(holders) == 1 and logs[0] == logs[1] == logs[2]:
                if ended:
                    return
                ended = await self.attempt(verdict.Done(next(iter(TEMPLATES)), "the-end", "the end"), URLS[0])
            await asyncio.sleep(0.5)
        views_ = {url: self.net.homes[url][0].role.view() for url in URLS}
        counts = {url: {log: len(found) for log, found in shelf.logs.items()} for url, shelf in self.shelves.items()}
        raise Wrong(f"it does not settle: {views_} {counts}")

    # ---- clients ---------------------------------------------------------------------------------------------------

    def content(self, number: int, tag: str) -> str:
        """Something new to push, as text of a layer."""
        self.seen.asked += 1
        return f"layer {number} {tag} {self.seen.asked}"

    async def client(self, number: int) -> None:
        repository = self.chance.choice(list(TEMPLATES))
        tags = [f"c{number}-{which}" for which in range(2)]
        while self.stormy:
            await asyncio.sleep(self.chance.uniform(0.0, 1.5))
            tag = self.chance.choice(tags)
            layer = "" if self.chance.random() < 0.2 else self.content(number, tag)
            wish = verdict.Done(repository, tag, layer)
            for _ in range(self.chance.choice((1, 2, 5))):
                if await self.attempt(wish, self.chance.choice(URLS)) or not self.stormy:
                    break
                await asyncio.sleep(self.chance.uniform(0.1, 2.0))

    async def attempt(self, wish: verdict.Done, url: str) -> bool:
        """Whether it was acknowledged, or is certainly not to be done."""
        work = deletion(wish) if not wish.digest else push(wish)
        began_s = asyncio.get_running_loop().time()
        try:
            number = await self.net.ask("client", url, lambda at: at.write(work), 2 * parts.REQUEST_S)
        except (errors.StoreError, errors.RemoteError):
            return False
        except catalog.Missing:
            return True
        done = verdict.Done(wish.repository, wish.tag, "" if not wish.digest else manifest(wish)[0], number, began_s)
        self.say(f"acknowledged {done.tag} {done.digest[:14]} as {number} through {url}")
        self.seen.done.append(done)
        return True

    # ---- the verdict -----------------------------------------------------------------------------------------------


def manifest(wish: verdict.Done) -> tuple[str, bytes]:
    content = registry.template_manifest(CONFIG, wish.digest.encode(), name=TEMPLATES[wish.repository], tag=wish.tag)
    return oci.digest_of(content), content


Work = Callable[[parts.Server], Coroutine[Any, Any, int | None]]


def push(wish: verdict.Done) -> Work:
    async def work(server: parts.Server) -> int | None:
        layer = wish.digest.encode()
        for content in (CONFIG, layer):
            blob = await server.catalog.blobs.put(content)
            await server.logs.grant(wish.repository, blob.digest)
        _, number = await server.catalog.push(
            wish.repository, wish.tag, manifest(wish)[1], oci.OCI_MANIFEST, force=True
        )
        return number

    return work


def deletion(wish: verdict.Done) -> Work:
    async def work(server: parts.Server) -> int | None:
        await server.catalog.delete(wish.repository, wish.tag)
        return None

    return work


def run(
    seed: int,
    bugs: parts.Bugs | None = None,
    say: Callable[[str], None] = lambda _: None,
    *,
    strands: bool = False,
) -> None:
    """One history. Raises Wrong."""
    play = Play(seed, bugs or parts.Bugs(), say, strands=strands)
    clockwork.run(play.run(), play.processes)
