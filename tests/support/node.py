"""One server of a set of replicas without HTTP: the real parts, put together as `covey.registry.replica` does.

holder, follower = node.pair(tmp_path)
await holder.push("a", "v1", b"layer")
await follower.follower.follow_once()
while await follower.follower.fetch_once(): …
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from covey import world
from covey.client import oci
from covey.registry import (
    blobs,
    catalog,
    copying,
    disk,
    disk_care,
    feed,
    fetching,
    follower,
    heads,
    journal,
    replica_disk,
    role,
    views,
)
from tests.support import near_peer, registry


@dataclasses.dataclass
class Who:
    """What one server believes of the push role."""

    own_url: str
    term: int
    holder: str
    why_not: str = ""

    @property
    def mine(self) -> bool:
        return self.holder == self.own_url

    async def heard(self, term: int, holder: str) -> None:
        if term > self.term:
            self.term, self.holder = term, holder


class Holding:
    """`role.Role` by `Who`."""

    def __init__(self, who: Who) -> None:
        self._who = who

    def view(self) -> role.View:
        return role.View(term=self._who.term, holder=self._who.holder, mine=self._who.mine)

    async def certain(self) -> bool:
        return self._who.mine

    async def accept(self, view: role.View, log: str, number: int, entry: bytes) -> None:
        self._check(view)

    async def settle(self, view: role.View, log: str, number: int, *, entered: bool) -> None:
        self._check(view)

    def _check(self, view: role.View) -> None:
        if not self._who.mine or view.term != self._who.term:
            raise role.not_holder(self.view(), self._who.own_url)

    async def heard(self, term: int, holder: str) -> None:
        await self._who.heard(term, holder)


@dataclasses.dataclass(frozen=True)
class Parts:
    """What servers are made of: the real thing, or something that a test plants."""

    content: type[disk.Disk] = disk.Disk
    logs: type[journal.Journal] = journal.Journal
    care: type[disk_care.DiskCare] = disk_care.DiskCare
    held: type[replica_disk.ReplicaDisk] = replica_disk.ReplicaDisk
    copies: type[copying.Copying] = copying.Copying
    fetches: type[fetching.Fetching] = fetching.Fetching


class Node:
    """One life of a server. `others` are filled in by whoever makes a set of them."""

    def __init__(self, base: Path, who: Who, world: world.World, parts: Parts = Parts()) -> None:
        self.base, self.who = base, who
        self.content = parts.content(base, world, fsync=False)
        self.held = parts.held(base, self.content, world, fsync=False)
        self.logs = parts.logs(base, world, fsync=False, on_entry=self.held.hint)
        self.care = parts.care(base, world, fsync=False)
        self.catalog = catalog.Catalog(self.content, self.logs, world, role=Holding(who), eras=self.held.eras)
        self.heads = heads.Heads(self.logs, self.care, self.held, world)
        self.feed = feed.Feed(self.logs, self.heads, lambda: (who.term, who.holder))
        self.others: dict[str, near_peer.Near] = {}
        self.copying = parts.copies(self.logs, self.heads, self.held)
        self.fetching = parts.fetches(self.content, self.held, self.others, lambda: who.holder)
        self.follower = follower.Follower(
            who.own_url,
            self.others,
            lambda: who,
            who.heard,
            self.catalog,
            self.heads,
            self.copying,
            self.fetching,
            self.held,
            self.care,
            self.care,
            world,
            wait_s=0.0,
        )

    @property
    def url(self) -> str:
        return self.who.own_url

    def meet(self, other: "Node") -> near_peer.Near:
        """Let this one reach the other."""
        self.others[other.url] = near_peer.Near(other.url, other.feed, other.content)
        return self.others[other.url]

    async def push(self, repository: str, tag: str, *layers: bytes, manifest: bytes = b"") -> str:
        """An image, or a manifest whose blobs are these: its digest."""
        config = b"{}" if not manifest else registry.template_config()
        for content in (config, *layers):
            await self.logs.grant(repository, (await self.content.put(content)).digest)
        content = manifest or registry.image_manifest(config, *layers)
        known, _ = await self.catalog.push(repository, tag, content, oci.OCI_MANIFEST, force=True)
        return known.digest

    async def catch_up(self) -> None:
        """Follow and fetch until nothing is to be done now."""
        await self.follower.follow_once()
        while await self.follower.fetch_once():
            pass

    async def log(self, name: str) -> list[bytes]:
        return (await self.logs.read({name: 0}))[name]

    async def shelf(self) -> set[str]:
        return {held.digest async for held in self.care.held(blobs.Place.SHELF)}

    async def repository(self, name: str) -> views.Repository:
        return await self.catalog.repository(name)

    async def close(self) -> None:
        await self.fetching.close()
        for part in (self.content, self.held, self.logs, self.care):
            part.close()


def urls(count: int) -> Sequence[str]:
    return [f"http://server-{number}" for number in range(count)]


def several(folder: Path, count: int, parts: Parts = Parts(), clock: world.World | None = None) -> list[Node]:
    """A set whose servers all reach each other; the first one takes pushes."""
    found = []
    for url in urls(count):
        base = folder / url.rpartition("/")[2]
        base.mkdir()
        found.append(Node(base, Who(url, 1, urls(count)[0]), clock or world.System(), parts))
    for one in found:
        for other in found:
            if one is not other:
                one.meet(other)
    return found
