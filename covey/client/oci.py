"""The words that registry and clients share: media types, manifests, names, digests, and how a tag is spelled in OCI.

Sources: OCI distribution specification 1.1 (names, tags, digests, upload flow) and OCI image specification 1.1
(manifest, descriptor, annotations). A Covey template is an OCI artifact:

    manifest   artifactType application/vnd.covey.template.v1, annotations dev.covey.name and dev.covey.tag
    config     application/vnd.covey.template.config.v1+json: the VM's configuration (`TemplateConfig`)
    layers     disk layers base first, then kernel, initrd, nvram, state; the file's name is the annotation `TITLE`

Rules: nothing here does I/O. A template's name and tag may be any text; OCI tags may not, so `escape_tag` spells them.
"""

import hashlib
import itertools
import re

import msgspec

from covey import errors, model

TEMPLATE = "application/vnd.covey.template.v1"
TEMPLATE_CONFIG = "application/vnd.covey.template.config.v1+json"
DISK_PREFIX = "application/vnd.covey.disk."
DISK_QCOW2 = "application/vnd.covey.disk.qcow2.v1"
DISK_RAW = "application/vnd.covey.disk.raw.v1"  # what is no qcow2: enough for the synthetic hypervisor
STATE = "application/vnd.covey.state.v1"
NVRAM = "application/vnd.covey.nvram.v1"
KERNEL = "application/vnd.covey.kernel.v1"
INITRD = "application/vnd.covey.initrd.v1"
ZSTD = "+zstd"  # ends the media type of a layer that travels packed

OCI_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
OCI_INDEX = "application/vnd.oci.image.index.v1+json"
DOCKER_MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"
DOCKER_LIST = "application/vnd.docker.distribution.manifest.list.v2+json"
OCI_ARTIFACT = "application/vnd.oci.artifact.manifest.v1+json"  # never part of a release; older tools still push it
OCI_EMPTY = "application/vnd.oci.empty.v1+json"  # the descriptor of `{}`, where an artifact has no config or layer
MANIFEST_TYPES = (OCI_MANIFEST, OCI_INDEX, DOCKER_MANIFEST, DOCKER_LIST, OCI_ARTIFACT)
INDEX_TYPES = (OCI_INDEX, DOCKER_LIST)
# Layers that registries need not have: they are fetched from the URLs in their descriptors.
FOREIGN_PREFIXES = (
    "application/vnd.oci.image.layer.nondistributable.",
    "application/vnd.docker.image.rootfs.foreign.diff.",
)

NAME = "dev.covey.name"
TAG = "dev.covey.tag"
SIZE = "dev.covey.size"  # of a packed layer: its bytes when unpacked
TITLE = "org.opencontainers.image.title"
DESCRIPTION = "org.opencontainers.image.description"

SHA256, SHA512 = "sha256", "sha512"  # the digest algorithms that the image specification registers
DIGEST_FORM = "sha256:<64 hexadecimal digits> or sha512:<128 hexadecimal digits>"

MANIFEST_LIMIT = 4 << 20  # bytes; the specification asks registries to take at least 4 MiB
CONFIG_LIMIT = 1 << 20
FORCE_HEADER = "Covey-Force"  # `true`: replace an existing tag of a template
LOOK_HEADER = "Covey-Look"  # `true`: a manifest is read on the way to a push, which is no pull
OFFSET_HEADER = "Covey-Offset"  # where an upload stands; the specification's Range cannot tell 0 bytes from 1
VERSION_HEADER = "Covey-Version"  # in the answer to a template's manifest: its version number

_COMPONENT = r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*"
_NAME = re.compile(rf"{_COMPONENT}(?:/{_COMPONENT})*")
_TAG = re.compile(r"[a-zA-Z0-9_][a-zA-Z0-9._-]{0,127}")
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}|sha512:[0-9a-f]{128}")
_REFERRERS_TAG = re.compile(r"sha256-[0-9a-f]{64}|sha512-[0-9a-f]{64}")
_UUID = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}")
_PLAIN = frozenset(b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789._-")
_NAME_LIMIT = 255
_TAG_LIMIT = 128
_TEXT_LIMIT = 1024  # characters of a tag before it is spelled


class Descriptor(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, rename="camel"):
    """A reference to a blob or a manifest."""

    media_type: str
    digest: str
    size: int
    artifact_type: str = ""
    annotations: dict[str, str] = {}

    @property
    def title(self) -> str:
        return self.annotations.get(TITLE, "")


class Manifest(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, rename="camel"):
    """An image manifest, an index or an artifact manifest. `config` and `layers` are an image's, `manifests` an
    index's, `blobs` an artifact's."""

    schema_version: int = 0
    media_type: str = ""
    artifact_type: str = ""
    config: Descriptor | None = None
    layers: list[Descriptor] = []
    manifests: list[Descriptor] = []
    blobs: list[Descriptor] = []
    subject: Descriptor | None = None
    annotations: dict[str, str] = {}


class TemplateConfig(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The config blob of a template: what a hypervisor needs to know beside the files.

    `vm` is the hypervisor's own: vcpu, ram_mb, append, … `uncompressed` lists the digests of the layers as they are on
    a node's disk, in the manifest's order; of layers at the end that are not packed they may be left out.
    """

    arch: model.Arch
    vm: dict[str, str | int | bool] = {}
    uncompressed: list[str] = []


class Layer(msgspec.Struct, frozen=True, kw_only=True):
    """A layer as it is on a disk, and the blob that it travels as: the same bytes, or packed."""

    digest: str
    size: int
    kind: str  # its media type without what tells that it is packed
    title: str
    blob: str
    blob_size: int

    @property
    def packed(self) -> bool:
        return self.blob != self.digest


def layers_of(manifest: Manifest, config: TemplateConfig) -> list[Layer]:
    """The layers of a template. Raises Refused when it does not say what a packed one becomes."""
    found = []
    for index, item in enumerate(manifest.layers):
        digest, size = item.digest, item.size
        if item.media_type.endswith(ZSTD):
            text = item.annotations.get(SIZE, "")
            digest = config.uncompressed[index] if index < len(config.uncompressed) else ""
            if not valid_digest(digest) or not text.isascii() or not text.isdigit() or len(text) > 19:
                raise errors.Refused(
                    f"layer {item.digest} is packed, but its template does not say what it becomes: its digest in the "
                    f"config's list uncompressed, its size in the annotation {SIZE}; push the template again"
                )
            size = int(text)
        kind = item.media_type.removesuffix(ZSTD)
        found.append(
            Layer(digest=digest, size=size, kind=kind, title=item.title, blob=item.digest, blob_size=item.size)
        )
    return found


# ---- the template views, as the API spells them: what /registry/… answers ------------------------------------------


class View(msgspec.Struct, frozen=True, kw_only=True):
    """Base of the views: every field is always there (some clients want uniform lists); times are Unix seconds."""


class TemplateItem(View, frozen=True, kw_only=True):
    """A template in a list. `size` counts what versions share once; `arch` is the newest version's."""

    id: model.TemplateId
    name: str
    size: int
    arch: model.Arch
    last_pull: int
    last_push: int
    creation_date: int


class VersionView(View, frozen=True, kw_only=True):
    """One version. File names are as pushed; `number` grows from 0 in push order and is never given twice. `vcpu` and
    `ram_mb` are its VMs' size when a start gives none; 0: the hypervisor chooses."""

    tag: str
    number: int
    digest: model.Digest
    size: int
    arch: model.Arch
    creation_date: int
    description: str = ""
    images: list[str] = []
    state_files: list[str] = []
    nvram: str = ""
    config_file: str = ""
    vcpu: int = 0
    ram_mb: int = 0


class TemplateView(TemplateItem, frozen=True, kw_only=True):
    """A template with its versions, oldest first."""

    versions: list[VersionView]


class Resolved(VersionView, frozen=True, kw_only=True):
    """One version together with its template: what a start needs to know (safety S14)."""

    id: model.TemplateId
    name: str


class DiskView(View, frozen=True, kw_only=True):
    """Room in the registry's storage, in bytes; `free` leaves the reserve out."""

    total: int
    free: int


class NameAsk(View, frozen=True, kw_only=True):
    """POST /registry/v2/vm: which template has this name? A new name gets a fresh id, held from then on."""

    name: str


class NameHeld(View, frozen=True, kw_only=True):
    id: model.TemplateId


class RevertAsk(msgspec.Struct):
    """The body of DELETE …/revert. `number` is `version` by its other name; `digest`: only if the version is this
    manifest."""

    id: str = ""
    tag: str = ""
    version: int | str = ""
    number: int | str = ""
    digest: str = ""


class ArchSet(msgspec.Struct):
    """The body of PUT /registry/vm/arch."""

    id: str
    arch: model.Arch


def valid_name(name: str) -> bool:
    """Whether `name` is a repository name by the specification's grammar: no `..`, no leading slash can pass it."""
    return len(name) <= _NAME_LIMIT and _NAME.fullmatch(name) is not None


def valid_tag(tag: str) -> bool:
    return _TAG.fullmatch(tag) is not None


def valid_digest(digest: str) -> bool:
    """Whether `digest` is one this registry keeps: sha256 or sha512 in lower-case hexadecimal."""
    return _DIGEST.fullmatch(digest) is not None


def is_referrers_tag(tag: str) -> bool:
    """Whether a tag is the specification's "referrers tag schema": an index that clients keep where a registry has no
    referrers API. Such an index follows its manifests, it does not hold them."""
    return _REFERRERS_TAG.fullmatch(tag) is not None


def valid_uuid(text: str) -> bool:
    return _UUID.fullmatch(text) is not None


def algorithm_of(digest: str) -> str:
    """The algorithm of a valid digest."""
    return digest.partition(":")[0]


def digest_of(content: bytes, algorithm: str = SHA256) -> model.Digest:
    return model.Digest(f"{algorithm}:{hashlib.new(algorithm, content).hexdigest()}")


def repository_of(template: str) -> str:
    """The OCI repository of a template."""
    return f"templates/{template}"


def template_of(repository: str) -> model.TemplateId | None:
    """The template whose repository this is; None for every other repository."""
    folder, _, name = repository.partition("/")
    return model.TemplateId(name) if folder == "templates" and valid_uuid(name) else None


def check_tag(text: str) -> None:
    """Raises Refused for a tag that no start request could name: controllers take no control characters."""
    if not text:
        raise errors.Refused("a tag needs a name")
    if len(text) > _TEXT_LIMIT:
        raise errors.Refused(f"tag {text[:40]!r}…: a tag has at most {_TEXT_LIMIT} characters")
    if any(ord(character) < 0x20 or ord(character) == 0x7F for character in text):
        raise errors.Refused(f"tag {text!r}: a tag may not contain control characters such as line breaks")


def escape_tag(text: str) -> str:
    """The OCI spelling of a tag of any text; two texts never share one.

    A byte that OCI tags cannot hold becomes ``_xHH``; so does a leading dot or dash, and an underscore before an ``x``
    (or the escapes would be ambiguous). What grows too long ends in ``_xh`` and the SHA-256 of the text.
    """
    if not text:
        raise errors.Refused("a tag needs a name")
    raw = text.encode("utf-8", "surrogatepass")
    spelled: list[str] = []
    for index, byte in enumerate(raw):
        ambiguous = byte == ord("_") and raw[index + 1 : index + 2] == b"x"
        misplaced = index == 0 and byte in b".-"
        spelled.append(f"_x{byte:02X}" if byte not in _PLAIN or ambiguous or misplaced else chr(byte))
    whole = "".join(spelled)
    if len(whole) <= _TAG_LIMIT:
        return whole
    return whole[: _TAG_LIMIT - 67] + "_xh" + hashlib.sha256(raw).hexdigest()


def parse_manifest(content: bytes) -> Manifest:
    """The manifest in `content`. Raises Refused naming the flaw."""
    try:
        raw = msgspec.json.decode(content)
        if isinstance(raw, dict):  # some clients write an empty list as null
            raw = {name: value for name, value in raw.items() if value is not None}
        manifest = msgspec.convert(raw, Manifest)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise errors.Refused(f"the manifest is not valid JSON of a manifest: {error}") from error
    if manifest.schema_version != 2 and manifest.media_type != OCI_ARTIFACT:
        raise errors.Refused(f"schemaVersion is {manifest.schema_version}, this registry takes 2")
    lists = (manifest.layers, manifest.manifests, manifest.blobs, filter(None, (manifest.config, manifest.subject)))
    references = itertools.chain.from_iterable(lists)
    for reference in references:
        if not valid_digest(reference.digest):
            raise errors.Refused(f"digest {reference.digest!r} is not {DIGEST_FORM}")
        if reference.size < 0:
            raise errors.Refused(f"the size of {reference.digest} is negative")
    return manifest


def parse_config(content: bytes) -> TemplateConfig:
    """The template's configuration in `content`, which may come from anywhere. Raises Refused naming the flaw."""
    try:
        return msgspec.json.decode(content, type=TemplateConfig)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise errors.Refused(f"the template's config is not right: {error}") from error
