"""The repositories' logs in a bucket (safety S29): numbered objects, made by a conditional PUT, never rewritten.

    BUCKET/repositories/<name>/
    ├── _log/<10 digits>     an entry; the store decides who gets a number
    ├── _blobs/<hex>         empty: this repository may read that blob; its time is that of the last touch
    └── _pulled              empty: its time is that of the last pull

A touch is a PUT, which costs; so one server touches the same grant at most once in `_TOUCH_S`, and the collector's day
is longer than that by far. It is a conditional PUT on what was found: a grant that was withdrawn does not come back.
"""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Mapping, Sequence

from covey import errors, failpoint, model, world
from covey.registry import blobs, s3_bucket

_TOUCH_S = 1800.0
_PULLED_S = 30.0
_PENDING_S = 600.0
_REMEMBERED = 100_000


class S3Log:
    """`blobs.Logs` in one bucket."""

    def __init__(self, bucket: s3_bucket.Bucket, world: world.World) -> None:
        self._bucket = bucket
        self._world = world
        self._touched_ns: dict[str, int] = {}

    # ---- entries ---------------------------------------------------------------------------------------------------

    async def read(self, positions: Mapping[str, int]) -> dict[str, list[bytes]]:
        found = await asyncio.gather(*(self._entries(log, number) for log, number in positions.items()))
        return dict(zip(positions, found, strict=True))

    async def _entries(self, log: str, number: int) -> list[bytes]:
        """Usually there is nothing new, which one small request tells; a listing tells how much there is otherwise."""
        try:
            found = [await self._bucket.get(_entry(log, number))]
        except FileNotFoundError:
            return []
        listed = await self._bucket.below(f"repositories/{log}/_log/", after=_entry(log, number))
        rest = [item.key for item in listed if item.key.startswith(f"repositories/{log}/_log/")]
        return found + await asyncio.gather(*map(self._bucket.get, rest))

    async def append(
        self, log: str, number: int, entry: bytes, check: Callable[[], Awaitable[None]] | None = None
    ) -> bool:
        """What is checked is pending: an object that the collector reads as a reference, and sweeps after a day. One
        that took `_PENDING_S` is given up long before."""
        began_ns = self._world.boot_ns()
        aside = f"aside/entry.{self._world.token()}"
        try:
            if check is not None:
                await self._bucket.put(aside, entry)
                failpoint.reach("registry.entry.written")
                await check()
                late = self._world.boot_ns() - began_ns > _PENDING_S * 1e9
                if late or await self._bucket.find(aside) is None:
                    return False
            if not await self._bucket.create(_entry(log, number), entry):
                return False
            failpoint.reach("registry.entry.linked")
            return True
        finally:
            if check is not None:
                await self._bucket.delete([aside])

    async def names(self, folder: str) -> Sequence[str]:
        return [f"{folder}/{name}" for name in await self._bucket.folders(f"repositories/{folder}")]

    # ---- which blobs a repository may read -------------------------------------------------------------------------

    async def grant(self, repository: str, digest: model.Digest) -> None:
        await self._bucket.put(_grant(repository, digest), b"")
        failpoint.reach("registry.blob.granted")

    async def granted(self, repository: str, digests: Sequence[str]) -> frozenset[str]:
        there = await asyncio.gather(*(self._touch(_grant(repository, digest), _TOUCH_S) for digest in digests))
        return frozenset(digest for digest, found in zip(digests, there, strict=True) if found)

    async def _touch(self, key: str, again_s: float) -> bool:
        now_ns = self._world.boot_ns()
        if now_ns - self._touched_ns.get(key, -(1 << 62)) < again_s * 1e9:
            return await self._bucket.find(key) is not None
        if not await self._bucket.touch(key):
            return False
        self._remember(key, now_ns)
        return True

    def _remember(self, key: str, now_ns: int) -> None:
        if len(self._touched_ns) > _REMEMBERED:
            self._touched_ns.clear()
        self._touched_ns[key] = now_ns

    async def withdraw(self, repository: str, digest: model.Digest) -> bool:
        key = _grant(repository, digest)
        self._touched_ns.pop(key, None)
        if await self._bucket.find(key) is None:
            return False
        await self._bucket.delete([key])
        return True

    # ---- pulls -----------------------------------------------------------------------------------------------------

    async def mark_pulled(self, repository: str) -> None:
        key, now_ns = _pulled(repository), self._world.boot_ns()
        if now_ns - self._touched_ns.get(key, -(1 << 62)) >= _PULLED_S * 1e9:
            with contextlib.suppress(blobs.DiskFull, errors.Unavailable):  # a pull goes on
                await self._bucket.put(key, b"")
            self._remember(key, now_ns)

    async def pulled_s(self, repositories: Sequence[str]) -> dict[str, int]:
        found = await asyncio.gather(*(self._bucket.find(_pulled(repository)) for repository in repositories))
        return {
            repository: 0 if item is None else int(item.changed_s)
            for repository, item in zip(repositories, found, strict=True)
        }


def _entry(log: str, number: int) -> str:
    return f"repositories/{log}/_log/{number:010d}"


def _grant(repository: str, digest: str) -> str:
    return f"repositories/{repository}/_blobs/{digest.partition(':')[2]}"


def _pulled(repository: str) -> str:
    return f"repositories/{repository}/_pulled"
