"""One server of a set of registries with disks of their own, put together: what it tells its peers, how it follows, and
what it does for requests that meet with something which is not here yet.

Everything but following is done by each process of a server; following by the first one.
"""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

from covey import serve, world
from covey.registry import (
    catalog,
    copying,
    feed,
    feed_api,
    fetching,
    follower,
    heads,
    on_demand,
    peers,
    replica_disk,
    standing,
    storage,
)

_LOOK_S = 1.0


class Replica:
    """start → (works by itself) → stop."""

    def __init__(
        self,
        own_url: str,
        urls: Sequence[str],
        secret: str,
        view: follower.View,
        heard: Callable[[int, str], Awaitable[None]],
        known: catalog.Catalog,
        store: storage.Storage,
        held: replica_disk.ReplicaDisk,
        world: world.World,
        *,
        follows: bool,
        ca_cert: Path | None = None,
    ) -> None:
        self._view = view
        self._care = store.care
        self._peers = peers.Peers(urls, secret, ca_cert=ca_cert)
        others = self._peers.all
        self.heads = heads.Heads(store.logs, store.log_care, held, world)
        self.others = others
        self.copying = copies = copying.Copying(store.logs, self.heads, held)
        self.fetching = fetching.Fetching(store.content, held, others, lambda: view().holder)
        self.on_demand = on_demand.OnDemand(known, copies, self.fetching, others, view, lambda: self._current(), world)
        known.fetch = self.on_demand.manifest
        told = feed.Feed(store.logs, self.heads, lambda: (view().term, view().holder))
        self.api = feed_api.FeedApi(told, store.content, secret, known.role.certain)
        self.follower: follower.Follower | None = None
        if follows:
            self.follower = follower.Follower(
                own_url,
                others,
                view,
                heard,
                known,
                self.heads,
                copies,
                self.fetching,
                held,
                store.care,
                store.log_care,
                world,
            )
        self.standing: standing.Standing | None = None
        self._looking: asyncio.Task[None] | None = None

    async def start(self) -> None:
        if self.follower is not None:
            await self.follower.start()
        self._looking = asyncio.create_task(self._look())

    async def stop(self) -> None:
        if self._looking is not None:
            self._looking.cancel()
            await asyncio.gather(self._looking, return_exceptions=True)
        if self.follower is not None:
            await self.follower.stop()
        await self.fetching.close()
        await self._peers.close()

    def routes(self, routes: Sequence[serve.Route]) -> list[serve.Route]:
        """All routes of a registry that has peers."""
        return [*self.on_demand.routes(routes), *self.api.routes()]

    def _current(self) -> bool:
        return self.standing is not None and self.standing.reached

    async def _look(self) -> None:
        """What the process that follows has told of late."""
        while True:
            with contextlib.suppress(OSError):
                self.standing = await standing.read(self._care)
            await asyncio.sleep(_LOOK_S)
