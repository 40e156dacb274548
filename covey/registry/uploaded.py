"""What was uploaded to a server and is named by no manifest belongs to the reign in which that happened (safety S35).

Such a blob is known to the holder of the push role alone: a repository's right to read it is no entry of a log, and so
is its end (`DELETE /v2/<name>/blobs/<digest>`). Therefore servers that are not the holder answer from their logs, and
one that becomes the holder after another one begins without what it knew of uploads from before: it cannot know what
was deleted meanwhile. Whoever was in the middle of a push uploads again, as after any change of hands. One that takes
the role after itself (it was started again, etcd was away) goes on with all of it.
"""

from pathlib import Path

from covey import durable
from covey.registry import blobs, catalog

_LAST = "reigned"  # a file: the last term in which this server held the role, where etcd gives it


class Uploaded:
    """Of one server's storage."""

    def __init__(self, base: Path, known: catalog.Catalog, care: blobs.LogCare, *, fsync: bool = True) -> None:
        self._last = base / "role" / _LAST
        self._known = known
        self._care = care
        self._fsync = fsync
        durable.make_dirs(self._last.parent, fsync=fsync)

    async def begin(self, before: int) -> None:
        """Right before this server takes the role, if it can; `before`: the newest term that there was."""
        if self._read() != before:
            await self.forget()

    async def took(self, term: int) -> None:
        """It has the role, in this term."""
        durable.replace(self._last, str(term).encode(), fsync=self._fsync)

    def _read(self) -> int:
        try:
            return int(self._last.read_bytes())
        except (FileNotFoundError, ValueError):
            return 0

    async def forget(self) -> None:
        """No repository may read any more what none of its manifests needs."""
        for name in await self._care.logs():
            granted = set() if name.startswith("_") else set(await self._care.grants(name))
            if granted:
                manifests = (await self._known.repository(name)).manifests.values()
                for digest in granted - {digest for known in manifests for digest in known.refers}:
                    await self._known.logs.withdraw(name, digest)
