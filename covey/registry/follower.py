"""A replica follows the server that holds the push role (safety S33, S35, S37), and completes itself from any peer.

    feed ──► logs that grew are copied, all of them ──► what they need and lack is wanted ──► fetched, several at once
              │                                              ▲
              └─ no beginning of the holder's: set aside     └─ inventory, every few minutes: what got lost is found

Rules
* Entries first, bytes later: a blob that cannot be had holds up no other entry and no other blob. It is reported, and
  tried again as long as something needs it.
* Only the holder's word counts, and only under the newest term that this server has heard of: an older one's feed is
  refused. A server whose storage is empty is no holder that followers would give up anything for.
* Deletes and reverts are entries; inventories flow from the holder to followers. So what was deleted stays deleted.
* The holder too completes itself: after a takeover it may lack blobs that others have.

Everything found out here may be lost with the process: what is wanted is found again by comparing logs and shelf.
"""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import msgspec

from covey import errors, model, observe, world
from covey.registry import (
    accepted,
    blobs,
    catalog,
    copying,
    fetching,
    heads,
    peers,
    replica_disk,
    standing,
    views,
)

log = observe.log("replica")

_WAIT_S = 10.0
_PAUSE_S = 0.5  # after a fault
_LISTEN_S = 2.0
_COMPARE_S = 180.0
_NOTE_S = 1.0
_FULL_S = 5.0  # a blob that did not fit
_AGAIN_S = 20.0  # a blob that nobody had is asked for again
_AT_ONCE = 4
_SHOWN = 5
_ALONE_S = 10.0  # a holder that has heard of nobody for so long says so
_SMALL = 1 << 20


class Role(Protocol):
    """Who takes pushes, as a server knows. `holder` "": nobody."""

    @property
    def term(self) -> int: ...

    @property
    def holder(self) -> str: ...

    @property
    def mine(self) -> bool: ...

    @property
    def why_not(self) -> str:
        """What stands in the way, where nobody takes pushes."""
        ...


View = Callable[[], Role]


@dataclass(slots=True)
class Want:
    """A blob that is needed and not here. Times are of the boot clock."""

    size_bytes: int  # 0: not known
    since_ns: int
    repositories: set[str]
    not_before_ns: int = 0  # it was asked for in vain
    nowhere: bool = False  # every other server said that it has it not
    no_room: str = ""  # what the disk said
    running: bool = False


class Follower:
    """start → (works by itself) → stop. One per server: in several processes the first one."""

    def __init__(
        self,
        own_url: str,
        others: Mapping[str, peers.Peer],
        view: View,
        heard: Callable[[int, str], Awaitable[None]],
        known: catalog.Catalog,
        heads: heads.Heads,
        copying: copying.Copying,
        fetching: fetching.Fetching,
        held: replica_disk.ReplicaDisk,
        care: blobs.Care,
        log_care: blobs.LogCare,
        world: world.World,
        *,
        wait_s: float = _WAIT_S,
    ) -> None:
        """`wait_s`: how long one question for news waits for its answer."""
        self.kept: Callable[[], accepted.Kept] = accepted.Kept  # what etcd keeps, where there is one
        self._wait_s = wait_s
        self._own_url = own_url
        self._others = others
        self._view = view
        self._heard = heard
        self._catalog = known
        self._heads = heads
        self._copying = copying
        self._fetching = fetching
        self._held = held
        self._care = care
        self._log_care = log_care
        self._world = world
        self._tasks: list[asyncio.Task[None]] = []
        self._cursor = ""
        self._wants: dict[model.Digest, Want] = {}
        self._looked_at: dict[str, frozenset[model.Digest]] = {}  # manifests whose needs are settled, by repository
        self._behind: dict[str, int] = {}  # logs that could not be copied, and how many entries they lack
        self._behind_ns = world.boot_ns()  # since when something is lacking
        self._heard_ns = world.boot_ns()  # of any other server
        self._reached = False
        self._unreached = ""  # why
        self._trouble = ""
        self._no_room: dict[str, str] = {}  # logs that could not be copied, and what the disk said
        self._aside: dict[str, int] = {}
        self._news = asyncio.Event()  # something is wanted
        self._complained: set[str] = set()

    async def start(self) -> None:
        await self._survey_aside()
        loops = (self._follow, self._listen, self._complete, self._compare, self._tell)
        self._tasks = [asyncio.create_task(self._ever(loop)) for loop in loops]

    async def stop(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks = []

    async def _ever(self, work: Callable[[], Awaitable[None]]) -> None:
        """A fault ends nothing: said once, tried again."""
        name = getattr(work, "__name__", "")
        while True:
            try:
                await work()
                self._complained.discard(name)
            except (OSError, errors.CoveyError) as error:
                if name not in self._complained:
                    log.warning("following stumbled and goes on", at=name.strip("_"), error=str(error))
                self._complained.add(name)
                await asyncio.sleep(_PAUSE_S)

    # ---- entries ---------------------------------------------------------------------------------------------------

    async def _follow(self) -> None:
        if not await self.follow_once():
            await asyncio.sleep(_PAUSE_S)

    async def follow_once(self) -> bool:
        """One answer of the holder's feed, and everything that follows from it; False: there was none that counts."""
        role = self._view()
        peer = self._others.get(role.holder)
        if role.mine or peer is None:
            self._reached = role.holder == self._own_url
            self._cursor = ""
            return False
        try:
            told = await peer.feed(self._cursor, self._wait_s)
        except errors.RemoteError as error:
            self._reached, self._unreached = False, str(error)
            return False
        if not await self._counts(peer, told.term, told.holder):
            return False
        await self._take(peer, told.heads, whole=False)
        self._cursor = told.cursor if not self._behind else ""
        self._reached = True
        return not self._behind

    async def _counts(self, peer: peers.Peer, term: int, holder: str) -> bool:
        """Whether this peer's word is to be followed: it holds the role, under no older term than we know."""
        await self._heard(term, holder)
        role = self._view()
        return peer.url == role.holder == holder and term >= role.term and not role.mine

    async def _take(self, peer: peers.Peer, told: Mapping[str, peers.Head], *, whole: bool) -> None:
        """Bring the logs told of to where the holder has them; `whole`: those are all that it has."""
        await self._heads.look()
        mine = self._heads.all()
        if whole and mine and not told:
            self._trouble = f"the push registry {peer.url} has an empty storage: nothing is given up for it"
            return
        self._trouble = ""
        wrong = [name for name, head in told.items() if mine.get(name) != head]
        if whole:
            wrong += [name for name in mine if name not in told]
        for name in sorted(wrong, key=lambda name: not name.startswith("_")):  # who holds a name, before what it names
            await self._one(peer, name, told.get(name, peers.Head()).count - mine.get(name, peers.Head()).count)
        if wrong:
            await self._want([name for name in wrong if not name.startswith("_")])

    async def _one(self, peer: peers.Peer, name: str, lacking: int) -> None:
        try:
            if not await self._copying.copy(peer, name):
                await self._differs(peer, name)
            self._behind.pop(name, None)
            self._no_room.pop(name, None)
        except (errors.CoveyError, OSError) as error:
            self._behind[name] = max(1, lacking)
            if isinstance(error, blobs.DiskFull):
                self._no_room[name] = str(error)
            log.warning("a log could not be copied; it is tried again", log=name, peer=peer.url, error=str(error))

    async def _differs(self, peer: peers.Peer, name: str) -> None:
        """Ours has entries that the holder's has not. It is asked once more who it is: what is set aside is not
        served any more."""
        told = await peer.inventory()
        if not told.heads or not await self._counts(peer, told.term, told.holder):
            raise errors.RemoteError(f"{peer.url} differs from us and may not be the push registry any more")

        def still() -> bool:
            role = self._view()
            return role.holder == peer.url and role.term <= told.term and not role.mine

        if await self._copying.replace(peer, name, still):
            self._looked_at.pop(name, None)
            await self._survey_aside()

    async def _compare(self) -> None:
        await self.compare_once()
        await asyncio.sleep(_COMPARE_S)

    async def compare_once(self) -> None:
        """Compare everything with the holder's list, and the shelf with everything that is needed."""
        role = self._view()
        peer = self._others.get(role.holder)
        if peer is not None and not role.mine:
            with contextlib.suppress(errors.RemoteError):
                told = await peer.inventory()
                if await self._counts(peer, told.term, told.holder):
                    await self._take(peer, told.heads, whole=True)
        self._looked_at.clear()
        await self._want([name for name in await self._log_care.logs() if not name.startswith("_")])
        for digest in await self._held.on_their_way():
            if digest not in self._wants:
                await self._held.give_up(digest)
        await self._survey_aside()

    async def _listen(self) -> None:
        """Hear from every peer who holds the role, whoever it is."""
        await asyncio.gather(*(self._hear(peer) for peer in self._others.values()))
        await asyncio.sleep(_LISTEN_S)

    async def _hear(self, peer: peers.Peer) -> None:
        with contextlib.suppress(errors.RemoteError):
            told = await peer.word()
            self._heard_ns = self._world.boot_ns()
            await self._heard(told.term, told.holder)

    # ---- blobs -----------------------------------------------------------------------------------------------------

    async def _want(self, names: list[str]) -> None:
        """What these repositories need and this server lacks is wanted, and what they do not need any more is not."""
        for start in range(0, len(names), 50):
            for fold in await self._catalog.repositories(names[start : start + 50]):
                await self._want_of(fold)
        if self._wants:
            self._news.set()

    async def _want_of(self, fold: views.Repository) -> None:
        settled = self._looked_at.get(fold.name, frozenset())
        lacking = {
            digest: size
            for known in fold.manifests.values()
            for digest, size in needs(known).items()
            if digest in self._wants or known.digest not in settled
        }
        for digest, want in list(self._wants.items()):
            if digest not in lacking:
                want.repositories.discard(fold.name)
                if not want.repositories:
                    del self._wants[digest]
        for digest, size in lacking.items():
            if digest in self._wants:
                self._wants[digest].repositories.add(fold.name)
            elif await self._catalog.blobs.stat(digest) is None:
                self._wants[digest] = Want(size, self._world.boot_ns(), {fold.name})
        self._looked_at[fold.name] = frozenset(map(model.Digest, fold.manifests))

    async def _complete(self) -> None:
        """Fetch what is wanted, several at once, in the order of its coming; small things first."""
        async with asyncio.TaskGroup() as group:
            for _ in range(_AT_ONCE):
                group.create_task(self._fetch_on())

    async def _fetch_on(self) -> None:
        while True:
            if not await self.fetch_once():
                self._news.clear()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(1.0):
                        await self._news.wait()

    async def fetch_once(self) -> bool:
        """Try to have one blob that is wanted; False: there is none to be tried now."""
        digest = self._next()
        if digest is None:
            return False
        want = self._wants[digest]
        want.running = True
        try:
            await self._one_blob(digest, want)
        finally:
            want.running = False
        return True

    def _next(self) -> model.Digest | None:
        now_ns = self._world.boot_ns()
        ready = [digest for digest, want in self._wants.items() if not want.running and want.not_before_ns <= now_ns]
        return min(ready, key=lambda digest: self._wants[digest].size_bytes > _SMALL, default=None)

    async def _one_blob(self, digest: model.Digest, want: Want) -> None:
        try:
            await self._fetching.fetch(digest)
        except (errors.CoveyError, OSError) as error:
            if not want.not_before_ns:
                names = sorted(want.repositories)
                log.warning("a blob cannot be had yet", digest=digest, repositories=names, error=str(error))
            want.nowhere = isinstance(error, errors.NotFound)
            want.no_room = str(error) if isinstance(error, blobs.DiskFull) else ""
            pause_s = _AGAIN_S if want.nowhere else _FULL_S if want.no_room else 2 * _PAUSE_S
            want.not_before_ns = self._world.boot_ns() + int(pause_s * 1e9)
            return
        self._wants.pop(digest, None)

    # ---- what is told ----------------------------------------------------------------------------------------------

    async def _survey_aside(self) -> None:
        self._aside = {name: len(entries) for name, entries in (await self._held.aside()).items()}

    def standing(self) -> standing.Standing:
        role = self._view()
        now_ns = self._world.boot_ns()
        current = role.mine or (self._reached and not self._behind)
        if current and not self._wants:
            self._behind_ns = now_ns
        since_ns = min([self._behind_ns, *(want.since_ns for want in self._wants.values())])
        nowhere = sorted(digest for digest, want in self._wants.items() if want.nowhere)
        kept = self.kept()
        alone_s = (now_ns - self._heard_ns) / 1e9 if role.mine and self._others else 0.0
        no_room = next(filter(None, (want.no_room for want in self._wants.values())), "")
        return standing.Standing(
            url=self._own_url,
            term=role.term,
            holder=role.holder,
            mine=role.mine,
            reached=self._reached,
            unreached="" if self._reached else self._unreached,
            alone_s=round(alone_s, 1) if alone_s > _ALONE_S else 0.0,
            lag_s=0.0 if current and not self._wants else round((now_ns - since_ns) / 1e9, 1),
            lag_bytes=sum(want.size_bytes for want in self._wants.values()),
            missing_blobs=len(self._wants),
            missing_entries=sum(self._behind.values()),
            nowhere=tuple(nowhere[:_SHOWN]),
            nowhere_blobs=len(nowhere),
            aside=self._aside,
            rejected_blobs=self._fetching.rejected,
            accepted_entries=kept.entries,
            accepted_bytes=kept.size_bytes,
            accepted_for=kept.waits_for,
            accepted_dropped=kept.dropped,
            trouble=role.why_not or self._trouble or no_room or next(iter(self._no_room.values()), ""),
        )

    async def _tell(self) -> None:
        await self._care.note(standing.NOTE, msgspec.json.encode(self.standing()))
        await asyncio.sleep(_NOTE_S)


def needs(known: views.Known) -> dict[model.Digest, int]:
    """What a manifest needs, itself included, and the sizes; 0 where it does not say."""
    sizes: dict[model.Digest, int] = dict.fromkeys(known.refers, 0)
    if known.release is not None:
        for file in (known.release.config, *known.release.files):
            if file.digest in sizes:
                sizes[file.digest] = file.size_bytes
    return {known.digest: known.size_bytes, **sizes}
