"""The few file operations that crash safety rests on. Blocking: run them in a worker thread.

A name is made in this order: bytes written aside → fsync → link() → fsync of the folder. So a crash leaves the whole
file under its name or nothing, and of two processes that make one name exactly one succeeds.
"""

import contextlib
import errno
import os
from pathlib import Path

Bytes = bytes | bytearray | memoryview

_IOV_LIMIT = 1024  # Linux and macOS take no more pieces in one call
NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


def make_dirs(path: Path, *, fsync: bool) -> None:
    """Make `path` and what is missing above it, durable from the first folder that existed."""
    if path.is_dir():
        return
    make_dirs(path.parent, fsync=fsync)
    path.mkdir(exist_ok=True)
    sync_dir(path.parent, fsync=fsync)


def sync_dir(path: Path, *, fsync: bool) -> None:
    """Make the names in a folder durable."""
    if not fsync:
        return
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_new(path: Path, content: bytes, *, fsync: bool) -> None:
    """Write a file that must not exist. On any fault nothing stays behind."""
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o444)
    try:
        write_all(handle, content)
        if fsync:
            os.fsync(handle)
    except OSError:
        discard(path)
        raise
    finally:
        os.close(handle)


def write_all(handle: int, *pieces: Bytes) -> None:
    """Write all pieces without joining them, however often the system takes less."""
    views = [memoryview(piece) for piece in pieces if piece]
    while views:
        taken = os.writev(handle, views[:_IOV_LIMIT])
        while views and taken >= len(views[0]):
            taken -= len(views.pop(0))
        if taken:
            views[0] = views[0][taken:]


def link_new(source: Path, target: Path, *, fsync: bool) -> bool:
    """Give the file `source` the name `target` as well, durably. False when the name is taken."""
    try:
        os.link(source, target)
    except FileExistsError:
        return False
    sync_dir(target.parent, fsync=fsync)
    return True


def discard(path: Path) -> None:
    """Remove a file if it is there."""
    with contextlib.suppress(FileNotFoundError):
        path.unlink()
