"""What a manifest must be for this registry to take it, and what it says. Pure: what is read comes in as bytes.

Whether what it names is there is `catalog`'s business.
"""

from covey import errors, model
from covey.client import oci
from covey.registry import views

_FIGURE_LIMIT = 16 << 20  # processors, or MiB of memory


class BadManifest(errors.Refused):
    """A manifest that this registry will not take; the text names the flaw."""


def examine(content: bytes, digest: model.Digest, media_type: str) -> tuple[oci.Manifest, views.Known]:
    """The manifest in `content`, pushed as `media_type` ("": it was not said). Raises BadManifest."""
    try:
        manifest = oci.parse_manifest(content)
    except errors.Refused as error:
        raise BadManifest(str(error)) from error
    claimed = media_type or manifest.media_type or (oci.OCI_INDEX if manifest.manifests else oci.OCI_MANIFEST)
    if manifest.media_type and claimed != manifest.media_type:
        raise BadManifest(f"mediaType is {manifest.media_type!r}, but the Content-Type is {claimed!r}")
    if claimed not in oci.MANIFEST_TYPES:
        raise BadManifest(f"media type {claimed!r} is not one of {', '.join(oci.MANIFEST_TYPES)}")
    _check_form(manifest, claimed)
    references = (*blobs_of(manifest), *manifest.manifests)
    return manifest, views.Known(
        digest=digest,
        media_type=claimed,
        size_bytes=len(content),
        refers=tuple(dict.fromkeys(model.Digest(reference.digest) for reference in references)),
        subject=manifest.subject.digest if manifest.subject else "",
        artifact_type=manifest.artifact_type or (manifest.config.media_type if manifest.config else ""),
        annotations=manifest.annotations if manifest.subject else {},
    )


def _check_form(manifest: oci.Manifest, media_type: str) -> None:
    """A document that could be read as an image by one client and as an index by another is neither."""
    is_index = media_type in oci.INDEX_TYPES
    if is_index and (manifest.config is not None or manifest.layers):
        raise BadManifest("an index has neither config nor layers")
    if not is_index and manifest.manifests:
        raise BadManifest(f"{media_type} has no manifests; an index is {oci.OCI_INDEX}")
    if not is_index and media_type != oci.OCI_ARTIFACT and manifest.config is None:
        raise BadManifest("the manifest has no config")


def blobs_of(manifest: oci.Manifest) -> list[oci.Descriptor]:
    return [*manifest.layers, *manifest.blobs, *filter(None, (manifest.config,))]


# ---- templates -----------------------------------------------------------------------------------------------------


def template_config(repository: str, manifest: oci.Manifest, tag: str) -> oci.Descriptor | None:
    """Where a template's config is; None when the manifest is something else. Raises BadManifest for a template that is
    not in order; `tag` is spelled as OCI does ("": by its digest alone)."""
    if manifest.artifact_type != oci.TEMPLATE:
        return None
    if oci.template_of(repository) is None:
        raise BadManifest(f"a template's repository is templates/<uuid>, not {repository}")
    name, text = manifest.annotations.get(oci.NAME, ""), manifest.annotations.get(oci.TAG, "")
    if not name or not text:
        raise BadManifest(f"a template's manifest needs the annotations {oci.NAME} and {oci.TAG}")
    check_template_name(name)
    try:
        oci.check_tag(text)
    except errors.Refused as error:
        raise BadManifest(str(error)) from error
    if tag and tag != oci.escape_tag(text):
        raise BadManifest(f"tag {text!r} is spelled {oci.escape_tag(text)!r} in OCI, not {tag!r}")
    config = manifest.config
    if config is None or config.media_type != oci.TEMPLATE_CONFIG:
        raise BadManifest(
            f"a template's config is {oci.TEMPLATE_CONFIG}, not {config.media_type if config else 'none'}"
        )
    if config.size > oci.CONFIG_LIMIT:
        raise BadManifest(f"a template's config has at most {oci.CONFIG_LIMIT} bytes, not {config.size}")
    return config


def release(manifest: oci.Manifest, reference: oci.Descriptor, content: bytes) -> views.Release:
    """What a template's manifest and its config say. Raises BadManifest."""
    try:
        config = oci.parse_config(content)
    except errors.Refused as error:
        raise BadManifest(str(error)) from error
    return views.Release(
        name=manifest.annotations[oci.NAME],
        tag=manifest.annotations[oci.TAG],
        arch=config.arch,
        config=_file(reference),
        files=tuple(_file(layer) for layer in manifest.layers),
        description=manifest.annotations.get(oci.DESCRIPTION, ""),
        vcpu=_figure(config, "vcpu"),
        ram_mb=_figure(config, "ram_mb"),
    )


def check_template_name(name: str) -> None:
    """Raises BadManifest for a name that nobody could tell from an id, or see."""
    if not name.strip() or not name.isprintable() or len(name) > 255 or oci.valid_uuid(name):
        raise BadManifest("a template's name has 1 to 255 printable characters and is not a UUID")


def _figure(config: oci.TemplateConfig, name: str) -> int:
    """A size that the configuration gives; 0 when it gives none that makes sense: the hypervisor says what is wrong."""
    value = config.vm.get(name, 0)
    return value if type(value) is int and 0 < value <= _FIGURE_LIMIT else 0


def _file(reference: oci.Descriptor) -> views.File:
    return views.File(
        digest=model.Digest(reference.digest),
        size_bytes=reference.size,
        media_type=reference.media_type,
        title=reference.title,
    )
