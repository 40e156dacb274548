"""Pushing and pulling templates: files on one side, an OCI artifact in the registry on the other.

Only what the registry lacks is moved: a layer is asked for first (HEAD), then mounted from any other repository, and
only then uploaded. The manifest goes last, so a crash at any moment leaves the old tag or the new one (promise I8);
pushing again moves what was still missing. A pull leaves a file that is already right, continues a partial one, and
shows none under its name before its digest is verified.
"""

import asyncio
import hashlib
import io
import stat
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NewType

import msgspec

from covey import errors, model
from covey.client import oci, registry

Title = NewType("Title", str)  # a file's name as shown while it moves
Progress = Callable[[Title, int, int], None]  # (file, bytes done, bytes of the file)
Value = str | int | bool

CONFIG_FILE = "template.json"  # the configuration, beside the pulled files
_QCOW2_MAGIC = b"QFI\xfb"


class Pushed(model.Noun, frozen=True, kw_only=True):
    """What a push did. `moved_bytes` travelled, `skipped_bytes` were in the registry already."""

    template: model.TemplateId
    name: str
    tag: str
    version: int
    digest: model.Digest
    moved_bytes: int
    skipped_bytes: int


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
    """A file about to be pushed."""

    path: Path
    descriptor: oci.Descriptor


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
    description: str = "",
    force: bool = False,
    progress: Progress | None = None,
) -> Pushed:
    """Push disk layers (base first) and boot files as version `tag` of the template `name`, which is made when it does
    not exist. Raises Refused when the tag exists and `force` is not given; nothing but unused blobs is left then."""
    oci.check_tag(tag)
    spelled = oci.escape_tag(tag)
    if not layers:
        raise errors.Refused("a template needs at least one disk layer")
    others = ((kernel, oci.KERNEL), (initrd, oci.INITRD), (nvram, oci.NVRAM))
    typed = [(path, await asyncio.to_thread(_disk_type, path)) for path in layers]
    typed += [(path, media_type) for path, media_type in others if path is not None]
    files = [await asyncio.to_thread(_examine, path, media_type) for path, media_type in typed]
    template = await registry.hold_name(name)
    repository = oci.repository_of(template)
    if not force:
        await _refuse_replacing(registry, name, template, tag, files)
    moved = 0
    for file in {file.descriptor.digest: file for file in files}.values():
        moved += await _upload(registry, repository, file, progress)
    content = _config(arch, vm, files)
    config_digest = await registry.upload_bytes(repository, content)
    manifest = oci.Manifest(
        schema_version=2,
        media_type=oci.OCI_MANIFEST,
        artifact_type=oci.TEMPLATE,
        config=oci.Descriptor(media_type=oci.TEMPLATE_CONFIG, digest=config_digest, size=len(content)),
        layers=[file.descriptor for file in files],
        annotations={oci.NAME: name, oci.TAG: tag, **({oci.DESCRIPTION: description} if description else {})},
    )
    digest, version = await registry.push_manifest(repository, spelled, msgspec.json.encode(manifest), force=force)
    if version is None:
        raise errors.RemoteError(f"the registry took {name} {tag} but gave it no version: it is not a Covey registry")
    return Pushed(
        template=template,
        name=name,
        tag=tag,
        version=version,
        digest=digest,
        moved_bytes=moved,
        skipped_bytes=sum({file.descriptor.digest: file.descriptor.size for file in files}.values()) - moved,
    )


async def _refuse_replacing(
    registry: registry.Registry, name: str, template: model.TemplateId, tag: str, files: Sequence[_File]
) -> None:
    """Fail before gigabytes are moved. The registry's own check at the end is the one that counts; a tag with the very
    same files passes here, as a repetition may be the very same push."""
    try:
        known = await registry.resolve(template, tag)
    except errors.Refused:
        return
    manifest, _, _ = await registry.manifest(oci.repository_of(template), known.digest)
    if [layer.digest for layer in manifest.layers] != [file.descriptor.digest for file in files]:
        raise errors.Refused(f"tag {tag!r} of template {name!r} exists; --force replaces it")


async def _upload(registry: registry.Registry, repository: str, file: _File, progress: Progress | None) -> int:
    """Upload one file unless the registry has it; the bytes moved."""
    size, title = file.descriptor.size, Title(file.descriptor.title)
    report = None if progress is None else _reporter(progress, title, size)
    moved = await registry.upload(repository, file.descriptor.digest, file.path, progress=report)
    if progress is not None:
        progress(title, size, size)
    return size if moved else 0


def _reporter(progress: Progress, title: Title, size: int) -> registry.Progress:
    return lambda done: progress(title, done, size)


def check_files(layers: Sequence[Path]) -> None:
    """Raises Refused for what cannot be a disk layer of any format."""
    for path in layers:
        with _opened(path) as stream:
            if not stream.read(1):
                raise errors.Refused(f"{path} is empty: a disk layer has content")


def _disk_type(path: Path) -> str:
    with _opened(path) as stream:
        return oci.DISK_QCOW2 if stream.read(len(_QCOW2_MAGIC)) == _QCOW2_MAGIC else oci.DISK_RAW


def _examine(path: Path, media_type: str) -> _File:
    """Hash a file and describe it."""
    with _opened(path) as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
        size = stream.tell()
    descriptor = oci.Descriptor(
        media_type=media_type, digest=f"sha256:{digest}", size=size, annotations={oci.TITLE: path.name}
    )
    return _File(path=path, descriptor=descriptor)


def _config(arch: model.Arch, vm: Mapping[str, Value], files: Sequence[_File]) -> bytes:
    disks = [file.descriptor.digest for file in files if file.descriptor.media_type.startswith(oci.DISK_PREFIX)]
    return msgspec.json.encode(oci.TemplateConfig(arch=arch, vm=dict(vm), uncompressed=disks), order="sorted")


# ---- tag ---------------------------------------------------------------------------------------------------------


async def tag_template(
    registry: registry.Registry, wanted: str, new_tag: str, *, tag: str = "", version: int | None = None
) -> oci.Resolved:
    """Give a version (the newest without tag and version) a further tag: a new version of the same layers, of which
    only the manifest moves. Raises Refused when `new_tag` is another version already."""
    oci.check_tag(new_tag)
    found = await registry.resolve(wanted, tag, version)
    repository = oci.repository_of(found.id)
    _, _, content = await registry.manifest(repository, found.digest)
    document: dict[str, Any] = msgspec.json.decode(content)  # whole: also what this client does not know
    document["annotations"] = {**document.get("annotations", {}), oci.TAG: new_tag}
    await registry.push_manifest(repository, oci.escape_tag(new_tag), msgspec.json.encode(document))
    return await registry.resolve(found.id, new_tag)


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
    manifest, digest, _ = await registry.manifest(repository, found.digest)
    if manifest.config is None:
        raise errors.RemoteError(f"manifest {digest} of {found.name} has no config")
    content = await registry.content(repository, manifest.config.digest)
    await asyncio.to_thread(directory.mkdir, parents=True, exist_ok=True)
    moved = 0
    targets = [directory / name for name in file_names(manifest.layers)]
    for layer, target in zip(manifest.layers, targets, strict=True):
        moved += await _download(registry, repository, layer, target, progress)
    await asyncio.to_thread((directory / CONFIG_FILE).write_bytes, content)
    return Pulled(
        template=found.id,
        name=found.name,
        tag=found.tag,
        version=found.number,
        digest=digest,
        files=tuple(targets),
        moved_bytes=moved,
        skipped_bytes=sum(layer.size for layer in manifest.layers) - moved,
    )


async def _download(
    registry: registry.Registry, repository: str, layer: oci.Descriptor, target: Path, progress: Progress | None
) -> int:
    """Download one layer unless the file is there and right; the bytes moved."""
    title = Title(target.name)
    if await asyncio.to_thread(_is_right, target, layer):
        if progress is not None:
            progress(title, layer.size, layer.size)
        return 0
    report = None if progress is None else _reporter(progress, title, layer.size)
    await registry.fetch(repository, layer.digest, layer.size, target, progress=report)
    return layer.size


def _is_right(path: Path, layer: oci.Descriptor) -> bool:
    if not path.is_file() or path.stat().st_size != layer.size:
        return False
    with path.open("rb") as stream:
        return "sha256:" + hashlib.file_digest(stream, "sha256").hexdigest() == layer.digest


def file_names(layers: Sequence[oci.Descriptor]) -> list[str]:
    """A name in one folder for each layer: its title where that is a plain file name nobody else has (a manifest may
    come from anywhere, and a title may hold ``../``), else one made from its place and digest."""
    names: list[str] = []
    for index, layer in enumerate(layers):
        title = layer.title
        plain = title not in ("", ".", "..", CONFIG_FILE) and "/" not in title and "\0" not in title
        short = plain and len(title.encode()) < 200 and not title.endswith(".part")
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
