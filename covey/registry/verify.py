"""Checks everything that a storage holds: every entry, every reference, every digest. Changes nothing.

It may run beside servers: what they are changing is looked at twice before it is called wrong.
"""

from collections.abc import Callable, Sequence

import msgspec

from covey import errors, model
from covey.client import oci
from covey.registry import blobs, catalog, scrub, views

_PAGE = 200
Place = blobs.Place


class Report(model.Noun, frozen=True, kw_only=True):
    """What was looked at, and what is wrong, one sentence each."""

    repositories: int = 0
    entries: int = 0
    manifests: int = 0
    blobs: int = 0
    bytes: int = 0
    problems: tuple[str, ...] = ()


class Verification:
    """One look at a whole storage. `quick`: sizes only, no bytes are read but those of manifests."""

    def __init__(
        self, catalog: catalog.Catalog, care: blobs.Care, log_care: blobs.LogCare, *, quick: bool = False
    ) -> None:
        self._catalog = catalog
        self._care = care
        self._log_care = log_care
        self._quick = quick
        self._problems: list[str] = []
        self._entries = 0
        self._manifests = 0

    async def run(self, on_blob: Callable[[int, int], None] | None = None) -> Report:
        """`on_blob` hears how many blobs were read, and how many bytes."""
        logs = sorted(await self._log_care.logs())
        for log in logs:
            await self._log(log)
        repositories = [log for log in logs if not log.startswith("_")]
        for start in range(0, len(repositories), _PAGE):
            for fold in await self._catalog.repositories(repositories[start : start + _PAGE]):
                await self._repository(fold)
        count, size = 0, 0
        async for held in self._care.held(Place.SHELF):
            await self._blob(held)
            count, size = count + 1, size + held.size_bytes
            if on_blob is not None:
                on_blob(count, size)
        return Report(
            repositories=len(repositories),
            entries=self._entries,
            manifests=self._manifests,
            blobs=count,
            bytes=size,
            problems=tuple(self._problems),
        )

    async def _log(self, log: str) -> None:
        """Numbers without a gap, each entry whole."""
        numbers = sorted(await self._log_care.numbers(log))
        if numbers != list(range(len(numbers))):
            gap = next(number for number, found in enumerate(numbers) if number != found)
            self._problems.append(f"log {log}: entry {gap} is missing, and there are later ones")
        kind: type[views.Claim] | type[views.Entry] = views.Claim if log.startswith("_") else views.Entry
        entries = (await self._catalog.logs.read({log: 0}))[log]
        self._entries += len(entries)
        for number, raw in enumerate(entries):
            try:
                msgspec.json.decode(raw, type=kind)
            except (msgspec.MsgspecError, UnicodeDecodeError) as error:
                self._problems.append(f"log {log}: entry {number} cannot be read: {error}")

    async def _repository(self, fold: views.Repository) -> None:
        for tag, digest in fold.tags.items():
            if digest not in fold.manifests:
                self._problems.append(f"{fold.name}:{tag} names manifest {digest}, which the repository does not have")
        for known in fold.manifests.values():
            self._manifests += 1
            for problem in await self._manifest(fold, known):
                now = await self._catalog.repository(fold.name)  # it may have been deleted meanwhile
                if known.digest in now.manifests:
                    self._problems.append(f"{fold.name}@{known.digest}: {problem}")

    async def _manifest(self, fold: views.Repository, known: views.Known) -> Sequence[str]:
        try:
            content = await self._catalog.blobs.get(known.digest)
        except FileNotFoundError:
            return ["its bytes are not there"]
        if oci.digest_of(content, oci.algorithm_of(known.digest)) != known.digest:
            return ["its bytes are damaged"]
        try:
            manifest = oci.parse_manifest(content)
        except errors.Refused as error:
            return [f"it is no manifest: {error}"]
        problems = []
        blobs_named = (*manifest.layers, *filter(None, (manifest.config,)))
        for reference in (one for one in blobs_named if one.digest in known.refers):
            blob = await self._catalog.blobs.stat(model.Digest(reference.digest))
            if blob is None:
                problems.append(f"blob {reference.digest} is not there")
            elif blob.size_bytes != reference.size:
                problems.append(f"blob {reference.digest} has {blob.size_bytes} bytes, not {reference.size}")
        children = [child.digest for child in manifest.manifests if child.digest in known.refers]
        lacking = [digest for digest in children if digest not in fold.manifests]
        return problems + [f"it names manifest {digest}, which the repository does not have" for digest in lacking]

    async def _blob(self, held: blobs.Held) -> None:
        if self._quick:
            return
        try:
            _, found = await scrub.measure(self._care.read(held.digest, past_cache=True), held.digest)
        except FileNotFoundError:  # collected meanwhile
            return
        except OSError as error:
            found = f"unreadable ({error.strerror})"
        if found != held.digest:
            self._problems.append(f"blob {held.digest} is damaged: its bytes are {found}")
