"""A repository as the fold of its log, and the decisions about the next entry. Pure: no I/O, no clock, no chance.

An entry is whole in itself: it carries what a manifest says of its template, so that a server starts, lists and
answers from logs alone. `fold` is total: an entry of a kind it does not know (from a newer server) changes nothing
but the count.

Rules
* A version number is given when its push is entered, from 0 in push order, and never given twice (safety S29).
* The same tag with the same manifest is no new entry: same version, same answer (safety S37).
* A template that had versions and has none is dead for ever; its name is free, its id is not.
* What is taken back by number, or by a tag that is not pushed again meanwhile, is taken back once, however often that
  is asked; "the newest one" is taken back once per request id (safety S38, promise I7).
* An architecture that is set by hand holds for the versions there are; a later push says its own.
"""

from collections.abc import Iterable, Sequence
from enum import StrEnum

import msgspec

from covey import errors, model
from covey.client import oci

_REQUESTS_KEPT = 1_000  # per template; a repeat comes within minutes


class Kind(StrEnum):
    PUSH = "push"  # a manifest, with or without a tag
    TAG = "tag"  # another tag for a manifest that the repository has
    DELETE = "delete"  # a tag, or a manifest with all its tags
    REVERT = "revert"  # of a template: version `version` and all newer ones
    ARCH = "arch"  # of a template: its versions are for another architecture than their manifests say


class File(model.Noun, frozen=True, kw_only=True):
    """One layer of a template."""

    digest: model.Digest
    size_bytes: int
    media_type: str
    title: str = ""


class Release(model.Noun, frozen=True, kw_only=True):
    """What a manifest says of a template's version. `tag` as people write it."""

    name: str
    tag: str
    arch: model.Arch
    config: File
    files: tuple[File, ...]
    description: str = ""
    vcpu: int = 0  # of its configuration, as is `ram_mb`; 0: it does not say
    ram_mb: int = 0


class Known(model.Noun, frozen=True, kw_only=True):
    """A manifest of a repository. `refers` are the blobs and manifests that it needs; `subject` is what it is about
    (a signature, a bill of materials), and then its annotations are kept for the list of referrers."""

    digest: model.Digest
    media_type: str
    size_bytes: int
    refers: tuple[model.Digest, ...] = ()
    subject: str = ""
    artifact_type: str = ""
    annotations: dict[str, str] = {}
    release: Release | None = None

    @property
    def is_index(self) -> bool:
        return self.media_type in oci.INDEX_TYPES


class Entry(model.Noun, frozen=True, kw_only=True):
    """One line of a repository's log. `id` is unique, `tag` is spelled as OCI does. `version` -1: no template's."""

    id: str
    kind: str
    at_s: int
    tag: str = ""
    digest: model.Digest = model.Digest("")
    manifest: Known | None = None
    version: int = -1
    arch: model.Arch | None = None
    request: str = ""  # of a revert: the id under which it was asked for, and what was asked
    asked: str = ""
    term: int = 0  # in which the server that entered it held the push role; 0: it was alone


class Target(model.Noun, frozen=True, kw_only=True):
    """Which version a revert begins with: by tag as people write it, by number, or the newest. `digest`, when given,
    is what the version must be."""

    tag: str = ""
    version: int | None = None
    digest: str = ""

    @property
    def words(self) -> str:
        return f"{self.version} {self.digest} {self.tag}"


class Claim(model.Noun, frozen=True, kw_only=True):
    """One line of a template name's log: the newest one holds the name, unless its template is dead."""

    id: str
    name: str
    template: model.TemplateId
    term: int = 0


class Numbered(model.Noun, frozen=True, kw_only=True):
    """A living version of a template."""

    number: int
    tag: str  # OCI spelling
    pushed_s: int
    manifest: Known
    release: Release


class Repository(model.Noun, frozen=True, kw_only=True):
    """A repository as it stands after `count` entries. Versions are ordered by number."""

    name: str
    count: int = 0
    manifests: dict[str, Known] = {}
    tags: dict[str, model.Digest] = {}
    versions: tuple[Numbered, ...] = ()
    next_version: int = 0
    created_s: int = 0
    pushed_s: int = 0
    gone: frozenset[str] = frozenset()  # tags, as people write them, that were deleted or taken back
    requests: dict[str, str] = {}  # the newest reverts by request id: what was asked for

    @property
    def dead(self) -> bool:
        """A template whose last version was deleted."""
        return self.next_version > 0 and not self.versions

    def size_bytes(self) -> int:
        """Bytes of all versions, what they share counted once."""
        return size_of(version.manifest for version in self.versions)

    def version(self, number: int) -> Numbered | None:
        return next((version for version in self.versions if version.number == number), None)

    def tagged(self, text: str) -> Numbered | None:
        """The version whose tag people write as `text`."""
        return next((version for version in self.versions if version.release.tag == text), None)


def size_of(manifests: Iterable[Known]) -> int:
    """Bytes of templates' manifests with their configs and files, each digest counted once. Manifest and config
    count too: a template's size changes with every tag (a client re-reads tags only when it did)."""
    sizes: dict[str, int] = {}
    for manifest in manifests:
        sizes[manifest.digest] = manifest.size_bytes
        if manifest.release is not None:
            for file in (manifest.release.config, *manifest.release.files):
                sizes[file.digest] = file.size_bytes
    return sum(sizes.values())


def fold(repository: Repository, entries: Sequence[Entry]) -> Repository:
    """The repository after `entries`."""
    if not entries:
        return repository
    manifests, tags = dict(repository.manifests), dict(repository.tags)
    versions = {version.tag: version for version in repository.versions}
    next_version, created_s, pushed_s = repository.next_version, repository.created_s, repository.pushed_s
    gone, requests = set(repository.gone), dict(repository.requests)
    for entry in entries:
        if entry.kind in (Kind.PUSH, Kind.TAG):
            if entry.manifest is not None:
                manifests[entry.digest] = entry.manifest
            created_s, pushed_s = created_s or entry.at_s, entry.at_s
            if entry.tag:
                tags[entry.tag] = entry.digest
                versions.pop(entry.tag, None)
            numbered = _numbered(entry, manifests)
            if numbered is not None:
                versions[entry.tag] = numbered
                next_version = numbered.number + 1
        elif entry.kind == Kind.DELETE:
            names = [tag for tag, digest in tags.items() if tag == entry.tag or digest == entry.digest]
            manifests.pop(entry.digest, None)
            gone |= _drop(names, tags, versions)
        elif entry.kind == Kind.REVERT:
            names = [version.tag for version in versions.values() if version.number >= entry.version]
            gone |= _drop(names, tags, versions)
            if entry.request:
                requests[entry.request] = entry.asked
        elif entry.kind == Kind.ARCH and entry.arch is not None:
            manifests = {digest: _for_arch(known, entry.arch) for digest, known in manifests.items()}
            versions = {
                tag: msgspec.structs.replace(
                    version, manifest=_for_arch(version.manifest, entry.arch), release=_of(version.release, entry.arch)
                )
                for tag, version in versions.items()
            }
    return msgspec.structs.replace(
        repository,
        count=repository.count + len(entries),
        manifests=manifests,
        tags=tags,
        versions=tuple(sorted(versions.values(), key=lambda version: version.number)),
        next_version=next_version,
        created_s=created_s,
        pushed_s=pushed_s,
        gone=frozenset(gone),
        requests=dict(list(requests.items())[-_REQUESTS_KEPT:]),
    )


def _for_arch(known: Known, arch: model.Arch) -> Known:
    return known if known.release is None else msgspec.structs.replace(known, release=_of(known.release, arch))


def _of(release: Release, arch: model.Arch) -> Release:
    return msgspec.structs.replace(release, arch=arch)


def _numbered(entry: Entry, manifests: dict[str, Known]) -> Numbered | None:
    known = manifests.get(entry.digest)
    if entry.version < 0 or known is None or known.release is None:
        return None
    return Numbered(number=entry.version, tag=entry.tag, pushed_s=entry.at_s, manifest=known, release=known.release)


def _drop(names: Iterable[str], tags: dict[str, model.Digest], versions: dict[str, Numbered]) -> set[str]:
    """Take tags away; those of template versions as people write them."""
    gone = set()
    for tag in names:
        tags.pop(tag, None)
        version = versions.pop(tag, None)
        if version is not None:
            gone.add(version.release.tag)
    return gone


def holder(repository: Repository, digest: str) -> Known | None:
    """An index that names the manifest."""
    indexes = (known for known in repository.manifests.values() if known.is_index)
    return next((known for known in indexes if digest in known.refers), None)


def untagged(repository: Repository) -> frozenset[model.Digest]:
    """Manifests of template versions that were replaced, reverted or deleted: nothing names them any more."""
    named = {*repository.tags.values(), *(digest for known in repository.manifests.values() for digest in known.refers)}
    return frozenset(
        known.digest
        for known in repository.manifests.values()
        if known.release is not None and known.digest not in named
    )


def untagged_since(entries: Sequence[Entry]) -> dict[model.Digest, int]:
    """Of a whole log: since when each such manifest has had no name, Unix seconds."""
    since: dict[model.Digest, int] = {}
    repository = Repository(name="")
    for entry in entries:
        repository = fold(repository, [entry])
        since = {digest: since.get(digest, entry.at_s) for digest in untagged(repository)}
    return since


# ---- decisions: the next entry, None when nothing is to be done, Refused when it may not be ----------------------


def decide_push(repository: Repository, manifest: Known, tag: str, *, force: bool, id: str, now_s: int) -> Entry | None:
    """Enter a manifest whose blobs are all there, under `tag` or by its digest alone."""
    stored = repository.manifests.get(manifest.digest)
    is_new = stored is None or not set(manifest.refers) <= set(stored.refers)  # or it needs more than it did before
    if not is_new and (not tag or repository.tags.get(tag) == manifest.digest):
        return None
    release = manifest.release
    version = -1
    if release is not None and tag:
        _may_push(repository, release, tag, force=force)
        version = repository.next_version
    return Entry(
        id=id,
        kind=Kind.PUSH if is_new else Kind.TAG,
        at_s=now_s,
        tag=tag,
        digest=manifest.digest,
        manifest=manifest if is_new else None,
        version=version,
    )


def _may_push(repository: Repository, release: Release, tag: str, *, force: bool) -> None:
    if repository.dead:
        raise errors.Refused("this template was deleted; push it under a new id")
    if repository.versions and repository.versions[-1].release.name != release.name:
        raise errors.Refused(f"this template is named {repository.versions[-1].release.name!r}, not {release.name!r}")
    if tag in repository.tags and not force:
        raise errors.Refused(
            f"tag {release.tag!r} of template {release.name!r} exists; push with --force to replace it"
        )


def decide_delete(repository: Repository, reference: str, *, id: str, now_s: int) -> Entry | None:
    """Delete a tag, or a manifest by its digest. None: the repository has no such thing."""
    if reference in repository.tags:
        return Entry(id=id, kind=Kind.DELETE, at_s=now_s, tag=reference)
    if reference in repository.manifests:
        return Entry(id=id, kind=Kind.DELETE, at_s=now_s, digest=model.Digest(reference))
    return None


def decide_revert(repository: Repository, target: Target, *, request: str, id: str, now_s: int) -> Entry | None:
    """Take back a version and all newer ones. None: that has been done before. Raises Refused."""
    if request in repository.requests:
        if repository.requests[request] != target.words:
            raise errors.Refused("Idempotency-Key was used for another request")
        return None
    found = pick(repository, target)
    if found is None:
        return None
    if target.digest and target.digest != found.manifest.digest:
        raise errors.Refused(f"version {found.number} is {found.manifest.digest}, not {target.digest}")
    return Entry(id=id, kind=Kind.REVERT, at_s=now_s, version=found.number, request=request, asked=target.words)


def pick(repository: Repository, target: Target) -> Numbered | None:
    """The version aimed at; None when it was there once. Raises Refused for one that never was."""
    if not target.tag and target.version is None:
        return repository.versions[-1] if repository.versions else None
    if target.tag:
        found = repository.tagged(target.tag)
        if found is None and target.tag not in repository.gone:
            raise errors.Refused(f"No such tag {target.tag}")
        if found is None or target.version in (None, found.number):
            return found
        raise errors.Refused(f"tag {target.tag} is version {found.number}, not {target.version}")
    number = -1 if target.version is None else target.version
    found = repository.version(number)
    if found is None and not 0 <= number < repository.next_version:
        raise errors.Refused(f"No such version {number}")
    return found


def decide_arch(repository: Repository, arch: model.Arch, *, id: str, now_s: int) -> Entry | None:
    """Say which architecture a template's versions are for. None: they say so already."""
    if all(version.release.arch == arch for version in repository.versions):
        return None
    return Entry(id=id, kind=Kind.ARCH, at_s=now_s, arch=arch)
