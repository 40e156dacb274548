"""The collector: takes away what nothing needs, whatever else goes on (safety S32, decision 0016).

    1  uploads and files in which nothing moves expire; versions that were taken back are forgotten
    2  what is needed?        → the shelf: what is not goes to the trash
    3  what is needed now?    → the trash: it goes back, or is deleted when its time is up
    4                           quarantine: what was stored again, or is not needed, is deleted

It takes no lock, and any number of collectors may run beside any number of pushes, on several servers. Why no push can
lose a blob to it:

* A push makes its entry pending *before* it looks for its blobs, and links that very file to its number afterwards.
* The collector reads what is needed, the pending entries first and then the logs, *after* it moved a blob away.
* So either the push looked before the move: then its entry was pending before it too, and the collector sees it there
  or in the log, and puts the blob back. Or it looked after the move: then its look took the blob back from the trash.
* A blob is deleted by its name in the trash, and taken back by a link from that name: one of the two is first. The name
  is new each time a blob comes there, and a collector deletes only what was there before it read what is needed: what
  another collector moved since then is that one's to judge.
* A pending entry that is swept away for its age can get no number any more.

A collector that dies leaves a blob on the shelf, in the trash or in both; the next run rules on it again, and a request
that needs it takes it back before that.
"""

import collections
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence

import msgspec

from covey import durable, model, observe
from covey.decide import garbage
from covey.registry import blobs, catalog, views

log = observe.log("collector")

NOTE = "gc"  # written when a run begins and when it ends, read by all servers
_PAGE = 200  # repositories read at once
Aside = Callable[[], Awaitable[Mapping[str, Sequence[bytes]]]]
Place, Fate = blobs.Place, garbage.Fate


class Report(model.Noun, frozen=True, kw_only=True):
    """What one run did, or would do. `rulings` are of blobs that do not simply stay where they are needed."""

    ended_s: float = 0.0
    kept: dict[str, int] = {}  # why → how many blobs
    kept_bytes: int = 0
    rulings: tuple[garbage.Ruling, ...] = ()
    leftovers: tuple[blobs.Leftover, ...] = ()
    forgotten: tuple[str, ...] = ()  # manifests of template versions that no tag names any more
    grants: int = 0  # rights to read that nobody used any more

    def bytes_of(self, fate: garbage.Fate) -> int:
        return sum(ruling.size_bytes for ruling in self.rulings if ruling.fate is fate)

    @property
    def freed_bytes(self) -> int:
        return self.bytes_of(Fate.DELETE) + sum(leftover.size_bytes for leftover in self.leftovers)


class Summary(model.Noun, frozen=True, kw_only=True):
    """What a run tells the other servers."""

    ended_s: float = 0.0
    freed_bytes: int = 0
    kept_bytes: int = 0


class Needed(model.Noun, frozen=True, kw_only=True):
    """What is needed, by whom. `by_repository` says which repository needs what: where to ask for a lost blob."""

    reasons: dict[model.Digest, str]
    pushes: frozenset[model.Digest]
    by_repository: dict[str, frozenset[model.Digest]]


class Collector:
    """One run after the other, by whoever asks for it. `aside`: entries that were set aside, by log; what they refer to
    stays."""

    def __init__(
        self,
        catalog: catalog.Catalog,
        care: blobs.Care,
        log_care: blobs.LogCare,
        periods: garbage.Periods,
        *,
        aside: Aside | None = None,
    ) -> None:
        self._aside = aside
        self._catalog = catalog
        self._care = care
        self._log_care = log_care
        self._periods = periods

    async def due(self, every_s: float) -> bool:
        """Whether no server has begun a run for so long."""
        note = (await self._care.notes(NOTE)).get(NOTE)
        return note is None or await self._care.clock_s() - note.at_s >= every_s

    async def needed(self) -> Needed:
        """Everything that manifests and pushes refer to. The order matters: pending entries first."""
        pushes = _of_pushes(await self._log_care.pending())
        reasons = dict.fromkeys(pushes, "an unfinished push needs it")
        for name, entries in (await self._aside()).items() if self._aside is not None else ():
            reasons.update(dict.fromkeys(_of_pushes(entries), f"an entry of {name} that was set aside needs it"))
        by_repository: dict[str, frozenset[model.Digest]] = {}
        async for fold in self._folds():
            for known in fold.manifests.values():
                tags = [tag for tag, digest in fold.tags.items() if digest == known.digest]
                named = f"{fold.name}:{tags[0]}" if tags else f"{fold.name}@{known.digest}"
                reasons[known.digest] = f"it is the manifest of {named}"
                for digest in known.refers:
                    reasons.setdefault(digest, f"{named} needs it")
            by_repository[fold.name] = frozenset(
                digest for known in fold.manifests.values() for digest in (known.digest, *known.refers)
            )
        return Needed(reasons=reasons, pushes=pushes, by_repository=by_repository)

    async def _folds(self) -> AsyncIterator[views.Repository]:
        names = [name for name in await self._log_care.logs() if not name.startswith("_")]
        for start in range(0, len(names), _PAGE):
            for fold in await self._catalog.repositories(names[start : start + _PAGE]):
                yield fold

    # ---- one run ---------------------------------------------------------------------------------------------------

    async def run(self, *, dry_run: bool = False) -> Report:
        """One run, or what it would do. Harmless beside anything, also beside itself."""
        now_s = await self._care.clock_s()
        if not dry_run:
            await self._note(Report())
        leftovers = await self._care.expire(now_s - self._periods.upload_s, dry_run=dry_run)
        forgotten = await self._forget(now_s, dry_run=dry_run)
        needed = await self.needed()
        touched, grants = await self._grants(needed, now_s, dry_run=dry_run)
        kept, kept_bytes, rulings = await self._sweep_shelf(needed, touched, now_s, dry_run=dry_run)
        rulings += await self._sweep_trash(touched, now_s, dry_run=dry_run)
        rulings += await self._sweep_quarantine(needed, touched, now_s, dry_run=dry_run)
        report = Report(
            ended_s=await self._care.clock_s(),
            kept=kept,
            kept_bytes=kept_bytes,
            rulings=tuple(rulings),
            leftovers=tuple(leftovers),
            forgotten=tuple(forgotten),
            grants=grants,
        )
        if not dry_run:
            await self._note(report)
            _say(report)
        return report

    async def _forget(self, now_s: float, *, dry_run: bool) -> list[str]:
        """Manifests of template versions that were replaced or taken back: an instance that was accepted before that
        has the grace to pull what it was promised. That is an entry: where others enter, they forget."""
        found: list[str] = []
        if not self._catalog.role.view().mine:
            return found
        async for fold in self._folds():
            if not views.untagged(fold):
                continue
            log = (await self._catalog.logs.read({fold.name: 0}))[fold.name]
            since = views.untagged_since([msgspec.json.decode(raw, type=views.Entry) for raw in log])
            old = [digest for digest, at_s in since.items() if now_s - at_s >= self._periods.grace_s]
            found += [
                f"{fold.name}@{digest}" for digest in old if dry_run or await self._catalog.forget(fold.name, digest)
            ]
        return found

    async def _grants(self, needed: Needed, now_s: float, *, dry_run: bool) -> tuple[Mapping[model.Digest, float], int]:
        """When each blob was last asked for by any repository; rights that are not used any more are taken back."""
        touched: dict[model.Digest, float] = {}
        count = 0
        for repository in await self._log_care.logs():
            needs = dict.fromkeys(needed.by_repository.get(repository, frozenset()) | needed.pushes, "")
            for digest, at_s in (await self._log_care.grants(repository)).items():
                touched[digest] = max(at_s, touched.get(digest, 0.0))
                if not garbage.grant_stays(digest, at_s, needs, now_s, self._periods):
                    count += 1
                    if not dry_run:
                        await self._catalog.logs.withdraw(repository, digest)
        return touched, count

    async def _sweep_shelf(
        self, needed: Needed, touched: Mapping[model.Digest, float], now_s: float, *, dry_run: bool
    ) -> tuple[dict[str, int], int, list[garbage.Ruling]]:
        kept: collections.Counter[str] = collections.Counter()
        kept_bytes = 0
        rulings = []
        async for held in self._care.held(Place.SHELF):
            ruling = garbage.on_shelf(_blob(held, touched), needed.reasons, now_s, self._periods)
            if ruling.fate is Fate.TRASH:
                rulings.append(ruling)
                if not dry_run:
                    await self._care.move(held.digest, Place.SHELF, Place.TRASH)
                continue
            kept_bytes += held.size_bytes
            kept["needed" if held.digest in needed.reasons else "touched lately"] += 1
            if held.digest not in needed.reasons:
                rulings.append(ruling)
        return dict(kept), kept_bytes, rulings

    async def _sweep_trash(
        self, touched: Mapping[model.Digest, float], now_s: float, *, dry_run: bool
    ) -> list[garbage.Ruling]:
        """What is needed is read again, after everything that is ruled on here had come to the trash."""
        trash = [held async for held in self._care.held(Place.TRASH)]
        needs = (await self.needed()).reasons if trash else {}
        rulings = []
        for held in trash:
            ruling = garbage.in_trash(_blob(held, touched), needs, now_s, self._periods)
            rulings.append(ruling)
            if dry_run:
                continue
            if ruling.fate is Fate.RESTORE:
                await self._care.move(held.digest, Place.TRASH, Place.SHELF)
            elif ruling.fate is Fate.DELETE:
                await self._care.destroy(held, Place.TRASH)
        return rulings

    async def _sweep_quarantine(
        self, needed: Needed, touched: Mapping[model.Digest, float], now_s: float, *, dry_run: bool
    ) -> list[garbage.Ruling]:
        rulings = []
        async for held in self._care.held(Place.QUARANTINE):
            ruling = garbage.in_quarantine(
                _blob(held, touched),
                needed.reasons,
                healed=await self._catalog.blobs.stat(held.digest) is not None,
                now_s=now_s,
                periods=self._periods,
            )
            rulings.append(ruling)
            if ruling.fate is Fate.DELETE and not dry_run:
                await self._care.destroy(held, Place.QUARANTINE)
        return rulings

    async def _note(self, report: Report) -> None:
        """Tell the other servers; on a full disk nobody hears of it, and that is no reason to stop."""
        summary = Summary(ended_s=report.ended_s, freed_bytes=report.freed_bytes, kept_bytes=report.kept_bytes)
        try:
            await self._care.note(NOTE, msgspec.json.encode(summary))
        except OSError as error:
            if error.errno not in durable.NO_ROOM:
                raise


def last(note: blobs.Note | None) -> Summary:
    """What the note of the last run says; nothing of one that runs, or that cannot be read."""
    try:
        return msgspec.json.decode(note.content, type=Summary) if note else Summary()
    except (msgspec.MsgspecError, UnicodeDecodeError):
        return Summary()


def _of_pushes(entries: Sequence[bytes]) -> frozenset[model.Digest]:
    """What pending entries refer to. One that cannot be read is not whole yet: its push has not looked for anything."""
    found: set[model.Digest] = set()
    for raw in entries:
        try:
            entry = msgspec.json.decode(raw, type=views.Entry)
        except (msgspec.MsgspecError, UnicodeDecodeError):
            continue
        found |= {entry.digest, *(entry.manifest.refers if entry.manifest else ())} - {model.Digest("")}
    return frozenset(found)


def _blob(held: blobs.Held, touched: Mapping[model.Digest, float]) -> garbage.Blob:
    return garbage.Blob(
        digest=held.digest,
        size_bytes=held.size_bytes,
        since_s=held.since_s,
        touched_s=touched.get(held.digest, 0.0),
    )


def _say(report: Report) -> None:
    counts = collections.Counter(ruling.fate for ruling in report.rulings)
    if (
        report.leftovers
        or report.grants
        or report.forgotten
        or any(counts[fate] for fate in (Fate.TRASH, Fate.RESTORE, Fate.DELETE))
    ):
        log.info(
            "garbage was collected",
            to_the_trash=counts[Fate.TRASH],
            taken_back=counts[Fate.RESTORE],
            deleted=counts[Fate.DELETE],
            expired=len(report.leftovers),
            forgotten=len(report.forgotten),
            freed_bytes=report.freed_bytes,
        )
