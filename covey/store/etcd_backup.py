"""Backups: taken from a running cluster, proved, and put back (safety S18).

    take      snapshot aside → prove digest and tree → rename → a new history nonce
    restore   prove → `etcdctl snapshot restore` aside, with a cluster token never used before → rename

The nonce right after a backup is not in it: whoever has seen that nonce finds out at once when the store is restored.
The new token gives the restored cluster another id, so that no member of the old one joins it by mistake, and so that
the first controller that looks enters the break.
"""

import asyncio
import contextlib
import os
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from covey import durable, errors
from covey import world as worlds
from covey.store import commit, commit_cloud, etcd, etcd_file, etcd_flags, schema

_TOOL_S = 600.0


class Taken(NamedTuple):
    """A backup that is on disk and proved. `trouble`: why no nonce was written after it; "" when one was."""

    content: etcd_file.Content
    took_s: float
    trouble: str = ""


async def take(store: etcd.Etcd, path: Path, world: worlds.World, who: str) -> Taken:
    """Write a backup to `path`, which is replaced; after a crash it is the old file, none, or the new one whole. Raises
    Unavailable, Damaged, OSError."""
    begun_ns = world.boot_ns()
    aside = path.with_name(f".{path.name}.unproved")
    try:
        await store.admin.snapshot(aside)
        content = await asyncio.to_thread(etcd_file.read, aside)
        await asyncio.to_thread(_put, aside, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            aside.unlink()
    trouble = await _note(store, world, who)
    return Taken(content, (world.boot_ns() - begun_ns) / 1e9, trouble)


def _put(aside: Path, path: Path) -> None:
    aside.chmod(0o600)
    aside.replace(path)
    durable.sync_dir(path.parent)


async def _note(store: etcd.Etcd, world: worlds.World, who: str) -> str:
    """Lengthen the history chain, if it is a Covey store; why not."""
    if not (await store.range(schema.FORMAT_KEY)).kvs:
        return ""
    writer = commit.Writer(store, world, who=who)
    try:
        await commit_cloud.add_nonce(writer)
    except errors.StoreError as error:
        return f"no history nonce could be written after it ({error}); a restore of it is found out all the same"
    finally:
        await writer.close()
    return ""


# ---- putting it back -----------------------------------------------------------------------------------------------


class Place(NamedTuple):
    """Where one member of the restored cluster is to be. `members`: name → peer URL of all."""

    name: str
    members: Mapping[str, str]
    data_dir: Path
    token: str


def restore(path: Path, place: Place, etcd_binary: str) -> etcd_file.Content:
    """Make a member's data directory from a backup. Blocking. Raises SettingError, Damaged, OSError."""
    check_place(place)
    content = etcd_file.read(path)
    tool = _tool(etcd_binary)
    aside = place.data_dir.with_name(f".{place.data_dir.name}.restored")
    shutil.rmtree(aside, ignore_errors=True)
    place.data_dir.parent.mkdir(parents=True, exist_ok=True)
    try:
        _run(tool, path, place, aside)
        with contextlib.suppress(FileNotFoundError):
            place.data_dir.rmdir()
        aside.rename(place.data_dir)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    durable.replace(fresh_mark(place.data_dir), place.token.encode())
    durable.sync_dir(place.data_dir.parent)
    return content


def check_place(place: Place) -> None:
    """Raises SettingError when the member cannot be made there."""
    if place.name not in place.members:
        raise errors.SettingError(f"--name {place.name} is not among --members {', '.join(place.members)}")
    if place.token == etcd_flags.TOKEN:
        raise errors.SettingError(
            f"--token {place.token} is the name of every new cluster: leave --token out, and a new one is made"
        )
    if place.data_dir.exists() and (not place.data_dir.is_dir() or any(place.data_dir.iterdir())):
        raise errors.SettingError(
            f"{place.data_dir} is not empty: stop etcd there and move it away first (mv {place.data_dir}"
            f" {place.data_dir}.old); nothing was changed"
        )


def fresh_mark(data_dir: Path) -> Path:
    """A file beside a data directory that was just restored: `covey etcd bootstrap` writes the nonce and removes it."""
    return data_dir.with_name(f".{data_dir.name}.new-history")


def _tool(etcd_binary: str) -> list[str]:
    """etcdutl or etcdctl, beside etcd or on the PATH. Newer releases of etcd restore with etcdutl only."""
    for name in ("etcdutl", "etcdctl"):
        beside = Path(etcd_binary).with_name(name) if "/" in etcd_binary else None
        found = str(beside) if beside is not None and os.access(beside, os.X_OK) else shutil.which(name)
        if found:
            return [found]
    raise errors.SettingError(
        "neither etcdutl nor etcdctl is installed, one of which makes a data directory from a backup: install it"
        " (Debian: apt-get install etcd-client), or name the etcd beside it in COVEY_ETCD_BINARY"
    )


def _run(tool: list[str], path: Path, place: Place, data_dir: Path) -> None:
    options = {
        "name": place.name,
        "data-dir": str(data_dir),
        "initial-cluster": ",".join(f"{name}={url}" for name, url in place.members.items()),
        "initial-cluster-token": place.token,
        "initial-advertise-peer-urls": place.members[place.name],
    }
    command = [*tool, "snapshot", "restore", str(path), *(f"--{name}={value}" for name, value in options.items())]
    environ = {name: value for name, value in os.environ.items() if not name.startswith(("ETCD_", "ETCDCTL_"))}
    done = subprocess.run(
        command, env={**environ, "ETCDCTL_API": "3"}, capture_output=True, text=True, timeout=_TOOL_S, check=False
    )
    if done.returncode:
        last = (done.stderr.strip() or done.stdout.strip()).splitlines()
        raise etcd_file.Damaged(f"{path} could not be restored: {last[-1] if last else 'etcdctl failed'}")
