"""A repository as the fold of its log, and the decisions about the next entry. Pure: no I/O, no clock, no chance.

An entry is whole in itself: it carries what a manifest says of its template, so that a server starts, lists and
answers from logs alone. `fold` is total: an entry of a kind it does not know (from a newer server) changes nothing
but the count.

Rules
* A version number is given when its push is entered, from 0 in push order, and never given twice (safety S29).
* The same tag with the same manifest is no new entry: same version, same answer (safety S37).
* A template that had versions and has none is dead for ever; its name is free, its id is not.
"""

from collections.abc import Iterable, Sequence
from enum import StrEnum

import msgspec

from covey import errors, model


class Kind(StrEnum):
    PUSH = "push"  # a manifest, with or without a tag
    TAG = "tag"  # another tag for a manifest that the repository has
    DELETE = "delete"  # a tag, or a manifest with all its tags
    REVERT = "revert"  # of a template: version `version` and all newer ones


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


class Entry(model.Noun, frozen=True, kw_only=True):
    """One line of a repository's log. `id` is unique, `tag` is spelled as OCI does. `version` -1: no template's."""

    id: str
    kind: str
    at_s: int
    tag: str = ""
    digest: model.Digest = model.Digest("")
    manifest: Known | None = None
    version: int = -1


class Claim(model.Noun, frozen=True, kw_only=True):
    """One line of a template name's log: the newest one holds the name, unless its template is dead."""

    id: str
    name: str
    template: model.TemplateId


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
            gone = [tag for tag, digest in tags.items() if tag == entry.tag or digest == entry.digest]
            manifests.pop(entry.digest, None)
            _drop(gone, tags, versions)
        elif entry.kind == Kind.REVERT:
            _drop([version.tag for version in versions.values() if version.number >= entry.version], tags, versions)
    return msgspec.structs.replace(
        repository,
        count=repository.count + len(entries),
        manifests=manifests,
        tags=tags,
        versions=tuple(sorted(versions.values(), key=lambda version: version.number)),
        next_version=next_version,
        created_s=created_s,
        pushed_s=pushed_s,
    )


def _numbered(entry: Entry, manifests: dict[str, Known]) -> Numbered | None:
    known = manifests.get(entry.digest)
    if entry.version < 0 or known is None or known.release is None:
        return None
    return Numbered(number=entry.version, tag=entry.tag, pushed_s=entry.at_s, manifest=known, release=known.release)


def _drop(gone: Iterable[str], tags: dict[str, model.Digest], versions: dict[str, Numbered]) -> None:
    for tag in gone:
        tags.pop(tag, None)
        versions.pop(tag, None)


# ---- decisions: the next entry, None when nothing is to be done, Refused when it may not be ----------------------


def decide_push(repository: Repository, manifest: Known, tag: str, *, force: bool, id: str, now_s: int) -> Entry | None:
    """Enter a manifest whose blobs are all there, under `tag` or by its digest alone."""
    is_new = manifest.digest not in repository.manifests
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


def decide_revert(repository: Repository, number: int, *, id: str, now_s: int) -> Entry | None:
    """Take back version `number` and all newer ones. None: there is no such version."""
    if repository.version(number) is None:
        return None
    return Entry(id=id, kind=Kind.REVERT, at_s=now_s, version=number)
