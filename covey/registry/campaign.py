"""How the push role changes hands: by itself where etcd is, by an operator's word everywhere (safety S33, S34, S35).

With etcd (`Campaign`, one process of each server): as soon as the role is free, who has every accepted entry takes it.
A server that lacks some enters those that etcd still has, and is no candidate if that is not enough. The very first
time of all, all servers must be heard and the one with the most entries goes first, so that an empty one never begins
before one that has something.

Without (`Appointed`): the server that is promoted asks the holder to give the role away, copies what it lacks from it,
and takes it. A holder that cannot be asked may have entries that nobody else has: that is said, and `force` goes on.
"""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Mapping
from typing import Protocol

import msgspec

from covey import errors, failpoint, model, observe, world
from covey.registry import accepted, blobs, elected, heads, peers, role
from covey.store import base

log = observe.log("registry")

TTL_S = 10
_PAUSE_S = 1.0
_PRUNE_S = 10.0
_INVENTORY_S = 30.0
_AGAIN_S = 0.3
_SOON_S = 2.0  # whoever takes over waits for nobody much longer than that
_WANTED_S = 30
_CATCH_UP_S = 60.0


class Others(Protocol):
    """The other servers of the set, as far as the role is concerned. Every verb raises RemoteError."""

    @property
    def urls(self) -> tuple[str, ...]: ...

    async def inventory(self, url: str) -> peers.Inventory: ...

    async def tell(self, url: str, term: int, holder: str) -> None:
        """Who holds the role from now on. A holder gives it away before it answers."""
        ...

    async def copy(self, url: str, name: str, past: peers.Head | None = None) -> bool:
        """Append what our log lacks of theirs; False: it differs, or theirs does not begin with `past`."""
        ...


class Uploads(Protocol):
    """What was uploaded here in earlier reigns: `uploaded.Uploaded`."""

    async def begin(self, before: int) -> None: ...

    async def took(self, term: int) -> None: ...


class Standing(Protocol):
    """How the logs of this server stand: `heads.Heads`."""

    async def look(self) -> None: ...

    async def fold(self, log: str) -> heads.Fold: ...

    def all(self) -> dict[str, peers.Head]: ...


async def lacking(standing: Standing, told: Mapping[str, peers.Head]) -> list[str]:
    """Those logs of which somebody else has something that we have not."""
    await standing.look()
    ours = standing.all()
    differ = [name for name, head in told.items() if ours.get(name) != head]
    return [name for name in differ if not heads.covers(await standing.fold(name), told[name])]


async def inventories(others: Others, within_s: float = _INVENTORY_S) -> dict[str, peers.Inventory]:
    """Of those that answer in time."""

    async def ask(url: str) -> peers.Inventory | None:
        try:
            async with asyncio.timeout(within_s):
                return await others.inventory(url)
        except (errors.RemoteError, TimeoutError):
            return None

    answers = await asyncio.gather(*(ask(url) for url in others.urls))
    return {url: told for url, told in zip(others.urls, answers, strict=True) if told is not None}


# ---- an operator says who ------------------------------------------------------------------------------------------


class Appointing:
    """For a `role.Appointed`."""

    def __init__(
        self,
        own_url: str,
        appointed: role.Appointed,
        others: Others,
        standing: Standing,
        forget: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        """`forget`: what is to be done before this server takes the role after another one."""
        self._forget = forget
        self._own_url = own_url
        self._role = appointed
        self._others = others
        self._standing = standing

    async def run(self) -> None:
        """Until the first holder of all has begun; the rest is up to people."""
        while self._role.first == self._own_url and self._role.fresh:
            told = await inventories(self._others)
            for found in told.values():
                await self._role.heard(found.term, found.holder)
            why = await self._why_not(told)
            if not why and self._role.fresh:
                self._role.take(1)
                return
            self._role.waits_for = why
            await asyncio.sleep(_PAUSE_S)

    async def _why_not(self, told: Mapping[str, peers.Inventory]) -> str:
        unheard = [url for url in self._others.urls if url not in told]
        if unheard:
            return f"{', '.join(unheard)} must be heard before this new registry takes pushes for the first time"
        for url, found in told.items():
            if names := await lacking(self._standing, found.heads):
                return f"{url} has entries of {len(names)} repositories that this registry lacks: promote that one"
        return ""

    async def promote(self, *, force: bool) -> None:
        """Make this server the holder. Raises Refused when something would be left behind."""
        view = self._role.view()
        if view.mine:
            return
        told = await inventories(self._others)
        newest = max([(view.term, view.holder), *((found.term, found.holder) for found in told.values())])
        term = max(newest[0], 1) + 1  # the first term is that of REGISTRY_PUSH, whether it was heard of or not
        # Whom the others believe in, and whom we followed: if it was promised to us before, they are not the same.
        for holder in sorted({newest[1], view.holder} - {"", self._own_url}):
            await self._take_from(holder, term, force=force, disputed=bool(view.why_not))
        if force:
            await self._learn_from_followers(told, newest)
        if self._forget is not None:
            await self._forget()
        self._role.take(term)
        for url in self._others.urls:
            with contextlib.suppress(errors.RemoteError):
                await self._others.tell(url, term, self._own_url)

    async def _take_from(self, holder: str, term: int, *, force: bool, disputed: bool) -> None:
        try:
            await self._others.tell(holder, term, self._own_url)
            if not disputed:
                await self._catch_up(holder)
        except (errors.RemoteError, TimeoutError, errors.Refused) as error:
            if not force:
                raise errors.Refused(
                    f"the registry {holder}, which takes pushes, cannot hand over all it has ({error}):"
                    " what it alone has would be set aside; start it, or use --force"
                ) from error
            log.warning("promoted by force", holder=holder, error=str(error))

    async def _learn_from_followers(self, told: Mapping[str, peers.Inventory], newest: tuple[int, str]) -> None:
        """The holder may not answer, but somebody who has followed it further than we have: what was answered under
        REGISTRY_PUSH_COPIES=2 is there."""
        for url, found in told.items():
            if (found.term, found.holder) == newest and url != found.holder:
                for name in await lacking(self._standing, found.heads):
                    with contextlib.suppress(errors.RemoteError):
                        await self._others.copy(url, name)

    async def _catch_up(self, holder: str) -> None:
        async with asyncio.timeout(_CATCH_UP_S):
            told = await self._others.inventory(holder)
            for name in await lacking(self._standing, told.heads):
                if not await self._others.copy(holder, name):
                    raise errors.Refused(f"repository {name} differs from that of {holder}")


# ---- etcd says who -------------------------------------------------------------------------------------------------


class Wanted(model.Noun, frozen=True, kw_only=True):
    """Who is to hold the role next; `force`: even without every accepted entry."""

    holder: str
    force: bool = False


class Campaign:
    """For an `elected.Elected`, in one process of its server: start → (takes the role, keeps it) → stop."""

    def __init__(
        self,
        own_url: str,
        elected: elected.Elected,
        store: base.Store,
        logs: blobs.Logs,
        others: Others,
        standing: Standing,
        world: world.World,
        *,
        campaigns: bool = True,
        ttl_s: int = TTL_S,
        bounds: accepted.Bounds | None = None,
        uploads: Uploads | None = None,
    ) -> None:
        self._own_url = own_url
        self._role = elected
        self._store = store
        self._accepted = accepted.Accepted(store, logs, standing, bounds)
        self._others = others
        self._standing = standing
        self._world = world
        self._ttl_s = ttl_s
        self._said = ""
        self._recorded = False  # etcd knows all logs as they were here when this reign began
        self._uploads = uploads
        elected.keeps = campaigns

    async def run(self) -> None:
        while True:
            try:
                await self._turn()
            except (errors.CoveyError, OSError) as error:
                self._say(f"the push role cannot be looked after now: {error}")
                await asyncio.sleep(_PAUSE_S)
            except Exception:
                log.exception("looking after the push role failed unexpectedly; it goes on")
                await asyncio.sleep(10 * _PAUSE_S)

    async def _turn(self) -> None:
        """Take the role if it is free, and keep it to its end; else wait for a change."""
        self._role.moved.clear()
        keys = (elected.ROLE_KEY, elected.TERM_KEY, elected.WANTED_KEY, elected.FORMAT_KEY)
        found = await self._store.commit(base.Txn((), tuple(base.Get(key) for key in keys)))
        holds, term, wanted, made = found.got
        _check_format(made)
        if holds is not None and msgspec.json.decode(holds.value, type=elected.Reign).holder == self._own_url:
            # Ours, from before this process was started: nobody keeps it any more.
            gone = base.Txn(
                (base.same_life(elected.ROLE_KEY, holds.create_revision),), (base.Delete(elected.ROLE_KEY),)
            )
            await self._store.commit(gone)
            return
        self._role.learn(holds)
        wish = None if wanted is None else msgspec.json.decode(wanted.value, type=Wanted)
        others_turn = wish is not None and wish.holder != self._own_url
        forced = wish is not None and wish.force and not others_turn
        if holds is None and not others_turn and await self._may(term, forced=forced):
            await self._reign(term, made, forced=forced)
            return
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_PAUSE_S):
                await self._role.moved.wait()

    async def _may(self, term: base.Kv | None, *, forced: bool) -> bool:
        """Whether this server has all that was accepted, or somebody said that it need not."""
        await self._complete()
        if forced:
            return True
        if term is None and (why := await self._why_not_first()):
            return self._say(why)
        return await self._has_all()

    async def _has_all(self) -> bool:
        """Whether every log is here as it was accepted, and as far as others have it that etcd does not know of."""
        stands = await self._accepted.stands()
        await self._learn_more(stands)
        folds = {name: await self._standing.fold(name) for name in stands}
        lacks = [name for name, stand in stands.items() if not accepted.contains(folds[name], stand)]
        if lacks:
            others = [name for name in lacks if folds[name].count >= stands[name].count]
            instead = f" ({len(others)} with others in their place, which were given up by force)" if others else ""
            return self._say(
                f"this registry lacks accepted entries of {len(lacks)} repositories{instead} and so does not take the"
                " push role: start one that has them, or `covey registry promote URL --force`"
            )
        return True

    async def _learn_more(self, stands: Mapping[str, accepted.Stand]) -> None:
        """An etcd that was restored from a backup knows less than the registries: what another one has beyond etcd's
        heads was accepted too, and is copied first. What contradicts our log, or etcd, was given up by force."""
        told = await inventories(self._others, _SOON_S)
        if len(told) < len(self._others.urls):  # one that has stood still breaks off what was asked meanwhile
            await asyncio.sleep(_AGAIN_S)
            told |= await inventories(self._others, _SOON_S)
        known = {name: stands.get(name, accepted.Stand()) for found in told.values() for name in found.heads}
        for url, found in told.items():
            beyond = {name: head for name, head in found.heads.items() if head.count > known[name].count}
            for name in await lacking(self._standing, beyond):
                with contextlib.suppress(errors.RemoteError):
                    if not await self._others.copy(url, name, known[name].head):
                        log.warning("another registry has other entries; they do not count", log=name, registry=url)

    async def _complete(self) -> None:
        """Enter the accepted entries that this server lacks (safety S34)."""
        await self._accepted.complete()

    async def _why_not_first(self) -> str:
        told = await inventories(self._others)
        unheard = [url for url in self._others.urls if url not in told]
        if unheard:
            return f"{', '.join(unheard)} must be heard before any registry takes pushes for the first time"
        for url, found in told.items():
            if await lacking(self._standing, found.heads):
                return f"{url} has entries that this registry lacks: that one takes pushes first"
            ours = self._standing.all()
            if ours == found.heads and url < self._own_url:
                return f"{url} takes pushes first"
        return ""

    async def _reign(self, term: base.Kv | None, made: base.Kv | None, *, forced: bool) -> None:
        lease = await self._store.grant(self._ttl_s)
        keeping = asyncio.create_task(lease.keep_alive())
        known = 0 if term is None else int(term.value)
        mine = elected.Reign(holder=self._own_url, term=max(known, self._role.floor) + 1, id=self._world.token())
        try:
            if self._uploads is not None:
                await self._uploads.begin(known)
            if await self._take(mine, lease, term, made):
                self._said = ""
                if self._uploads is not None:
                    await self._uploads.took(mine.term)
                log.warning("this registry takes pushes now", term=mine.term, forced=forced)
                if forced:
                    await self._accepted.give_up(self._role.view().key)
                self._recorded = False
                await self._record()
                await self._hold(mine, lease)
        finally:
            self._role.lost = True
            keeping.cancel()
            await asyncio.gather(keeping, return_exceptions=True)
            with contextlib.suppress(errors.StoreError):
                await lease.revoke()

    async def _take(self, mine: elected.Reign, lease: base.Lease, term: base.Kv | None, made: base.Kv | None) -> bool:
        put = [
            base.Put(elected.ROLE_KEY, msgspec.json.encode(mine), lease.id),
            base.Put(elected.TERM_KEY, str(mine.term).encode()),
        ]
        if made is None:
            put.append(base.Put(elected.FORMAT_KEY, elected.FORMAT))
        txn = base.Txn(
            (
                base.absent(elected.ROLE_KEY),
                base.unchanged(elected.TERM_KEY, 0 if term is None else term.mod_revision),
                base.unchanged(elected.FORMAT_KEY, 0 if made is None else made.mod_revision),
            ),
            tuple(put),
        )
        failpoint.reach("registry.role.taking")
        with contextlib.suppress(errors.Unsure):  # what is there now says it
            await self._store.commit(txn)
        page = await self._store.range(elected.ROLE_KEY)
        found = page.kvs[0] if page.kvs else None
        ours = found is not None and msgspec.json.decode(found.value, type=elected.Reign) == mine
        self._role.lost = lease.lost or not ours
        self._role.learn(found)
        failpoint.reach("registry.role.taken")
        return ours

    async def _record(self) -> None:
        if not self._recorded:
            with contextlib.suppress(errors.CoveyError, OSError):
                self._recorded = await self._accepted.record(self._role.view().key)

    async def _hold(self, mine: elected.Reign, lease: base.Lease) -> None:
        """Until the lease is lost, or the role is somebody else's, or a higher term was heard of."""
        pruned_ns = self._world.boot_ns()
        while True:
            self._role.moved.clear()
            self._role.lost = lease.lost
            view = self._role.view()
            if lease.lost or not view.mine or view.term != mine.term:
                log.warning("this registry takes no more pushes", term=mine.term)
                return
            if self._role.floor > mine.term:
                log.warning("a higher term was heard of", term=self._role.floor)
                return
            if self._world.boot_ns() - pruned_ns > _PRUNE_S * 1e9:
                pruned_ns = self._world.boot_ns()
                with contextlib.suppress(errors.CoveyError, OSError):
                    await self.prune()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(0.25):
                    await self._role.moved.wait()

    async def prune(self) -> None:
        """Accepted entries that every server of the set has need not be kept in etcd, and others not for ever."""
        view = self._role.view()
        if view.mine:
            await self._complete()
            await self._record()
            await self._accepted.prune(await inventories(self._others), self._others.urls, view.key)

    @property
    def kept(self) -> accepted.Kept:
        """What etcd keeps for servers that lack it, as far as the holder knows."""
        return self._accepted.kept if self._role.view().mine else accepted.Kept()

    async def _end(self, key: int) -> None:
        """End a reign: whoever holds the role accepts nothing from here on."""
        await self._store.commit(base.Txn((base.same_life(elected.ROLE_KEY, key),), (base.Delete(elected.ROLE_KEY),)))

    async def promote(self, *, force: bool) -> None:
        """Make this server the holder, whichever process of it is asked. Raises Refused when it does not become it."""
        view = self._role.view()
        if view.mine:
            return
        await self._complete()
        if not force and not await self._has_all():
            raise errors.Refused(self._said)
        lease = await self._store.grant(_WANTED_S)
        wanted = Wanted(holder=self._own_url, force=force)
        try:
            await self._store.commit(
                base.Txn((), (base.Put(elected.WANTED_KEY, msgspec.json.encode(wanted), lease.id),))
            )
            if view.key:
                await self._end(view.key)
            async with asyncio.timeout(_WANTED_S):
                while not self._role.view().mine:
                    await asyncio.sleep(0.05)
        except TimeoutError as error:
            why = self._said or "see its log"
            raise errors.Refused(f"{self._own_url} did not take the push role in time: {why}") from error
        finally:
            with contextlib.suppress(errors.StoreError):
                await lease.revoke()

    def _say(self, why: str) -> bool:
        if why != self._said:
            log.warning("the push role is not taken", why=why)
        self._said = why
        return False


def _check_format(made: base.Kv | None) -> None:
    if made is not None and made.value != elected.FORMAT:
        text = f"etcd's keys below {elected.PREFIX} have format {made.value.decode()}: a newer Covey made them"
        raise errors.Rejected(text)
