"""Care of a storage in a bucket: `blobs.Care` and `blobs.LogCare` by the verbs that S3 has.

There is no rename: a blob moves by a copy and a delete. So what lies in the trash or in quarantine has a key of its own
for each time it came there (``trash/<algorithm>-<hex>/<token>``), and whoever takes a blob back copies it and leaves
the key alone: nobody deletes the only copy because somebody else was just moving it. The one step that takes bytes away
for good is `destroy`, which begins long after the move. Copies and deletes of one key are atomic in the store, so of a
`destroy` and a request that takes the blob back, one is first and the other sees it.

The store's clock is what it writes on an object that was made just now; it counts whole seconds.
"""

import asyncio
import itertools
from collections.abc import AsyncIterator, Mapping, Sequence

from covey import failpoint, model, world
from covey.client import oci
from covey.registry import blobs, s3, s3_bucket

_CLOCK = "notes/clock"


class S3Care:
    """Upkeep of one bucket."""

    def __init__(self, bucket: s3_bucket.Bucket, world: world.World) -> None:
        self._bucket = bucket
        self._world = world

    async def clock_s(self) -> float:
        await self._bucket.put(_CLOCK, b"")
        found = await self._bucket.find(_CLOCK)
        return 0.0 if found is None else found.changed_s

    # ---- blobs -----------------------------------------------------------------------------------------------------

    async def held(self, place: blobs.Place) -> AsyncIterator[blobs.Held]:
        for item in await self._bucket.below(place):
            digest = _digest(item.key)
            if oci.valid_digest(digest):
                mark = "" if place is blobs.Place.SHELF else item.key.rpartition("/")[2]
                yield blobs.Held(digest=digest, size_bytes=item.size_bytes, since_s=item.changed_s, mark=mark)

    async def move(self, digest: model.Digest, source: blobs.Place, target: blobs.Place) -> bool:
        old = await self._keys(digest, source)
        new = s3.key(digest) if target is blobs.Place.SHELF else f"{s3.folder(digest, target)}{self._world.token()}"
        for key in old:
            try:
                found = await self._bucket.find(key)
                if found is None:
                    continue
                await self._bucket.copy(key, new, found.size_bytes)
            except FileNotFoundError:  # somebody else was first
                continue
            failpoint.reach("registry.care.moved")
            await self._bucket.delete(old)
            return True
        return False

    async def destroy(self, held: blobs.Held, place: blobs.Place) -> int:
        """What lies on the shelf as well is not gone, and counts nothing."""
        assert place is not blobs.Place.SHELF  # noqa: S101  nothing is ever deleted from there
        key = f"{s3.folder(held.digest, place)}{held.mark}"
        found = await self._bucket.find(key)
        await self._bucket.delete([key])
        failpoint.reach("registry.care.destroyed")
        kept = found is None or await self._bucket.find(s3.key(held.digest)) is not None
        return 0 if kept else held.size_bytes

    async def read(
        self, digest: model.Digest, place: blobs.Place = blobs.Place.SHELF, *, past_cache: bool = False
    ) -> AsyncIterator[bytes]:
        """S3 says nothing of caches: every read is one by another server."""
        for key in await self._keys(digest, place):
            found = await self._bucket.find(key)
            if found is not None:
                async for piece in self._bucket.read(key, 0, found.size_bytes):
                    yield piece
                return
        raise FileNotFoundError(f"{digest} is not in {place}")

    async def _keys(self, digest: model.Digest, place: blobs.Place) -> list[str]:
        """Where a blob lies in one place."""
        if place is blobs.Place.SHELF:
            return [s3.key(digest)]
        return [item.key for item in await self._bucket.below(s3.folder(digest, place))]

    # ---- what unfinished work left ---------------------------------------------------------------------------------

    async def expire(self, before_s: float, *, dry_run: bool = False) -> Sequence[blobs.Leftover]:
        """Parts of multipart uploads whose server died are not objects: the bucket's life-cycle rule collects them."""
        found = [*await self._bucket.below("uploads/"), *await self._bucket.below("aside/")]
        expired = []
        for name, group in itertools.groupby(found, key=lambda item: item.key.split("/")[1]):
            items = list(group)
            size, since_s = sum(item.size_bytes for item in items), max(item.changed_s for item in items)
            if since_s < before_s:
                expired.append(blobs.Leftover(name=name, size_bytes=size, since_s=since_s))
                if not dry_run:
                    await self._remove([item.key for item in items])
        return expired

    async def _remove(self, keys: list[str]) -> None:
        """Without `begun` it is no session any more; then the rest goes."""
        await self._bucket.delete([key for key in keys if key.endswith("/begun")])
        failpoint.reach("registry.care.expired")
        await self._bucket.delete([key for key in keys if not key.endswith("/begun")])

    # ---- notes -----------------------------------------------------------------------------------------------------

    async def note(self, name: str, content: bytes) -> None:
        await self._bucket.put(f"notes/{name}", content)

    async def notes(self, prefix: str) -> Mapping[str, blobs.Note]:
        found = {}
        for item in await self._bucket.below("notes/"):
            name = item.key.partition("/")[2]
            if name.startswith(prefix) and item.key != _CLOCK:
                found[name] = blobs.Note(content=await self._bucket.get(item.key), at_s=item.changed_s)
        return found

    # ---- logs ------------------------------------------------------------------------------------------------------

    async def logs(self) -> Sequence[str]:
        names = set()
        for item in await self._bucket.below("repositories/"):
            name, _, last = item.key.removeprefix("repositories/").rpartition("/")
            if last != "_pulled":
                names.add(name.rpartition("/")[0])
        return sorted(names)

    async def numbers(self, log: str) -> Sequence[int]:
        below = f"repositories/{log}/_log/"
        names = [item.key.removeprefix(below) for item in await self._bucket.below(below)]
        return [int(name) for name in names if name.isdigit()]

    async def pending(self) -> Sequence[bytes]:
        found = await asyncio.gather(*(self._content(item.key) for item in await self._bucket.below("aside/")))
        return [content for content in found if content]

    async def _content(self, key: str) -> bytes:
        try:
            return await self._bucket.get(key)
        except FileNotFoundError:  # it has got its number meanwhile
            return b""

    async def grants(self, repository: str) -> Mapping[model.Digest, float]:
        return {
            _digest(item.key): item.changed_s for item in await self._bucket.below(f"repositories/{repository}/_blobs/")
        }


_LENGTHS = {64: "sha256", 128: "sha512"}


def _digest(key: str) -> model.Digest:
    """The digest that a key names: by its last part, or by the folder of a place beside the shelf."""
    parts = key.split("/")
    if parts[0] in (blobs.Place.TRASH, blobs.Place.QUARANTINE):
        return model.Digest(parts[1].replace("-", ":", 1))
    return model.Digest(f"{_LENGTHS.get(len(parts[-1]), '')}:{parts[-1]}")
