"""What a qcow2 file says of itself, read without QEMU, and whether that may become a layer.

A qcow2 header can name other files: a backing file, an external data file. QEMU opens whatever is named there, so a
layer from elsewhere could show a guest any file of the host that QEMU may read. Covey therefore believes no header:
the VM is started with every layer spelled out (`qemu_process`), and layers whose header names anything but the layer
below are refused, when pushed and again before use.

The format is QEMU's docs/interop/qcow2.txt.
"""

import struct
from collections.abc import Collection, Sequence
from pathlib import Path

from covey import errors, model

MAX_VIRTUAL_BYTES = 8 << 40

_MAGIC = b"QFI\xfb"
_FIXED = struct.Struct(">4sIQIIQIIQQIIQ")  # version 2, 72 bytes
_VERSION_3 = struct.Struct(">QQQII")  # incompatible, compatible, autoclear features, refcount order, header length
_EXTENSION = struct.Struct(">II")
_END, _BACKING_FORMAT, _DATA_FILE, _ENCRYPTION = 0, 0xE2792ACA, 0x44415441, 0x0537BE77
_DIRTY, _CORRUPT, _EXTERNAL_DATA, _COMPRESSION, _LONG_L2 = 1, 2, 4, 8, 16
_MAX_NAME_BYTES = 1023
_HEAD_BYTES = 2 << 20  # header, extensions and name lie within the first cluster, which is at most 2 MiB


class Header(model.Noun, frozen=True, kw_only=True):
    """What matters of a header. `backing` is the name as written, "" when there is none."""

    version: int
    virtual_bytes: int
    backing: str = ""
    backing_format: str = ""
    encrypted: bool = False
    data_file: bool = False
    damaged: bool = False
    unknown_features: bool = False


def read_header(path: Path) -> Header:
    """Read the header of `path`. Raises Refused when it is not a qcow2 image that can be understood."""
    with path.open("rb") as file:
        head = file.read(_HEAD_BYTES)
    if not head.startswith(_MAGIC):
        raise errors.Refused(
            f"{path.name}: not a qcow2 image; convert it with: qemu-img convert -O qcow2 {path.name} new.qcow2"
        )
    if len(head) < _FIXED.size:
        raise errors.Refused(f"{path.name}: the qcow2 header is cut short; export the disk anew")
    try:
        return _parse(head)
    except (struct.error, ValueError) as fault:
        raise errors.Refused(f"{path.name}: the qcow2 header is broken ({fault}); export the disk anew") from fault


def check_layer(
    path: Path, below: Collection[str] | None, *, title: str = "", max_virtual_bytes: int = MAX_VIRTUAL_BYTES
) -> Header:
    """Refuse `path` unless it may lie on the layer below.

    `below`: the names by which the header may call the layer below, empty for the base, None when its name is not
    known here: then any plain file name will do, as it is not believed anyway.
    """
    header, name = read_header(path), title or path.name
    if header.data_file:
        raise errors.Refused(f"{name}: data-file: the image keeps its data in another file; flatten it with {_FLATTEN}")
    if header.encrypted:
        raise errors.Refused(f"{name}: encryption: encrypted images cannot be layers; decrypt it with {_FLATTEN}")
    if header.unknown_features:
        raise errors.Refused(f"{name}: incompatible features: made by a newer QEMU; rewrite it with {_FLATTEN}")
    if header.damaged:
        raise errors.Refused(f"{name}: marked dirty or corrupt; repair it with: qemu-img check -r all {name}")
    if not 0 < header.virtual_bytes <= max_virtual_bytes:
        raise errors.Refused(
            f"{name}: virtual size: {header.virtual_bytes} bytes, allowed are 1 to {max_virtual_bytes}; "
            f"shrink it with: qemu-img resize --shrink"
        )
    _check_backing(header, below, name)
    return header


def check_chain(layers: Sequence[Path], titles: Sequence[str] = ()) -> Header:
    """Check layers, base first; answers with the top one's header. `titles`: the layers' names, when they are known."""
    if not layers:
        raise errors.Refused("disk layers: none given; a template needs at least one qcow2 layer")
    header = None
    for number, path in enumerate(layers):
        below: Collection[str] | None = () if number == 0 else None
        if titles and number > 0:
            below = {titles[number - 1], Path(titles[number - 1]).name}
        header = check_layer(path, below, title=titles[number] if titles else "")
    assert header is not None  # noqa: S101  there is at least one layer
    return header


def check_files(files: Sequence[Path]) -> None:
    """Check files about to become a template's layers, base first. Other formats are other hypervisors' and pass."""
    for number, path in enumerate(files):
        with path.open("rb") as file:
            ours = file.read(len(_MAGIC)) == _MAGIC
        if ours:
            check_layer(path, {files[number - 1].name} if number else ())


_FLATTEN = "qemu-img convert -O qcow2"


def _check_backing(header: Header, below: Collection[str] | None, name: str) -> None:
    if not header.backing:
        return
    if below is not None and not below:
        raise errors.Refused(
            f"{name}: backing file: the header names {header.backing!r}, but a base layer may have none; "
            f"give the layer below first, or flatten it with {_FLATTEN}"
        )
    plain = "/" not in header.backing and ":" not in header.backing and header.backing not in (".", "..")
    if (below is None and not plain) or (below is not None and header.backing not in below):
        expected = (
            f"only {' or '.join(sorted(below))}, the layer below, may be named"
            if below
            else "and only a plain file name may stand there"
        )
        raise errors.Refused(
            f"{name}: backing file: the header names the foreign file {header.backing!r}, {expected}; "
            f"set it with: qemu-img rebase -u -F qcow2 -b LAYER_BELOW {name}"
        )
    if header.backing_format not in ("", "qcow2"):
        raise errors.Refused(
            f"{name}: backing format: {header.backing_format!r} must be qcow2; "
            f"set it with: qemu-img rebase -u -F qcow2 -b {header.backing} {name}"
        )


def _parse(head: bytes) -> Header:
    fields = _FIXED.unpack_from(head)
    version, name_at, name_bytes, cluster_bits, virtual_bytes, crypt_method = fields[1:7]
    if version not in (2, 3):
        raise ValueError(f"version {version}")
    if not 9 <= cluster_bits <= 21:
        raise ValueError(f"cluster bits {cluster_bits}")
    features, length = 0, _FIXED.size
    if version == 3:
        features, _, _, _, length = _VERSION_3.unpack_from(head, _FIXED.size)
        if not 104 <= length <= 1 << cluster_bits:
            raise ValueError(f"header length {length}")
    extensions = _extensions(head, length, name_at or 1 << cluster_bits)
    known = _DIRTY | _CORRUPT | _EXTERNAL_DATA | _COMPRESSION | _LONG_L2
    return Header(
        version=version,
        virtual_bytes=virtual_bytes,
        backing=_name(head, name_at, name_bytes),
        backing_format=extensions.get(_BACKING_FORMAT, b"").decode("utf-8", "replace"),
        encrypted=crypt_method != 0 or _ENCRYPTION in extensions,
        data_file=bool(features & _EXTERNAL_DATA) or _DATA_FILE in extensions,
        damaged=bool(features & (_DIRTY | _CORRUPT)),
        unknown_features=bool(features & ~known),
    )


def _name(head: bytes, at: int, length: int) -> str:
    if at == 0:
        return ""
    if not 0 < length <= _MAX_NAME_BYTES or at + length > len(head):
        raise ValueError("backing file name out of bounds")
    return head[at : at + length].decode("utf-8", "replace")


def _extensions(head: bytes, at: int, end: int) -> dict[int, bytes]:
    """Header extensions: type, length, data padded to eight bytes, ended by type 0 or by the backing file's name."""
    found: dict[int, bytes] = {}
    while at + _EXTENSION.size <= min(end, len(head)):
        kind, length = _EXTENSION.unpack_from(head, at)
        at += _EXTENSION.size
        if kind == _END:
            break
        if at + length > min(end, len(head)):
            raise ValueError("header extension out of bounds")
        found[kind] = head[at : at + length]
        at += length + -length % 8
    return found
