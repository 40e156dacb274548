"""The registry without HTTP: taking manifests, who holds a template name, and what the repositories hold.

Everything known of repositories is a fold of their logs, kept from one look to the next and brought up to date by
reading on from the last entry seen; so every answer contains all that any server on the same storage has acknowledged.
A change is decided on such a fold and entered under the next number; when that number is taken, read and decide again.
"""

import asyncio
import hashlib
from collections.abc import Awaitable, Callable, Mapping, Sequence, Set

import msgspec

from covey import errors, failpoint, model, world
from covey.client import oci
from covey.registry import blobs, manifests, role, views

Eras = Callable[[Sequence[str]], Awaitable[Mapping[str, int]]]

_EMPTY = views.Repository(name="")
_FEW = 20


class Missing(errors.NotFound):
    """A manifest, tag or repository that is not there."""


class BlobMissing(errors.Refused):
    """A manifest names a blob that its repository does not have."""


class BlobNeeded(errors.Refused):
    """A blob that a manifest of its repository needs cannot be deleted."""


class ManifestNeeded(errors.Refused):
    """A manifest that an index of its repository names cannot be deleted."""


class Changed(errors.Refused):
    """What a push counted on (If-Match, If-None-Match) is not so."""


class DeletesOff(errors.Refused):
    """Nothing may be deleted here: the settings say so."""


class Catalog:
    """All repositories of one storage. `deletes` False: what is pushed stays. `role` says whether, and how, entries
    come in here. `eras`: which making of each log there is, where logs are made anew. `fetch`: have a manifest here
    that is named and lacking; False: nobody has it."""

    def __init__(
        self,
        blobs: blobs.Blobs,
        logs: blobs.Logs,
        world: world.World,
        *,
        deletes: bool = True,
        role: role.Role = role.Alone(),  # noqa: B008  it holds nothing
        eras: Eras | None = None,
    ) -> None:
        self.fetch: Callable[[model.Digest], Awaitable[bool]] | None = None
        self.blobs = blobs
        self._eras = eras
        self.logs = logs
        self.role = role
        self._world = world
        self._deletes = deletes
        self._folds: dict[str, tuple[int, views.Repository]] = {}  # and the era it is of

    # ---- reading ---------------------------------------------------------------------------------------------------

    async def repositories(self, names: Sequence[str]) -> list[views.Repository]:
        """The repositories of these names as they stand now; one never pushed to is empty."""
        if self._eras is None:
            return await self._read_on(dict.fromkeys(names, 0))
        while True:
            eras = await self._eras(names)
            found = await self._read_on(eras)
            if await self._eras(names) == eras:
                return found

    async def _read_on(self, eras: Mapping[str, int]) -> list[views.Repository]:
        known = {name: self._known(name, era) for name, era in eras.items()}
        news = await self.logs.read({name: fold.count for name, fold in known.items()})
        found = []
        for name, fold in known.items():
            if news[name] or not fold.name:
                entries = [msgspec.json.decode(raw, type=views.Entry) for raw in news[name]]
                fold = views.fold(msgspec.structs.replace(fold, name=name), entries)
                if fold.count:
                    self._folds[name] = eras[name], fold
            found.append(fold)
        return found

    def _known(self, name: str, era: int) -> views.Repository:
        made, fold = self._folds.get(name, (era, _EMPTY))
        return fold if made == era else _EMPTY

    async def repository(self, name: str) -> views.Repository:
        return (await self.repositories([name]))[0]

    async def templates(self) -> list[views.Repository]:
        """The living templates, in the order of their first push."""
        found = [repository for repository in await self.repositories(await self._templates()) if repository.versions]
        return sorted(found, key=lambda repository: (repository.created_s, repository.name))

    async def _templates(self) -> list[str]:
        return [name for name in await self.logs.names("templates") if oci.template_of(name)]

    async def warm(self) -> None:
        """Read all templates' logs before somebody asks for the list, a few at a time: others are served between."""
        names = await self._templates()
        for start in range(0, len(names), _FEW):
            await self.repositories(names[start : start + _FEW])

    async def template(self, wanted: str) -> views.Repository:
        """A living template by id or by name. Raises Missing."""
        holder = wanted if oci.valid_uuid(wanted) else await self.holder(wanted)
        if holder:
            repository = await self.repository(oci.repository_of(holder))
            if repository.versions and wanted in (holder, repository.versions[-1].release.name):
                return repository
        raise Missing("Not found")

    async def manifest(self, repository: str, reference: str) -> tuple[views.Known, bytes]:
        """A manifest and its bytes, by tag or digest. Raises Missing."""
        known = await self.known(repository, reference)
        try:
            if self.fetch is not None and await self.blobs.stat(known.digest) is None:
                await self.fetch(known.digest)
            return known, await self.blobs.get(known.digest)
        except FileNotFoundError as error:
            text = (
                f"manifest {known.digest} of repository {repository} is damaged or lost in this registry; push it again"
            )
            raise Missing(text) from error

    async def known(self, repository: str, reference: str) -> views.Known:
        """What is known of a manifest without reading it. Raises Missing."""
        fold = await self.repository(repository)
        digest = fold.tags.get(reference, reference)
        if digest not in fold.manifests:
            raise Missing(f"repository {repository} has no manifest {reference}")
        return fold.manifests[digest]

    async def granted_blob(self, repository: str, digest: model.Digest) -> blobs.Blob | None:
        """A blob that the repository may read. Where another server takes pushes only what a manifest needs counts: of
        the rest that one alone knows whether it was deleted (`uploaded`)."""
        view = self.role.view()
        if view.mine or view.why_not:
            found = await self._granted(repository, [digest])
        else:
            found = await self._needed(repository, {digest})
        return await self.blobs.stat(digest) if digest in found else None

    async def why_missing(self, repository: str, digest: model.Digest) -> str:
        """What to tell somebody who asked for a blob that `granted_blob` does not have."""
        manifests = (await self.repository(repository)).manifests.values()
        if any(digest in known.refers for known in manifests):
            return f"blob {digest} of repository {repository} is damaged or lost in this registry; push it again"
        return f"repository {repository} has no blob {digest}"

    async def _granted(self, repository: str, digests: Sequence[str]) -> frozenset[str]:
        """Those that the repository may read: what was granted to it, and what its manifests need (a push whose server
        died right after its entry left that to us)."""
        found = await self.logs.granted(repository, digests)
        if missing := set(digests) - found:
            found |= await self._needed(repository, missing)
        return found

    async def _needed(self, repository: str, digests: Set[str]) -> frozenset[str]:
        """Those that manifests of the repository need."""
        manifests = (await self.repository(repository)).manifests.values()
        return frozenset(digests & {digest for known in manifests for digest in known.refers})

    async def names(self) -> list[str]:
        """Every repository that holds a manifest, sorted."""
        found: list[str] = []
        folders = [""]
        while folders:
            listed = await asyncio.gather(*map(self.logs.names, folders))  # a bucket answers each after a while
            below = [name.lstrip("/") for names in listed for name in names]
            folders = [name for name in below if oci.valid_name(name)]
            found += folders
        return sorted(fold.name for fold in await self.repositories(found) if fold.manifests)

    # ---- manifests -------------------------------------------------------------------------------------------------

    async def push(
        self,
        repository: str,
        reference: str,
        content: bytes,
        media_type: str,
        *,
        force: bool,
        digest: model.Digest | None = None,
        allowed: Callable[[str | None], bool] = lambda _: True,
    ) -> tuple[views.Known, int | None]:
        """Take a manifest: check it, check what it refers to, enter it. What it is, and the version number if it became
        one of a template's. `digest` says which one it is to have under a tag; `allowed` judges the digest that the
        reference had before (None: it had none). The answer to a repetition is the same."""
        tag = "" if oci.valid_digest(reference) else reference
        wanted = digest or (None if tag else model.Digest(reference))
        digest = oci.digest_of(content, oci.algorithm_of(wanted) if wanted else oci.SHA256)
        if wanted not in (None, digest):
            raise blobs.WrongDigest(f"the manifest's digest is {digest}, not {wanted}")
        manifest, known = manifests.examine(content, digest, media_type)
        absent = await self._check_references(repository, manifest)
        release = await self._release(repository, manifest, tag)
        refers = () if oci.is_referrers_tag(tag) else tuple(item for item in known.refers if item not in absent)
        known = msgspec.structs.replace(known, release=release, refers=refers)

        def decide(fold: views.Repository) -> views.Entry | None:
            _check_state(fold, known, tag, allowed)
            return views.decide_push(fold, known, tag, force=force, id=self._world.token(), now_s=self._now_s())

        decide(await self.repository(repository))  # a push that is refused leaves no trace
        await self.blobs.put(content, digest)
        failpoint.reach("registry.manifest.stored")
        if release is not None and tag:
            await self._hold_name(release.name, repository)
        fold, entry = await self._enter(repository, decide, lambda: self._check_stored(repository, manifest, digest))
        await self._keep_blobs(repository, known)
        number = entry.version if entry is not None else _number_of(fold, tag)
        return known, None if number < 0 else number

    async def _check_references(self, repository: str, manifest: oci.Manifest) -> frozenset[str]:
        """Every blob that a manifest needs is here, whole, and readable in this repository. Those that it names and
        does not need: foreign layers, which come from elsewhere."""
        absent = set()
        wanted = manifests.blobs_of(manifest)
        granted = await self._granted(repository, [reference.digest for reference in wanted])
        for reference in wanted:
            digest = model.Digest(reference.digest)
            blob = await self.blobs.stat(digest) if digest in granted else None
            if blob is None and reference.media_type.startswith(oci.FOREIGN_PREFIXES):
                absent.add(reference.digest)
                continue
            if blob is None:
                raise BlobMissing(f"the manifest names blob {digest}, which repository {repository} does not have")
            if blob.size_bytes != reference.size:
                raise manifests.BadManifest(
                    f"blob {digest} has {blob.size_bytes} bytes, the manifest says {reference.size}"
                )
        return frozenset(absent)

    async def _check_stored(self, repository: str, manifest: oci.Manifest, digest: model.Digest) -> None:
        """The second look, while the entry is pending: what is here now no collector takes any more (safety S32)."""
        await self._check_references(repository, manifest)
        if await self.blobs.stat(digest) is None:
            raise BlobMissing(f"manifest {digest} was collected while it was pushed; push it again")

    async def _keep_blobs(self, repository: str, known: views.Known) -> None:
        """A blob may have been taken away between the check and the entry: who takes one away looks at the entries
        before and after, and this looks after its own, so one of the two sees the other (`withdraw`)."""
        granted = await self.logs.granted(repository, known.refers)
        pushed = (await self.repository(repository)).manifests
        for digest in known.refers:
            if digest not in granted and digest not in pushed:
                await self.logs.grant(repository, digest)

    async def withdraw(self, repository: str, digest: model.Digest) -> None:
        """Take a blob's name out of a repository. What a manifest needs stays: a tag is never broken (promise I8).
        Raises Missing, BlobNeeded and DeletesOff."""
        self._check_deletes()
        await self._refuse_needed(repository, digest)
        if not await self.logs.withdraw(repository, digest):
            raise Missing(f"repository {repository} has no blob {digest}")
        try:
            await self._refuse_needed(repository, digest)
        except BlobNeeded:
            await self.logs.grant(repository, digest)
            raise

    async def _refuse_needed(self, repository: str, digest: model.Digest) -> None:
        fold = await self.repository(repository)
        for known in fold.manifests.values():
            if digest in known.refers:
                raise BlobNeeded(f"manifest {known.digest} needs this blob; delete that first")

    async def _release(self, repository: str, manifest: oci.Manifest, tag: str) -> views.Release | None:
        """What the manifest says of a template; None when it is something else. Raises BadManifest."""
        config = manifests.template_config(repository, manifest, tag)
        if config is None:
            return None
        return manifests.release(manifest, config, await self.blobs.get(model.Digest(config.digest)))

    async def delete(self, repository: str, reference: str) -> None:
        """Delete a tag, or a manifest with all its tags; one that an index names stays. Raises Missing, ManifestNeeded
        and DeletesOff."""
        self._check_deletes()

        def decide(fold: views.Repository) -> views.Entry | None:
            holder = views.holder(fold, reference)
            if holder is not None:
                raise ManifestNeeded(f"index {holder.digest} names this manifest; delete that first")
            entry = views.decide_delete(fold, reference, id=self._world.token(), now_s=self._now_s())
            if entry is None:
                raise Missing(f"repository {repository} has no manifest {reference}")
            return entry

        await self._enter(repository, decide)

    async def revert(self, wanted: str, target: views.Target, request: str = "") -> None:
        """Take back a version of a template, by id or name, and all newer ones; with the first one goes the template,
        for ever. Harmless when repeated: by number, by tag, or under one request id. Raises Missing and Refused."""
        self._check_deletes()

        def decide(fold: views.Repository) -> views.Entry | None:
            return views.decide_revert(fold, target, request=request, id=self._world.token(), now_s=self._now_s())

        await self._enter(await self._once(wanted), decide)

    async def remove(self, wanted: str) -> None:
        """Delete a template, by id or name, for ever. Harmless when repeated. Raises Missing."""
        self._check_deletes()

        def decide(fold: views.Repository) -> views.Entry | None:
            if fold.dead:
                return None
            first = views.Target(version=fold.versions[0].number)
            return views.decide_revert(fold, first, request="", id=self._world.token(), now_s=self._now_s())

        await self._enter(await self._once(wanted), decide)

    async def set_arch(self, wanted: str, arch: model.Arch) -> None:
        """Correct the architecture of a living template's versions. Harmless when repeated. Raises Missing."""
        template = await self.template(wanted)

        def decide(fold: views.Repository) -> views.Entry | None:
            return views.decide_arch(fold, arch, id=self._world.token(), now_s=self._now_s())

        await self._enter(template.name, decide)

    async def _once(self, wanted: str) -> str:
        """The repository of a template, by id or name, that lives or has lived. Raises Missing."""
        holder = wanted if oci.valid_uuid(wanted) else await self.holder(wanted)
        if holder and (await self.repository(oci.repository_of(holder))).next_version > 0:
            return oci.repository_of(holder)
        raise Missing("Not found")

    def _check_deletes(self) -> None:
        if not self._deletes:
            raise DeletesOff("deleting is switched off at this registry (COVEY_REGISTRY_DELETES=false)")

    async def forget(self, repository: str, digest: model.Digest) -> bool:
        """Delete a template's manifest that no tag names any more: the collector's business. False: it is gone, or
        named again, or deletes are off."""

        def decide(fold: views.Repository) -> views.Entry | None:
            if not self._deletes or digest not in views.untagged(fold):
                return None
            return views.decide_delete(fold, digest, id=self._world.token(), now_s=self._now_s())

        if not self.role.view().mine:
            return False
        _, entry = await self._enter(repository, decide)
        return entry is not None

    async def _enter(
        self,
        repository: str,
        decide: Callable[[views.Repository], views.Entry | None],
        check: Callable[[], Awaitable[None]] | None = None,
    ) -> tuple[views.Repository, views.Entry | None]:
        """Decide on the newest fold until an entry is in, or none is needed. The fold decided on, and the entry.
        `check` runs while it is pending (`blobs.Logs.append`)."""
        while True:
            view = self.role.view()
            fold = await self.repository(repository)
            entry = decide(fold)
            if entry is None:  # it is in: the answer to the first request may have been that nobody knows
                await self.role.settle(view, repository, fold.count - 1, entered=False)
                return fold, None
            entry = msgspec.structs.replace(entry, term=view.term)
            if await self._append(view, repository, fold.count, msgspec.json.encode(entry), check):
                return fold, entry

    async def _append(
        self,
        view: role.View,
        log: str,
        number: int,
        entry: bytes,
        check: Callable[[], Awaitable[None]] | None = None,
    ) -> bool:
        """Enter it when the role allows (safety S33). False: decide again."""

        async def accept() -> None:
            if check is not None:
                await check()
            await self.role.accept(view, log, number, entry)

        try:
            if not await self.logs.append(log, number, entry, accept):
                return False
        except role.Taken:
            return False
        await self.role.settle(view, log, number, entered=True)
        return True

    # ---- names of templates ----------------------------------------------------------------------------------------

    async def holder(self, name: str) -> model.TemplateId | None:
        """The template that a name stands for, whether it has a version yet or not."""
        claims = await self._claims(name)
        return claims[-1].template if claims else None

    async def claim(self, name: str) -> model.TemplateId:
        """The template of this name: the one that holds it, else a new one."""
        return await self._hold(name, None)

    async def _hold_name(self, name: str, repository: str) -> None:
        template = oci.template_of(repository)
        assert template is not None  # noqa: S101  checked by _release
        holder = await self._hold(name, template)
        if holder != template:
            raise errors.Refused(f"the name {name!r} belongs to template {holder}; push there")

    async def _hold(self, name: str, wanted: model.TemplateId | None) -> model.TemplateId:
        """Who holds `name` after `wanted` (None: a new template) has tried to. A dead template holds nothing, and
        never lives again, so a name never stands for two."""
        while True:
            view = self.role.view()
            claims = await self._claims(name)
            if claims:
                holder = claims[-1].template
                if holder == wanted or not (await self.repository(oci.repository_of(holder))).dead:
                    return holder
            taker = wanted or model.TemplateId(self._world.uuid())
            claim = views.Claim(id=self._world.token(), name=name, template=taker, term=view.term)
            if await self._append(view, name_log(name), len(claims), msgspec.json.encode(claim)):
                failpoint.reach("registry.name.claimed")
                return taker

    async def _claims(self, name: str) -> list[views.Claim]:
        log = name_log(name)
        return [msgspec.json.decode(raw, type=views.Claim) for raw in (await self.logs.read({log: 0}))[log]]

    def _now_s(self) -> int:
        return self._world.wall_ns() // 10**9


def _check_state(fold: views.Repository, known: views.Known, tag: str, allowed: Callable[[str | None], bool]) -> None:
    """What a push needs of the repository it is entered into. Raises BlobMissing and Changed."""
    for digest in known.refers if known.is_index else ():
        if digest not in fold.manifests:
            raise BlobMissing(f"the index names manifest {digest}, which {fold.name} does not have")
    current = fold.tags.get(tag) if tag else known.digest if known.digest in fold.manifests else None
    if current != known.digest and not allowed(current):  # a repetition is not held against its own first try
        raise Changed(f"{tag or known.digest} is {current or 'not there'}, which is not what the request counts on")


def _number_of(repository: views.Repository, tag: str) -> int:
    return next((version.number for version in repository.versions if version.tag == tag), -1)


def name_log(name: str) -> str:
    """The log of who holds a name. Names are any text: their logs are named by its hash."""
    return "_names/" + hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()
