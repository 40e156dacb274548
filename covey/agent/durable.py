"""Files that survive a crash: written aside, fsynced, renamed into place, and the directory fsynced.

A reader sees the old content or the new one, never a mixture. What is left of a torn write is a ``.tmp`` file, which
`sweep` removes. A file that cannot be read or decoded (a disk that lied) is set aside as ``.corrupt`` and logged: the
agent goes on with what the system itself shows.
"""

import contextlib
import os
from pathlib import Path
from typing import TypeVar

import msgspec

from covey import observe

T = TypeVar("T")
_log = observe.log("agent")


def write(path: Path, value: msgspec.Struct, *, mode: int = 0o600, sync: bool = True) -> None:
    """Replace `path` by `value` as JSON; durable when it returns. Raises OSError (disk full). Without `sync` it
    survives this process, but not the host."""
    aside = path.with_name(path.name + ".tmp")
    descriptor = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, mode)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(msgspec.json.encode(value))
            file.flush()
            if sync:
                os.fsync(file.fileno())
        aside.rename(path)
    except OSError:
        aside.unlink(missing_ok=True)
        raise
    if sync:
        sync_directory(path.parent)


def read(path: Path, kind: type[T]) -> T | None:
    """The value in `path`; None when there is none, or none that can be used."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return None
    try:
        return msgspec.json.decode(content, type=kind)
    except msgspec.MsgspecError as error:
        aside = path.with_name(path.name + ".corrupt")
        path.rename(aside)
        _log.error("a file is damaged and was set aside", path=str(path), aside=str(aside), error=str(error))
        return None


def remove(path: Path, *, sync: bool = True) -> None:
    """Remove `path` durably; harmless when it is not there."""
    with contextlib.suppress(FileNotFoundError):
        path.unlink()
        if sync:
            sync_directory(path.parent)


def sync_directory(path: Path) -> None:
    """Make creations, renames and removals in `path` durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sweep(directory: Path) -> None:
    """Remove what torn writes left in `directory`."""
    for path in directory.glob("*.tmp"):
        path.unlink(missing_ok=True)
