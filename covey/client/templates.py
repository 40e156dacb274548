"""Pushing and pulling templates: files on one side, an OCI artifact in the registry on the other.

Only what the registry lacks is moved: a layer that a version of the template has already is taken as it is there, else
it is asked for (HEAD), then mounted from any other repository, and only then uploaded, packed where that pays. The
manifest goes last, so a crash at any moment leaves the old tag or the new one (promise I8); pushing again moves what
was still missing. A pull leaves a file that is already right, continues a partial one, and shows none under its name
before its digest is verified. Several layers move at once.
"""

import asyncio
import io
import stat
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NewType, TypeVar

import msgspec

from covey import durable, errors, model
from covey.client import long_work, oci, packing, registry, remembered

Title = NewType("Title", str)  # a file's name as shown while it moves
Progress = Callable[[Title, int, int], None]  # (file, bytes done, bytes of the file)
Value = str | int | bool
S = TypeVar("S")
T = TypeVar("T")

CONFIG_FILE = "template.json"  # the configuration, beside the pulled files
_QCOW2_MAGIC = b"QFI\xfb"
_AT_ONCE = 3  # layers
_OURS = (".part", ".ranges", ".unpacked")  # endings of files that a pull makes on its way


class Pushed(model.Noun, frozen=True, kw_only=True):
    """What a push did. `moved_bytes` travelled, `skipped_bytes` were in the registry already; `file_bytes` is what all
    the files hold, unpacked."""

    template: model.TemplateId
    name: str
    tag: str
    version: int
    digest: model.Digest
    moved_bytes: int
    skipped_bytes: int
    file_bytes: int


class Pulled(model.Noun, frozen=True, kw_only=True):
    """What a pull left in its directory; `files` in the manifest's order."""

    template: model.TemplateId
    name: str
    tag: str
    version: int
    digest: model.Digest
    files: tuple[Path, ...]
    moved_bytes: int
    skipped_bytes: int


class _File(model.Noun, frozen=True, kw_only=True):
    """A file about to be pushed: what it holds, and how it looked when that was found out."""

    path: Path
    kind: str  # media type
    digest: str
    size_bytes: int
    look: str
    packed: packing.Packed | None = None  # what it packs to, as remembered

    def descriptor(self, packed: packing.Packed | None) -> oci.Descriptor:
        title = {oci.TITLE: self.path.name}
        if packed is None:
            return oci.Descriptor(media_type=self.kind, digest=self.digest, size=self.size_bytes, annotations=title)
        return oci.Descriptor(
            media_type=self.kind + oci.ZSTD,
            digest=packed.digest,
            size=packed.size_bytes,
            annotations={**title, oci.SIZE: str(self.size_bytes)},
        )


async def push_template(
    registry: registry.Registry,
    name: str,
    tag: str,
    layers: Sequence[Path],
    *,
    arch: model.Arch,
    vm: Mapping[str, Value] = {},
    kernel: Path | None = None,
    initrd: Path | None = None,
    nvram: Path | None = None,
    state: Path | None = None,
    description: str = "",
    force: bool = False,
    notes: remembered.Notes | None = None,
    pack: bool = True,
    progress: Progress | None = None,
) -> Pushed:
    """Push disk layers (base first) and boot files as version `tag` of the template `name`, which is made when it does
    not exist. `notes`: what is remembered between runs, and where layers are packed; without it, or without `pack`,
    none is. Raises Refused when the tag exists and `force` is not given; nothing but unused blobs is left then."""
    oci.check_tag(tag)
    spelled = oci.escape_tag(tag)
    if not layers:
        raise errors.Refused("a template needs at least one disk layer")
    others = ((kernel, oci.KERNEL), (initrd, oci.INITRD), (nvram, oci.NVRAM), (state, oci.STATE))
    typed = [(path, await asyncio.to_thread(_disk_type, path)) for path in layers]
    typed += [(path, media_type) for path, media_type in others if path is not None]
    files = await _several(typed, lambda one: _examine(*one, notes, progress))
    template = await registry.hold_name(name)
    sender = _Sender(registry, template, notes, progress, pack=pack)
    await sender.look_around(name, tag, files, force=force)
    unique = list({file.digest: file for file in files}.values())
    sent = await _several(unique, sender.send)
    forms = {file.digest: form for file, form in zip(unique, sent, strict=True)}
    content = _config(arch, vm, files)
    manifest = oci.Manifest(
        schema_version=2,
        media_type=oci.OCI_MANIFEST,
        artifact_type=oci.TEMPLATE,
        config=oci.Descriptor(
            media_type=oci.TEMPLATE_CONFIG,
            digest=await registry.upload_bytes(sender.repository, content),
            size=len(content),
        ),
        layers=[file.descriptor(forms[file.digest]) for file in files],
        annotations={oci.NAME: name, oci.TAG: tag, **({oci.DESCRIPTION: description} if description else {})},
    )
    encoded = msgspec.json.encode(manifest)
    digest, version = await registry.push_manifest(sender.repository, spelled, encoded, force=force)
    if version is None:
        raise errors.RemoteError(f"the registry took {name} {tag} but gave it no version: it is not a Covey registry")
    blobs = {layer.digest: layer.size for layer in manifest.layers}
    return Pushed(
        template=template,
        name=name,
        tag=tag,
        version=version,
        digest=digest,
        moved_bytes=sender.moved_bytes,
        skipped_bytes=sum(blobs.values()) - sender.moved_bytes,
        file_bytes=sum(file.size_bytes for file in unique),
    )


async def _several(items: Sequence[S], work: Callable[[S], Awaitable[T]]) -> list[T]:
    """A few at once, in the order given; the first fault ends all."""
    limit = asyncio.Semaphore(_AT_ONCE)

    async def one(item: S) -> T:
        async with limit:
            return await work(item)

    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(one(item)) for item in items]
    except ExceptionGroup as faults:
        raise faults.exceptions[0] from None
    return [task.result() for task in tasks]


class _Sender:
    """Files on their way into one template's repository."""

    def __init__(
        self,
        registry: registry.Registry,
        template: model.TemplateId,
        notes: remembered.Notes | None,
        progress: Progress | None,
        *,
        pack: bool,
    ) -> None:
        self._registry = registry
        self._packs = pack and notes is not None
        self._template = template
        self._notes = notes
        self._progress = progress
        self._there: dict[str, packing.Packed | None] = {}  # layers of a version that is there, by what they hold
        self.repository = oci.repository_of(template)
        self.moved_bytes = 0

    async def look_around(self, name: str, tag: str, files: Sequence[_File], *, force: bool) -> None:
        """See which layers are there, and fail before gigabytes are moved to a tag that exists. The registry's own
        check at the end is the one that counts; a tag of the very same files passes here, as a repetition may be the
        very same push."""
        for wanted in (tag, ""):
            try:
                found = await self._registry.resolve(self._template, wanted)
            except errors.Refused:
                continue
            there, _ = await _content(self._registry, self.repository, found.digest, look=True)
            if wanted and not force and [layer.digest for layer in there] != [file.digest for file in files]:
                raise errors.Refused(f"tag {tag!r} of template {name!r} exists; --force replaces it")
            for layer in there:
                form = packing.Packed(layer.blob, layer.blob_size) if layer.packed else None
                self._there.setdefault(layer.digest, form)

    async def send(self, file: _File) -> packing.Packed | None:
        """Make a file's content a blob of the repository: packed in this form, or as it is (None)."""
        if file.digest in self._there and (self._packs or self._there[file.digest] is None):
            form = self._there[file.digest]
            self._say(file, form)
            return form
        if self._notes is None or not self._packs or await self._registry.has_blob(self.repository, file.digest):
            await self._upload(file, None, file.path)
            return None
        return await self._send_packed(file, self._notes)

    async def _send_packed(self, file: _File, notes: remembered.Notes) -> packing.Packed | None:
        spool = notes.packed(file.digest)
        form = file.packed
        if form is None or (_pays(file, form) and not await self._is_at_hand(form, spool)):
            form = await self._pack(file, spool, notes)
        form = form if form is not None and _pays(file, form) else None
        await self._upload(file, form, file.path if form is None else spool)
        await asyncio.to_thread(durable.discard, spool)
        return form

    async def _is_at_hand(self, form: packing.Packed, spool: Path) -> bool:
        """Whether a packed layer is in the registry, or here. What it holds is the registry's to check."""
        here = spool.is_file() and spool.stat().st_size == form.size_bytes
        return here or await self._registry.has_blob(self.repository, form.digest)

    async def _pack(self, file: _File, spool: Path, notes: remembered.Notes) -> packing.Packed | None:
        """Pack a file if that seems to pay. A full disk here is no reason to fail: it travels as it is."""
        if not await asyncio.to_thread(packing.worth, file.path):
            return None
        report = _reporter(self._progress, Title(f"packing {file.path.name}"), file.size_bytes)
        with notes.packing(file.digest) as aside:
            try:
                form = await long_work.run(lambda moved: packing.pack(file.path, aside, moved), report)
            except OSError as error:
                if error.errno not in durable.NO_ROOM:
                    raise
                return None
            aside.rename(spool)
        await asyncio.to_thread(notes.learn, file.path, file.look, file.digest, *form)
        return form

    async def _upload(self, file: _File, form: packing.Packed | None, source: Path) -> None:
        item = file.descriptor(form)
        report = _reporter(self._progress, Title(file.path.name), item.size)
        if await self._registry.upload(self.repository, item.digest, source, progress=report):
            self.moved_bytes += item.size
        self._say(file, form)

    def _say(self, file: _File, form: packing.Packed | None) -> None:
        if self._progress is not None:
            size = file.descriptor(form).size
            self._progress(Title(file.path.name), size, size)


async def _content(
    registry: registry.Registry, repository: str, digest: str, *, look: bool = False
) -> tuple[list[oci.Layer], bytes]:
    """The layers of a template's manifest, and its config as it is. Raises Refused when they do not fit together."""
    manifest, _, _ = await registry.manifest(repository, digest, look=look)
    if manifest.config is None:
        raise errors.RemoteError(f"manifest {digest} has no config")
    config = await registry.content(repository, manifest.config.digest)
    return oci.layers_of(manifest, oci.parse_config(config)), config


def _reporter(progress: Progress | None, title: Title, size: int) -> registry.Progress | None:
    return None if progress is None else lambda done: progress(title, done, size)


def check_files(layers: Sequence[Path]) -> None:
    """Raises Refused for what cannot be a disk layer of any format."""
    for path in layers:
        with _opened(path) as stream:
            if not stream.read(1):
                raise errors.Refused(f"{path} is empty: a disk layer has content")


def _disk_type(path: Path) -> str:
    with _opened(path) as stream:
        return oci.DISK_QCOW2 if stream.read(len(_QCOW2_MAGIC)) == _QCOW2_MAGIC else oci.DISK_RAW


async def _examine(path: Path, kind: str, notes: remembered.Notes | None, progress: Progress | None) -> _File:
    """What a file holds: as it is remembered, or hashed now."""
    with _opened(path):
        pass  # a device is refused before anything else is done with it
    seen = await asyncio.to_thread(remembered.look, path)
    known = await asyncio.to_thread(notes.known, path) if notes is not None else None
    if known is not None and known.look == seen:
        packed = packing.Packed(known.packed, known.packed_bytes) if known.packed else None
        size = int(seen.split()[0])
        return _File(path=path, kind=kind, digest=known.digest, size_bytes=size, look=seen, packed=packed)
    report = _reporter(progress, Title(f"hashing {path.name}"), path.stat().st_size)
    digest, size = await long_work.run(lambda moved: packing.hash_file(path, moved=moved), report)
    if notes is not None:
        await asyncio.to_thread(notes.learn, path, seen, digest)
    return _File(path=path, kind=kind, digest=digest, size_bytes=size, look=seen)


def _pays(file: _File, form: packing.Packed) -> bool:
    return form.size_bytes <= packing.WORTH * file.size_bytes


def _config(arch: model.Arch, vm: Mapping[str, Value], files: Sequence[_File]) -> bytes:
    plain = [file.digest for file in files]
    return msgspec.json.encode(oci.TemplateConfig(arch=arch, vm=dict(vm), uncompressed=plain), order="sorted")


# ---- tag ---------------------------------------------------------------------------------------------------------


async def tag_template(
    registry: registry.Registry,
    wanted: str,
    new_tag: str,
    *,
    tag: str = "",
    version: int | None = None,
    pushed_to: registry.Registry | None = None,
) -> oci.Resolved:
    """Give a version (the newest without tag and version) a further tag: a new version of the same layers, of which
    only the manifest moves, to `pushed_to` if that is another registry. Raises Refused when `new_tag` is another
    version already."""
    pushes = pushed_to or registry
    oci.check_tag(new_tag)
    found = await registry.resolve(wanted, tag, version)
    repository = oci.repository_of(found.id)
    _, _, content = await registry.manifest(repository, found.digest, look=True)
    document: dict[str, Any] = msgspec.json.decode(content)  # whole: also what this client does not know
    document["annotations"] = {**document.get("annotations", {}), oci.TAG: new_tag}
    await pushes.push_manifest(repository, oci.escape_tag(new_tag), msgspec.json.encode(document))
    return await pushes.resolve(found.id, new_tag)


# ---- pull --------------------------------------------------------------------------------------------------------


async def pull_template(
    registry: registry.Registry,
    wanted: str,
    directory: Path,
    *,
    tag: str = "",
    version: int | None = None,
    progress: Progress | None = None,
) -> Pulled:
    """Pull a version (the newest without tag and version) of a template, by id or name, into `directory`."""
    found = await registry.resolve(wanted, tag, version)
    repository = oci.repository_of(found.id)
    layers, config = await _content(registry, repository, found.digest)
    await asyncio.to_thread(directory.mkdir, parents=True, exist_ok=True)
    pairs = [(layer, directory / name) for layer, name in zip(layers, file_names(layers), strict=True)]
    moved = await _several(pairs, lambda pair: _download(registry, repository, *pair, progress))
    await asyncio.to_thread((directory / CONFIG_FILE).write_bytes, config)
    return Pulled(
        template=found.id,
        name=found.name,
        tag=found.tag,
        version=found.number,
        digest=found.digest,
        files=tuple(target for _, target in pairs),
        moved_bytes=sum(moved),
        skipped_bytes=sum(layer.blob_size for layer in layers) - sum(moved),
    )


async def _download(
    registry: registry.Registry, repository: str, layer: oci.Layer, target: Path, progress: Progress | None
) -> int:
    """Download one layer unless the file is there and right; the bytes moved."""

    def report(done: int) -> None:
        """As bytes that travel: what a packed one becomes counts too."""
        if progress is not None:
            whole = layer.blob_size + (layer.size if layer.packed else 0)
            progress(Title(target.name), done * layer.blob_size // (whole or 1), layer.blob_size)

    plain = (layer.digest, layer.size) if layer.packed else None
    if await registry.fetch(repository, layer.blob, layer.blob_size, target, plain=plain, progress=report):
        moved = layer.blob_size
    else:
        moved = 0
    if progress is not None:
        progress(Title(target.name), layer.blob_size, layer.blob_size)
    return moved


def file_names(layers: Sequence[oci.Layer]) -> list[str]:
    """A name in one folder for each layer: its title where that is a plain file name nobody else has (a manifest may
    come from anywhere, and a title may hold ``../``), else one made from its place and digest."""
    names: list[str] = []
    for index, layer in enumerate(layers):
        title = layer.title
        plain = title not in ("", ".", "..", CONFIG_FILE) and "/" not in title and "\0" not in title
        short = plain and len(title.encode()) < 200 and not title.endswith(_OURS)
        names.append(title if short and title not in names else f"{index}-{layer.digest[7:19]}")
    return names


def _opened(path: Path) -> io.BufferedReader:
    """The file, opened. Devices and pipes are refused: one may never answer, or never end."""
    try:
        mode = path.stat().st_mode
        if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
            raise errors.Refused(f"cannot read {path}: it is no regular file")
        return path.open("rb")
    except OSError as error:
        raise errors.Refused(f"cannot read {path}: {error.strerror}") from error
