"""`covey dump`: everything that helps somebody else to understand a cloud, in one file, without secrets.

What cannot be had is left out and named in errors.txt: a dump is made when things are ill. Secrets are kept out twice:
by the names of fields, wherever one is read, and by their values, wherever one that is known here turns up in a text
(settings, session secrets of agents on this host, VNC passwords).
"""

import asyncio
import io
import json as json_codec
import os
import platform
import re
import sys
import tarfile
import time
from collections.abc import Iterable, Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any
from urllib import parse

import typer

import covey
from covey import errors, settings_reader
from covey.cli import flags, out

if TYPE_CHECKING:
    from covey.client import controller as controller_client

HIDDEN = settings_reader.HIDDEN
_TIMEOUT_S = 10.0
_LOG_BYTES = 1 << 20  # of the end of each log
_EXPLAINED = 20  # instances that wait
_LEAST = 4  # shorter secrets are hidden by their names only: their letters stand in any text
_NAMES = re.compile(r"passw|secret|token|credential|host_key|private|authorization|vnc_connection", re.IGNORECASE)
_WROTE = frozenset({"stdout", "stderr", "startup_script_text"})  # what guests wrote may hold anything
_IN_TEXT = re.compile(
    r"""((?:password|passwd|secret|token|host_key|authorization)["']?\s*[:=]\s*["']?)[^"',}\s][^"',}\n]*""",
    re.IGNORECASE,
)

_README = """What `covey dump` found, at {at}, from {host}. Secrets are left out; names and addresses are in it.

controllers/N/     what each controller says of itself: health (with etcd, registries, troubles), readyz, settings
cloud/             from the first that answers: nodes, instances, why the oldest wait, templates, the newest events
host/              of this machine: versions, settings from the environment and the file, ends of the logs in LOG_DIR
errors.txt         what could not be had, and why
"""


def dump(
    file: Annotated[
        Path | None, typer.Argument(metavar="FILE", help="Where to write it; covey-dump-TIME.tar.gz if not given.")
    ] = None,
    controller: flags.Controller = None,
) -> None:
    """Collect everything for support in one .tar.gz, without secrets."""
    path = file or Path(f"covey-dump-{time.strftime('%Y%m%d-%H%M%S')}.tar.gz")
    if path.exists():
        raise errors.Refused(f"{path} exists; name another file")
    found = Found(Hider(known_secrets(os.environ)))
    asyncio.run(_from_cloud(found, controller))
    _from_host(found, os.environ)
    found.text("README.txt", _README.format(at=time.strftime("%Y-%m-%dT%H:%M:%S%z"), host=platform.node()))
    found.text("errors.txt", "\n".join([*found.faults, ""]))
    write(path, found.files)
    for fault in found.faults:
        out.note(f"left out: {fault}")
    out.say(f"{path}  {out.size(path.stat().st_size)}, {len(found.files)} files")


def write(path: Path, files: Mapping[str, bytes]) -> None:
    """Readable by its owner only; after a crash there is the whole file or none of that name."""
    aside = path.with_name(path.name + ".part")
    root = path.name.removesuffix(".tar.gz")
    try:
        handle = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(handle, "wb") as raw, tarfile.open(fileobj=raw, mode="w:gz") as archive:
            for name, content in sorted(files.items()):
                entry = tarfile.TarInfo(f"{root}/{name}")
                entry.size, entry.mtime, entry.mode = len(content), int(time.time()), 0o600
                archive.addfile(entry, io.BytesIO(content))
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


# ---- hiding --------------------------------------------------------------------------------------------------------


class Hider:
    """Replaces what is secret by its name, and what is secret by its value."""

    def __init__(self, secrets: Iterable[str]) -> None:
        self._secrets: set[str] = set()
        self.learn(secrets)

    def learn(self, secrets: Iterable[str]) -> None:
        for secret in secrets:
            if len(secret) >= _LEAST:
                self._secrets |= {secret, json_codec.dumps(secret)[1:-1], parse.quote(secret, safe="")}

    def value(self, value: Any, name: str = "") -> Any:
        """A JSON value without what its names say is secret."""
        if value in ("", None, False) or (isinstance(value, int | float) and not _NAMES.search(name)):
            return value
        if isinstance(value, str) and name == "vnc_connection_string":
            self.learn([parse.unquote(value.partition("://:")[2].rpartition("@")[0])])
        if _NAMES.search(name) or name in _WROTE:
            return HIDDEN
        if isinstance(value, dict):
            if name == "metadata":
                return dict.fromkeys(value, HIDDEN)
            return {key: self.value(inner, key) for key, inner in value.items()}
        if isinstance(value, list):
            return [self.value(inner, name) for inner in value]
        return settings_reader.without_login(value) if isinstance(value, str) else value

    def text(self, text: str) -> str:
        text = _IN_TEXT.sub(rf"\g<1>{HIDDEN}", settings_reader.without_login(text))
        return self.values(text)

    def values(self, text: str) -> str:
        for secret in sorted(self._secrets, key=len, reverse=True):
            text = text.replace(secret, HIDDEN)
        return text


def known_secrets(environ: Mapping[str, str]) -> Iterator[str]:
    """Values that must not appear: of settings, of variables that are named like secrets, of agents on this host."""
    rows, _ = settings_reader.overview(environ)
    known = {row.source for row in rows}
    for name, value in environ.items():
        if name.startswith(("COVEY_", "ANKA_")) and name not in known and _NAMES.search(name):
            yield value
    yield from (row.text for row in rows if row.secret)
    given = next((row.text for row in rows if row.name == "DATA_DIR"), "")
    for folder in filter(None, (given, "/var/lib/covey", os.path.expanduser("~/.local/share/covey"))):
        for path in Path(folder).glob("agent/**/node.json"):
            try:
                identity = json_codec.loads(path.read_text("utf-8"))
            except (OSError, ValueError):
                continue
            yield from (str(identity.get(name, "")) for name in ("secret", "host_key"))
            yield from map(str, identity.get("offered", ()))


class Found:
    """The files of a dump, hidden as they come, and what could not be had."""

    def __init__(self, hider: Hider) -> None:
        self.hider = hider
        self.faults: list[str] = []
        self._texts: dict[str, str] = {}

    def text(self, name: str, text: str) -> None:
        self._texts[name] = self.hider.text(text)

    def json(self, name: str, value: Any) -> Any:
        """Answers with the value as it came."""
        self._texts[name] = json_codec.dumps(self.hider.value(value), indent=1, ensure_ascii=False) + "\n"
        return value

    @property
    def files(self) -> dict[str, bytes]:
        """A secret that was learnt late is looked for in what came early, too."""
        return {name: self.hider.values(text).encode("utf-8", "replace") for name, text in self._texts.items()}


# ---- gathering -----------------------------------------------------------------------------------------------------


async def _from_cloud(found: Found, controllers: str | None) -> None:
    from covey import world
    from covey.client import controller as controller_client

    try:
        cloud = flags.connect(controllers)
    except errors.CoveyError as error:
        found.faults.append(f"controllers: {error}")
        return
    async with cloud:
        for number, url in enumerate(cloud.endpoints.urls, 1):
            async with controller_client.Controller((url,), world.System(), timeout_s=_TIMEOUT_S) as one:
                for name in ("health", "settings"):
                    await _get(found, one, f"controllers/{number}/{name}.json", f"/api/v1/{name}", url)
                await _get(found, one, f"controllers/{number}/readyz.json", "/readyz", url)
        parts = {
            "status": "/api/v1/status",
            "nodes": "/api/v1/node",
            "instances": "/api/v1/vm",
            "templates": "/api/v1/registry/vm",
            "events": "/api/v1/events?limit=1000",
        }
        for name, path in parts.items():
            await _get(found, cloud, f"cloud/{name}.json", path)
        await _explain(found, cloud)


async def _get(found: Found, cloud: "controller_client.Controller", name: str, path: str, where: str = "") -> Any:
    """One answer of the API, kept; None when there was none."""
    try:
        _, raw = await cloud.endpoints.call("GET", path)
        return found.json(name, json_codec.loads(raw)).get("body")
    except (errors.CoveyError, ValueError, AttributeError) as error:
        found.faults.append(f"{name}: {error}" if not where else f"{name} ({where}): {error}")
        return None


async def _explain(found: Found, cloud: "controller_client.Controller") -> None:
    """Why those wait that have waited longest."""
    path = f"/api/v1/vm?state=Scheduling,Pulling&limit={_EXPLAINED}"
    waiting = await _get(found, cloud, "cloud/waiting.json", path)
    for one in waiting if isinstance(waiting, list) else ():
        id = str(one.get("instance_id", ""))
        if not one.get("vm", {}).get("node_id"):
            await _get(found, cloud, f"cloud/explain/{parse.quote(id, safe='')}.json", f"/api/v1/vm/explain?id={id}")


def _from_host(found: Found, environ: Mapping[str, str]) -> None:
    packages = sorted({(item.name, item.version) for item in metadata.distributions()})
    found.json(
        "host/versions.json",
        {
            "covey": covey.__version__,
            "python": sys.version,
            "system": platform.platform(),
            "packages": dict(packages),
        },
    )
    rows, notices = settings_reader.overview(environ)
    shown = [{"setting": row.name, "value": HIDDEN if row.secret else row.text, "from": row.source} for row in rows]
    found.json("host/settings.json", {"set": shown, "notices": notices})
    for row in rows:
        if row.name == "LOG_DIR":
            for path in sorted(Path(row.text).glob("covey-*.log")):
                try:
                    found.text(f"host/logs/{path.name}", tail(path))
                except OSError as error:
                    found.faults.append(f"host/logs/{path.name}: {error.strerror}")


def tail(path: Path) -> str:
    """The end of a log, from the beginning of a line on."""
    with path.open("rb") as stream:
        size = stream.seek(0, os.SEEK_END)
        stream.seek(max(0, size - _LOG_BYTES))
        content = stream.read()
    whole = content if size <= _LOG_BYTES else content.partition(b"\n")[2]
    return whole.decode("utf-8", "replace")


def add(app: typer.Typer) -> None:
    app.command()(dump)
