"""A set of registries in memory: shelves that outlive their servers, lines that break, and servers made of the
product's own parts."""

import asyncio
import contextlib
import random
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from covey import errors, model
from covey.client import oci
from covey.registry import accepted, blobs, campaign, catalog, copying, elected, follower, heads, peers, role
from covey.store import memory
from tests.histories import play
from tests.reigns import clockwork, verdict
from tests.support import flaky

T = TypeVar("T")

TTL_S = 4
REQUEST_S = 10.0  # as `serve.AGE_LIMIT_S`
_ANSWER_S = 5.0


class World(play.Chance):
    """`world.World` from a seed and a loop's clock."""

    def boot_ns(self) -> int:
        return int(asyncio.get_running_loop().time() * 1e9)

    def wall_ns(self) -> int:
        return self.boot_ns()


# ---- what outlives a server ----------------------------------------------------------------------------------------


@dataclass
class Shelf:
    """One server's disk."""

    url: str
    logs: dict[str, list[bytes]] = field(default_factory=dict)
    eras: dict[str, int] = field(default_factory=dict)
    aside: dict[str, list[bytes]] = field(default_factory=dict)
    blobs: dict[str, bytes] = field(default_factory=dict)
    grants: set[tuple[str, str]] = field(default_factory=set)
    terms: dict[str, str] = field(default_factory=dict)
    grown: asyncio.Event = field(default_factory=asyncio.Event)

    def moved(self) -> None:
        self.grown.set()
        self.grown = asyncio.Event()


class Logs:
    """`blobs.Logs`, as much of `blobs.LogCare` as replication needs, and of `replica_disk.ReplicaDisk`."""

    def __init__(self, shelf: Shelf, step: Callable[[], Awaitable[None]]) -> None:
        self.shelf = shelf
        self._step = step

    async def read(self, positions: Mapping[str, int]) -> dict[str, list[bytes]]:
        return {log: self.shelf.logs.get(log, [])[number:] for log, number in positions.items()}

    async def append(
        self, log: str, number: int, entry: bytes, check: Callable[[], Awaitable[None]] | None = None
    ) -> bool:
        await self._step()
        if check is not None:
            await check()
        await self._step()
        return self._link(log, number, entry)

    def _link(self, log: str, number: int, entry: bytes) -> bool:
        entries = self.shelf.logs.setdefault(log, [])
        if number < len(entries):
            return entries[number] == entry
        if number > len(entries):
            raise verdict.Wrong(f"{self.shelf.url}: {log} would have a hole before {number}")
        entries.append(entry)
        self.shelf.eras.setdefault(log, 1)
        self.shelf.moved()
        return True

    async def names(self, folder: str) -> Sequence[str]:
        return [log for log in self.shelf.logs if log.startswith(folder + "/")]

    async def grant(self, repository: str, digest: model.Digest) -> None:
        self.shelf.grants.add((repository, digest))

    async def granted(self, repository: str, digests: Sequence[str]) -> frozenset[str]:
        return frozenset(digest for digest in digests if (repository, digest) in self.shelf.grants)

    async def logs(self) -> Sequence[str]:
        return list(self.shelf.logs)

    # ---- what `replica_disk` is asked for

    async def hints(self, mark: object) -> tuple[object, Sequence[str] | None]:
        return object(), None

    async def eras(self, logs: Sequence[str]) -> dict[str, int]:
        return {log: self.shelf.eras.get(log, 0) for log in logs}

    async def set_aside(self, log: str, number: int, instead: Sequence[bytes]) -> None:
        await self._step()
        entries = self.shelf.logs[log]
        self.shelf.aside.setdefault(log, []).extend(entries[number:])
        self.shelf.logs[log] = [*entries[:number], *instead]
        self.shelf.eras[log] += 1
        self.shelf.moved()

    async def aside(self) -> dict[str, list[bytes]]:
        return self.shelf.aside

    async def on_their_way(self) -> Sequence[str]:
        return ()


class Blobs:
    """As much of `blobs.Blobs` as a manifest's push needs."""

    def __init__(self, shelf: Shelf) -> None:
        self._shelf = shelf

    async def stat(self, digest: model.Digest) -> blobs.Blob | None:
        found = self._shelf.blobs.get(digest)
        return None if found is None else blobs.Blob(digest=digest, size_bytes=len(found))

    async def get(self, digest: model.Digest) -> bytes:
        if digest not in self._shelf.blobs:
            raise FileNotFoundError(digest)
        return self._shelf.blobs[digest]

    async def put(self, content: bytes, digest: model.Digest | None = None) -> blobs.Blob:
        digest = digest or model.Digest(oci.digest_of(content))
        self._shelf.blobs[digest] = content
        return blobs.Blob(digest=digest, size_bytes=len(content))


class Terms(role.Terms):
    """In memory."""

    def __init__(self, shelf: Shelf) -> None:
        self._shelf = shelf

    def _names(self) -> list[str]:
        return list(self._shelf.terms)

    def _read(self, name: str) -> str:
        return self._shelf.terms[name]

    def _make(self, name: str, content: str) -> bool:
        return self._shelf.terms.setdefault(name, content) is content


# ---- lines ---------------------------------------------------------------------------------------------------------


class Net:
    """Who reaches whom, and how well."""

    def __init__(self, chance: random.Random) -> None:
        self.chance = chance
        self.cut_off: set[str] = set()  # servers that no other server reaches
        self.lost_share = 0.0
        self.homes: dict[str, list[Server]] = {}

    async def step(self) -> None:
        """Something takes a moment, now and then a long one."""
        delay_s = 0.3 * self.chance.random() ** 8
        await asyncio.sleep(delay_s if delay_s > 0.001 else 0)

    async def ask(
        self, source: str, target: str, work: Callable[["Server"], Coroutine[Any, Any, T]], limit_s: float = _ANSWER_S
    ) -> T:
        """What a process of the server at `target` answers. Raises RemoteError; what was asked may be done then."""
        await self.step()
        if source != target and {source, target} & self.cut_off:
            raise errors.RemoteError(f"{target} cannot be reached", 0)
        alive = [server for server in self.homes[target] if not server.process.dead]
        if not alive:
            raise errors.RemoteError(f"{target} refuses connections", 0)
        server = self.chance.choice(alive)
        task = server.process.start(work(server))
        task.add_done_callback(_looked_at)
        try:
            async with asyncio.timeout(limit_s):
                answer = await asyncio.shield(task)
        except TimeoutError as error:
            raise errors.RemoteError(f"{target} does not answer", 0) from error
        await self.step()
        if self.chance.random() < self.lost_share or (source != target and {source, target} & self.cut_off):
            raise errors.RemoteError(f"the answer of {target} was lost", 0)
        return answer


def _looked_at(task: "asyncio.Task[Any]") -> None:
    """Whoever asked may have gone."""
    if not task.cancelled():
        task.exception()


class Line:
    """`peers.Peer`: from one server to another."""

    def __init__(self, net: Net, source: str, url: str) -> None:
        self.url = url
        self._net = net
        self._source = source

    async def feed(self, cursor: str, wait_s: float, known: tuple[int, str] | None = None) -> peers.Feed:
        return await self._net.ask(
            self._source, self.url, lambda at: at.feed(cursor, wait_s, known), wait_s + _ANSWER_S
        )

    async def entries(self, log: str, start: int, *, certain: bool = False) -> peers.Part:
        return await self._net.ask(self._source, self.url, lambda at: at.entries(log, start))

    async def inventory(self) -> peers.Inventory:
        return await self._net.ask(self._source, self.url, lambda at: at.inventory())

    async def word(self) -> peers.Word:
        return await self._net.ask(self._source, self.url, lambda at: at.word())


class Hearing:
    """`role.Others`"""

    def __init__(self, lines: Mapping[str, Line], heard: Callable[[int, str], Awaitable[None]]) -> None:
        self._lines = lines
        self._heard = heard

    async def hear(self) -> None:
        await asyncio.gather(*map(self._one, self._lines.values()))

    async def _one(self, line: Line) -> None:
        with contextlib.suppress(errors.RemoteError, TimeoutError):
            async with asyncio.timeout(1.0):
                told = await line.word()
                await self._heard(told.term, told.holder)


class Others:
    """`campaign.Others`"""

    def __init__(self, net: Net, own_url: str, lines: Mapping[str, Line], copies: copying.Copying) -> None:
        self.urls = tuple(lines)
        self._net = net
        self._own_url = own_url
        self._lines = lines
        self._copying = copies

    async def inventory(self, url: str) -> peers.Inventory:
        return await self._lines[url].inventory()

    async def tell(self, url: str, term: int, holder: str) -> None:
        await self._net.ask(self._own_url, url, lambda at: at.role.heard(term, holder))

    async def copy(self, url: str, name: str, past: peers.Head | None = None) -> bool:
        return await self._copying.copy(self._lines[url], name, past=past)  # type: ignore[arg-type]


class Follower(follower.Follower):
    """Entries alone: blobs and notes would only cost time."""

    async def _complete(self) -> None:
        await asyncio.sleep(3600)

    async def _tell(self) -> None:
        await asyncio.sleep(3600)


class _NoNotes:
    async def note(self, name: str, content: bytes) -> None:
        return


# ---- servers -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bugs:
    """What servers are made of: the real thing, or something planted."""

    elected_role: type[elected.Elected] = elected.Elected
    candidate: type[campaign.Campaign] = campaign.Campaign
    given_role: type[role.Appointed] = role.Appointed
    operator: type[campaign.Appointing] = campaign.Appointing
    journal: type[Logs] = Logs
    known: type[catalog.Catalog] = catalog.Catalog


class Server:
    """One life of one process of a server; the first process of each campaigns and follows."""

    def __init__(
        self,
        net: Net,
        shelf: Shelf,
        urls: Sequence[str],
        world: World,
        process: clockwork.Process,
        bugs: Bugs,
        store: memory.Memory | None,
        *,
        first: bool,
        bounds: accepted.Bounds | None = None,
    ) -> None:
        self.net = net
        self.url = shelf.url
        self.shelf = shelf
        self.process = process
        self.first = first
        self.store = None if store is None else flaky.Flaky(store.client())
        self.logs = bugs.journal(shelf, net.step)
        logs: Any = self.logs
        lines = {url: Line(net, shelf.url, url) for url in urls if url != shelf.url}
        self.heads = heads.Heads(self.logs, self.logs, self.logs, world)  # type: ignore[arg-type]
        copies = copying.Copying(self.logs, self.heads, self.logs)  # type: ignore[arg-type]
        others = Others(net, shelf.url, lines, copies)
        self.role: elected.Elected | role.Appointed
        self.campaign: campaign.Campaign | campaign.Appointing
        if self.store is not None:
            self.role = bugs.elected_role(self.store, shelf.url, logs, world)
            self.role.folds = self.heads
            self.campaign = bugs.candidate(
                *(shelf.url, self.role, self.store, logs, others, self.heads, world),
                campaigns=first,
                ttl_s=TTL_S,
                bounds=bounds,
            )
        else:
            self.role = bugs.given_role(shelf.url, Terms(shelf), urls[0], world)
            self.role.others = Hearing(lines, self.role.heard)
            self.campaign = bugs.operator(shelf.url, self.role, others, self.heads)
        self.catalog = bugs.known(Blobs(shelf), self.logs, world, role=self.role, eras=self.logs.eras)  # type: ignore[arg-type]
        self.follower = Follower(
            shelf.url,
            lines,  # type: ignore[arg-type]
            self.role.view,
            self.role.heard,
            self.catalog,
            self.heads,
            copies,
            None,  # type: ignore[arg-type]  # nothing is fetched
            self.logs,  # type: ignore[arg-type]
            _NoNotes(),  # type: ignore[arg-type]
            self.logs,  # type: ignore[arg-type]
            world,
        )

    async def start(self) -> None:
        if isinstance(self.role, elected.Elected):
            await self.role.start()
        if self.first:
            await self.follower.start()
            self.process.start(self.campaign.run())

    # ---- what peers ask

    async def feed(self, cursor: str, wait_s: float, known: tuple[int, str] | None) -> peers.Feed:
        until_s = asyncio.get_running_loop().time() + wait_s
        while True:
            grown = self.shelf.grown
            await self.heads.look()
            left_s = until_s - asyncio.get_running_loop().time()
            view = self.role.view()
            moved = cursor != self.heads.cursor or known not in (None, (view.term, view.holder))
            if moved or left_s <= 0:
                return peers.Feed(
                    term=view.term, holder=view.holder, cursor=self.heads.cursor, heads=self.heads.since(cursor)
                )
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(min(left_s, 3.0)):
                    await grown.wait()

    async def entries(self, log: str, start: int) -> peers.Part:
        fold = await self.heads.fold(log)
        found = (await self.logs.read({log: start}))[log]
        return peers.Part(
            before=fold.chain(min(start, fold.count)),
            count=fold.count,
            entries=tuple(found[: max(0, fold.count - start)]),
        )

    async def word(self) -> peers.Word:
        view = self.role.view()
        return peers.Word(term=view.term, holder=view.holder)

    async def inventory(self) -> peers.Inventory:
        await self.heads.look()
        view = self.role.view()
        return peers.Inventory(term=view.term, holder=view.holder, heads=self.heads.all())

    # ---- what clients ask

    async def write(self, work: Callable[["Server"], Coroutine[Any, Any, T]], *, marked: bool = False) -> T:
        """As `forward` does: here, or at the holder. Raises Unavailable (nothing was done) and Unsure."""
        view = self.role.view()
        if view.mine:
            try:
                async with asyncio.timeout(REQUEST_S):
                    return await work(self)
            except TimeoutError as error:
                raise errors.Unsure("no answer in time") from error
        if marked or view.why_not or not view.holder or view.holder == self.url:
            raise role.not_holder(view, self.url)
        try:
            return await self.net.ask(
                self.url, view.holder, lambda at: at.write(work, marked=True), REQUEST_S + _ANSWER_S
            )
        except errors.RemoteError as error:
            raise errors.Unsure(str(error)) from error
