"""Bugs that the histories must find: each takes away one of the things that the argument rests on."""

from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path

from covey import durable, failpoint, model
from covey.decide import garbage
from covey.registry import blobs, sweep
from tests.histories import play


class ReadsOnce(sweep.Collector):
    """What is needed is read once per run, and not again after blobs were moved."""

    _seen: sweep.Needed | None = None

    async def needed(self) -> sweep.Needed:
        if self._seen is None:
            self._seen = await super().needed()
        return self._seen


class SeesNoPushes(play.SteppedCare):
    """Pending entries are not read."""

    async def pending(self) -> list[bytes]:
        return []


class LooksOnce(play.SteppedJournal):
    """A push does not look for its blobs again while its entry is pending."""

    async def append(
        self, log: str, number: int, entry: bytes, check: Callable[[], Awaitable[None]] | None = None
    ) -> bool:
        return await super().append(log, number, entry)


class TakesNumbers(play.SteppedJournal):
    """An entry gets its number by rename: who is second wins."""

    def _enter(self, log: str, number: int, aside: Path, entry: bytes) -> bool:
        aside.rename(self._repositories / log / "_log" / f"{number:010d}")
        failpoint.reach("registry.entry.linked")
        return True


class DeletesWhateverIsThere(play.SteppedCare):
    """What another collector brought to the trash meanwhile is deleted too."""

    async def destroy(self, held: blobs.Held, place: blobs.Place) -> int:
        now = [one async for one in self.held(place) if one.digest == held.digest]
        return sum([await super(DeletesWhateverIsThere, self).destroy(one, place) for one in now])


class GivesNothingBack(play.SteppedDisk):
    """Who asks for a blob in the trash is told that it is not there."""

    def _take_back(self, digest: model.Digest) -> bool:
        return False


class ForgetsToTouch(play.SteppedJournal):
    """Asking for a blob does not touch it."""

    def _touch(self, repository: str, digest: str) -> bool:
        return self._grant_path(repository, digest).exists()


class KeepsRemains(play.SteppedCare):
    """What dead servers left is never removed."""

    def _expire(self, before_s: float, *, dry_run: bool) -> list[blobs.Leftover]:
        return []


class KeepsRights(sweep.Collector):
    """Rights to read what is gone stay."""

    async def _grants(
        self, needed: sweep.Needed, now_s: float, *, dry_run: bool
    ) -> tuple[Mapping[model.Digest, float], int]:
        return await super()._grants(needed, now_s, dry_run=True)


class WritesInPlace(play.SteppedDisk):
    """A blob is written under its name, not linked when it is whole."""

    def _publish(self, source: Path, digest: model.Digest, size_bytes: int) -> blobs.Blob:
        path = self._path(digest)
        durable.make_dirs(path.parent, fsync=False)
        content = source.read_bytes()
        with path.open("wb") as stream:
            stream.write(content[: len(content) // 2])
            stream.flush()
            failpoint.reach("registry.blob.half")
            stream.write(content[len(content) // 2 :])
        return blobs.Blob(digest=digest, size_bytes=size_bytes, path=path)


BUGS = {
    "reads-once": play.Bugs(collector=ReadsOnce),
    "sees-no-pushes": play.Bugs(care=SeesNoPushes),
    "looks-once": play.Bugs(journal=LooksOnce),
    "deletes-whatever": play.Bugs(care=DeletesWhateverIsThere),
    "takes-numbers": play.Bugs(journal=TakesNumbers),
    "gives-nothing-back": play.Bugs(disk=GivesNothingBack),
    "forgets-to-touch": play.Bugs(journal=ForgetsToTouch),
    "ignores-the-grace": play.Bugs(periods=garbage.Periods(grace_s=-1.0, trash_s=-1.0)),
    "keeps-remains": play.Bugs(care=KeepsRemains),
    "keeps-rights": play.Bugs(collector=KeepsRights),
    "writes-in-place": play.Bugs(disk=WritesInPlace),
}

# Within some tens of histories. The others want hundreds, by `--planted`; tests/registry/test_garbage.py and
# tests/contract/test_blobs.py look for each of those directly.
FOUND_SOON = (
    "reads-once",
    "looks-once",
    "takes-numbers",
    "ignores-the-grace",
    "keeps-remains",
    "keeps-rights",
    "writes-in-place",
)
