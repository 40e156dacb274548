"""The few file operations that crash safety rests on. Blocking: run them in a worker thread where it matters.

    a file is replaced   bytes written aside → fsync → rename → fsync of the folder
    a name is made       bytes written aside → fsync → link → fsync of the folder

After a crash a reader sees the old content or the new one, the whole file or none, never a mixture; and of two
processes that make one name exactly one succeeds. What a torn replacement leaves is a ``.tmp`` file, which `sweep`
removes. With `fsync` False all this holds when the process dies, but not the host.
"""

import contextlib
import ctypes
import errno
import fcntl
import os
from pathlib import Path
from typing import TypeVar

import msgspec

from covey import observe

T = TypeVar("T")
Bytes = bytes | bytearray | memoryview

_EXCHANGE = 2  # RENAME_EXCHANGE of linux/fs.h
_AT_FDCWD = -100  # linux/fcntl.h
_IOV_LIMIT = 1024  # Linux and macOS take no more pieces in one call
NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})

_log = observe.log("files")


# ---- folders and locks ---------------------------------------------------------------------------------------------


def make_dirs(path: Path, *, fsync: bool = True) -> None:
    """Make `path` and what is missing above it, durable from the first folder that existed."""
    if path.is_dir():
        return
    make_dirs(path.parent, fsync=fsync)
    path.mkdir(exist_ok=True)
    sync_dir(path.parent, fsync=fsync)


def sync_dir(path: Path, *, fsync: bool = True) -> None:
    """Make creations, renames and removals in a folder durable."""
    if not fsync:
        return
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def lock(path: Path) -> int:
    """Lock `path`, which is made if need be: an open file, to be closed; when the process dies, the kernel does that.
    Raises BlockingIOError when somebody else holds the lock, other OSErrors when the file cannot be had."""
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(handle)
        raise
    return handle


def exchange(one: Path, other: Path, *, fsync: bool = True) -> None:
    """Let two names of one file system change places in one step, durably (Linux 3.15: renameat2). Raises OSError where
    the file system cannot do that, and then nothing has changed."""
    names = (os.fsencode(one), os.fsencode(other))
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "renameat2"):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS), str(one), None, str(other))
    if libc.renameat2(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _EXCHANGE) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), str(one), None, str(other))
    for folder in {one.parent, other.parent}:
        sync_dir(folder, fsync=fsync)


# ---- files that are replaced ---------------------------------------------------------------------------------------


def replace(path: Path, content: bytes, *, mode: int = 0o600, fsync: bool = True) -> None:
    """Replace `path`. Raises OSError (disk full), and then nothing has changed."""
    aside = path.with_name(path.name + ".tmp")
    try:
        _write(aside, content, os.O_TRUNC, mode, fsync=fsync)
        aside.rename(path)
    except OSError:
        discard(aside)
        raise
    sync_dir(path.parent, fsync=fsync)


def write(path: Path, value: msgspec.Struct, *, mode: int = 0o600, fsync: bool = True) -> None:
    """Replace `path` by `value` as JSON."""
    replace(path, msgspec.json.encode(value), mode=mode, fsync=fsync)


def read(path: Path, kind: type[T]) -> T | None:
    """The value in `path`; None when there is none, or none that can be used: such a file (a disk lied) is set aside
    as ``.corrupt`` and logged."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return None
    try:
        return msgspec.json.decode(content, type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        path.rename(aside(path))
        _log.error("a file is damaged and was set aside", path=str(path), aside=str(aside(path)), error=str(error))
        return None


def aside(path: Path) -> Path:
    """Where `read` puts what was in `path`, if it cannot be used."""
    return path.with_name(path.name + ".corrupt")


def remove(path: Path, *, fsync: bool = True) -> None:
    """Remove `path` durably; harmless when it is not there."""
    with contextlib.suppress(FileNotFoundError):
        path.unlink()
        sync_dir(path.parent, fsync=fsync)


def sweep(directory: Path) -> None:
    """Remove what torn replacements left in `directory`."""
    for path in directory.glob("*.tmp"):
        discard(path)


# ---- files whose name is made once ---------------------------------------------------------------------------------


def write_new(path: Path, content: bytes, *, fsync: bool = True) -> None:
    """Write a read-only file that must not exist. On any fault nothing of ours stays behind."""
    try:
        _write(path, content, os.O_EXCL, 0o444, fsync=fsync)
    except FileExistsError:
        raise
    except OSError:
        discard(path)
        raise


def link_new(source: Path, target: Path, *, fsync: bool = True) -> bool:
    """Give the file `source` the name `target` as well. False when the name is taken; it is durable then too, whoever
    took it and has perhaps died before he made it so."""
    try:
        os.link(source, target)
        ours = True
    except FileExistsError:
        ours = False
    sync_dir(target.parent, fsync=fsync)
    return ours


def discard(path: Path) -> None:
    """Remove a file if it is there."""
    with contextlib.suppress(FileNotFoundError):
        path.unlink()


def write_all(handle: int, *pieces: Bytes) -> None:
    """Write all pieces without joining them, however often the system takes less."""
    views = [memoryview(piece) for piece in pieces if piece]
    while views:
        taken = os.writev(handle, views[:_IOV_LIMIT])
        while views and taken >= len(views[0]):
            taken -= len(views.pop(0))
        if taken:
            views[0] = views[0][taken:]


def _write(path: Path, content: bytes, flags: int, mode: int, *, fsync: bool) -> None:
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | flags, mode)
    try:
        write_all(handle, content)
        if fsync:
            os.fsync(handle)
    finally:
        os.close(handle)
