"""One log is brought to how a peer has it: entries are copied in order, byte for byte.

While this log is a beginning of the peer's, what it lacks is appended; any number of processes may do so at once, since
the number decides and the bytes are the same. Where it is not, this server has entries that the holder does not have:
it held the push role once, and what it entered last was never accepted. They are *set aside* (safety S33, S35): taken
out of the log in one step, kept, shown, and what they refer to is not collected.
"""

import asyncio
from collections.abc import Callable

from covey import errors, observe
from covey.registry import blobs, heads, peers, replica_disk

log = observe.log("replica")


class Copying:
    """Of the logs of one storage."""

    def __init__(self, logs: blobs.Logs, heads: heads.Heads, held: replica_disk.ReplicaDisk) -> None:
        self._logs = logs
        self._heads = heads
        self._held = held
        self._anew = asyncio.Lock()

    async def copy(self, peer: peers.Peer, name: str, *, certain: bool = False, past: peers.Head | None = None) -> bool:
        """Append what this log lacks; False: it is no beginning of the peer's log, and nothing was done. `certain`:
        only from the server that holds the push role; `past`: only if the peer's log begins with that. Raises
        RemoteError."""
        if past is not None and not await _begins(peer, name, past):
            return False
        while True:
            own = (await self._heads.fold(name)).head
            part = await peer.entries(name, own.count, certain=certain)
            if part.count < own.count or part.before != own.chain:
                return False
            for number, entry in enumerate(part.entries, own.count):
                if not await self._logs.append(name, number, entry):
                    break  # another process has made it anew meanwhile: look again
            else:
                if own.count + len(part.entries) >= part.count:
                    return True

    async def replace(self, peer: peers.Peer, name: str, still: Callable[[], bool]) -> int:
        """Take the peer's log in place of ours, from where they differ on; how many entries were set aside. `still`
        says, right before, whether that peer is the one whose word counts. Raises RemoteError."""
        async with self._anew:
            theirs = await _whole(peer, name)
            ours = (await self._logs.read({name: 0}))[name]
            common = next(
                (place for place, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b),
                min(len(ours), len(theirs)),
            )
            if common == len(ours) or not still():
                return 0
            await self._held.set_aside(name, common, theirs[common:])
        count = len(ours) - common
        log.error("entries that the push registry does not have were set aside", log=name, entries=count, first=common)
        return count


async def _begins(peer: peers.Peer, name: str, head: peers.Head) -> bool:
    """Whether a peer's log begins with what a head stands for."""
    part = await peer.entries(name, head.count)
    return part.count >= head.count and part.before == head.chain


async def _whole(peer: peers.Peer, name: str) -> list[bytes]:
    """All entries of a peer's log. Raises RemoteError when it changes under our eyes."""
    found: list[bytes] = []
    fold = heads.Fold(0)
    while True:
        part = await peer.entries(name, len(found))
        if part.before != fold.chain(len(found)):
            raise errors.RemoteError(f"{peer.url}: log {name} changes while it is read")
        found += part.entries
        fold.add(part.entries)
        if len(found) >= part.count:
            return found
