"""A cpio archive in the "newc" form, as Linux reads an initial RAM file system.

Written here because it is twenty lines and saves a tool on the host. The form is the kernel's
Documentation/driver-api/early-userspace/buffer-format.rst: a header of 13 fields of eight hexadecimal digits after the
magic, the name, the bytes, each padded to four.
"""

import stat
from collections.abc import Iterator
from pathlib import Path

_TRAILER = "TRAILER!!!"


def pack(root: Path) -> bytes:
    """Everything below `root`, owned by root, in a fixed order, without times: the same tree gives the same bytes."""
    parts: list[bytes] = []
    for number, path in enumerate(sorted(root.rglob("*")), start=1):
        mode = path.lstat().st_mode
        parts.extend(_entry(number, str(path.relative_to(root)), mode, _content(path, mode)))
    parts.extend(_entry(0, _TRAILER, 0, b""))
    return b"".join(parts)


def _content(path: Path, mode: int) -> bytes:
    if stat.S_ISLNK(mode):
        return str(path.readlink()).encode()
    return path.read_bytes() if stat.S_ISREG(mode) else b""


def _entry(number: int, name: str, mode: int, content: bytes) -> Iterator[bytes]:
    raw_name = name.encode() + b"\0"
    # inode, mode, uid, gid, links, mtime, size, device major and minor, special major and minor, name size, checksum
    fields = (number, mode, 0, 0, 1, 0, len(content), 0, 0, 0, 0, len(raw_name), 0)
    yield _padded(b"070701" + b"".join(b"%08X" % field for field in fields) + raw_name)
    yield _padded(content)


def _padded(data: bytes) -> bytes:
    return data + b"\0" * (-len(data) % 4)
