"""Headers, byte by byte: what is read, what is refused, and that the refusal names field and remedy."""

import struct
from collections.abc import Collection
from pathlib import Path
from typing import Any

import pytest

from covey import errors
from covey.agent import qcow2

GIB = 1 << 30
BACKING_FORMAT, DATA_FILE, ENCRYPTION = 0xE2792ACA, 0x44415441, 0x0537BE77


def write(
    path: Path,
    *,
    version: int = 3,
    backing: str = "",
    size: int = GIB,
    crypt: int = 0,
    features: int = 0,
    cluster_bits: int = 16,
    extensions: dict[int, bytes] | None = None,
) -> Path:
    """A file that begins as QEMU's docs/interop/qcow2.txt says."""
    body = b"".join(
        struct.pack(">II", kind, len(data)) + data + b"\0" * (-len(data) % 8)
        for kind, data in (extensions or {}).items()
    ) + struct.pack(">II", 0, 0)
    length = 104 if version == 3 else 72
    name = backing.encode()
    at = length + len(body) if name else 0
    head = struct.pack(
        ">4sIQIIQIIQQIIQ", b"QFI\xfb", version, at, len(name), cluster_bits, size, crypt, 0, 0, 0, 0, 0, 0
    )
    if version == 3:
        head += struct.pack(">QQQII", features, 0, 0, 4, length)
    path.write_bytes(head + body + name)
    return path


@pytest.mark.parametrize("version", [2, 3])
def test_reads_what_is_written(tmp_path: Path, version: int) -> None:
    path = write(tmp_path / "top.qcow2", version=version, backing="base.qcow2", extensions={BACKING_FORMAT: b"qcow2"})
    header = qcow2.read_header(path)
    assert (header.version, header.virtual_bytes, header.backing, header.backing_format) == (
        version,
        GIB,
        "base.qcow2",
        "qcow2",
    )


@pytest.mark.parametrize(
    ("header", "said"),
    [
        ({"crypt": 2}, "encryption"),
        ({"extensions": {ENCRYPTION: b"\0" * 16}}, "encryption"),
        ({"features": 4}, "data-file"),
        ({"extensions": {DATA_FILE: b"/etc/shadow"}}, "data-file"),
        ({"features": 1}, "dirty or corrupt"),
        ({"features": 2}, "dirty or corrupt"),
        ({"features": 1 << 40}, "newer QEMU"),
        ({"size": 1 << 62}, "virtual size"),
        ({"size": 0}, "virtual size"),
        ({"cluster_bits": 60}, "header is broken"),
        ({"version": 9}, "header is broken"),
        ({"backing": "base.qcow2", "extensions": {BACKING_FORMAT: b"raw"}}, "backing format"),
        ({"backing": "/etc/passwd"}, "backing file"),
        ({"backing": "json:{}"}, "backing file"),
        ({"backing": "nbd://10.0.0.1/x"}, "backing file"),
        ({"backing": "../base.qcow2"}, "backing file"),
        ({"backing": "x" * 2000}, "out of bounds"),
    ],
)
def test_refuses(tmp_path: Path, header: dict[str, Any], said: str) -> None:
    path = write(tmp_path / "layer.qcow2", **header)
    with pytest.raises(errors.Refused, match=f"^layer.qcow2: .*{said}"):
        qcow2.check_layer(path, {"base.qcow2"})


@pytest.mark.parametrize(
    ("backing", "below", "passes"),
    [
        ("", (), True),
        ("", ("base.qcow2",), True),  # the chain is spelled out anyway
        ("base.qcow2", ("base.qcow2",), True),
        ("base.qcow2", (), False),
        ("other.qcow2", ("base.qcow2",), False),
        ("any-name", None, True),
        ("/any/path", None, False),
        ("..", None, False),
    ],
)
def test_backing_names(tmp_path: Path, backing: str, below: Collection[str] | None, passes: bool) -> None:
    path = write(tmp_path / "layer.qcow2", backing=backing)
    if passes:
        assert qcow2.check_layer(path, below).backing == backing
    else:
        with pytest.raises(errors.Refused, match="backing file"):
            qcow2.check_layer(path, below)


def test_no_qcow2_at_all(tmp_path: Path) -> None:
    (tmp_path / "disk.img").write_bytes(b"\0" * 512)
    with pytest.raises(errors.Refused, match=r"disk\.img: not a qcow2 image; convert it with: qemu-img convert"):
        qcow2.read_header(tmp_path / "disk.img")
    with pytest.raises(errors.Refused, match="at least one"):
        qcow2.check_chain([])


def test_every_truncation_is_refused_or_understood(tmp_path: Path) -> None:
    whole = write(tmp_path / "a", backing="base.qcow2", extensions={BACKING_FORMAT: b"qcow2"}).read_bytes()
    for length in range(len(whole)):
        (tmp_path / "cut").write_bytes(whole[:length])
        with pytest.raises(errors.Refused):
            qcow2.read_header(tmp_path / "cut")


def test_files_to_be_pushed(tmp_path: Path) -> None:
    base = write(tmp_path / "base.qcow2")
    top = write(tmp_path / "top.qcow2", backing="base.qcow2", extensions={BACKING_FORMAT: b"qcow2"})
    (tmp_path / "small").write_bytes(b"not for QEMU")
    for files in ([base], [base, top], [tmp_path / "small"], []):
        qcow2.check_files(files)
    for files in ([top], [top, base], [base, write(tmp_path / "evil.qcow2", backing="/etc/passwd")]):
        with pytest.raises(errors.Refused, match="backing file"):
            qcow2.check_files(files)
