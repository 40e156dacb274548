"""`covey status`: is the cloud well, in a few lines, and what is to be done where it is not.

What it shows comes from one controller (`GET /api/v1/health`): from one that is ready if there is one, else from one
that is red, which tells what it knew last. That each of the controllers named here answers is looked at from here.
"""

import asyncio
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import msgspec
import typer

from covey import errors
from covey.cli import flags, out
from covey.decide import troubles

if TYPE_CHECKING:
    from covey.client import controller as controller_client

_TIMEOUT_S = 5.0


class Reached(msgspec.Struct, frozen=True, kw_only=True):
    """One controller from here. `ready` "" means that it serves; `health` is None when it did not tell."""

    url: str
    ready: str
    answers: bool
    health: troubles.Health | None = None


class Told(msgspec.Struct, frozen=True, kw_only=True):
    """What --json shows. `reached`: each controller named, and how it is; `versions`: of those that told."""

    reached: dict[str, str]
    versions: dict[str, str]
    health: troubles.Health


def status(controller: flags.Controller = None, json: flags.Json = False) -> int:
    """Show how the cloud is: one line for each trouble, with its remedy. Ends with 1 when there is any."""
    told = asyncio.run(look(controller))
    if json:
        out.as_json(told)
    else:
        for name, text in lines(told):
            out.say(f"{name:<11} {text}")
    return 1 if told.health.troubles else 0


async def look(controllers: str | None) -> Told:
    """Raises RemoteError when no controller tells anything."""
    from covey import world
    from covey.client import controller as controller_client

    async with flags.connect(controllers) as cloud:
        urls = cloud.endpoints.urls

    async def one(url: str) -> Reached:
        made = controller_client.Controller((url,), world.System(), timeout_s=_TIMEOUT_S, ca_cert=flags.trusted())
        async with made as client:
            return await _reach(client, url)

    return told(await asyncio.gather(*map(one, urls)))


async def _reach(client: "controller_client.Controller", url: str) -> Reached:
    ready, answers = "", True
    try:
        code, raw = await client.endpoints.call("GET", "/readyz")
        ready = "" if code == 200 else _message(raw) or f"HTTP {code}"
    except errors.RemoteError as error:
        ready, answers = str(error).removeprefix(f"{url}: "), error.status != 0
    if not answers:
        return Reached(url=url, ready=ready, answers=False)
    try:
        return Reached(url=url, ready=ready, answers=True, health=await client.health())
    except errors.CoveyError as error:
        return Reached(url=url, ready=ready or f"does not tell its health: {error}", answers=True)


def _message(raw: bytes) -> str:
    try:
        return msgspec.json.decode(raw, type=dict[str, object]).get("message") or ""  # type: ignore[return-value]
    except msgspec.MsgspecError:
        return ""


def told(reached: Sequence[Reached]) -> Told:
    """The word of the best that could be reached, with what is seen from here."""
    telling = [one for one in reached if one.health is not None]
    best = next((one for one in telling if not one.ready), telling[0] if telling else None)
    if best is None or best.health is None:
        what = "no controller tells how it is" if any(one.answers for one in reached) else "no controller answers"
        raise errors.RemoteError(f"{what}: " + "; ".join(f"{one.url}: {one.ready}" for one in reached))
    seen = [trouble for one in reached if one is not best for trouble in _from_here(one)]
    health = msgspec.structs.replace(best.health, troubles=[*seen, *best.health.troubles])
    return Told(
        reached={one.url: one.ready or "ready" for one in reached},
        versions={one.url: one.health.version for one in reached if one.health is not None},
        health=health,
    )


def _from_here(one: Reached) -> Iterator[troubles.Trouble]:
    if not one.answers:
        yield troubles.Trouble(
            kind=troubles.Kind.CONTROLLER_SILENT,
            about=one.url,
            text=f"controller {one.url} does not answer ({one.ready})",
            remedy="start it (covey controller); the others serve meanwhile",
        )
    elif one.ready:
        yield troubles.Trouble(
            kind=troubles.Kind.CONTROLLER_RED,
            about=one.url,
            text=f"controller {one.url} cannot serve: {one.ready}",
            remedy="mend what it names: it is green again by itself; the others serve meanwhile",
        )


# ---- for people ----------------------------------------------------------------------------------------------------


def lines(told: Told) -> Iterator[tuple[str, str]]:
    health = told.health
    yield from (("controller", text) for text in _controllers(told))
    if health.etcd:
        yield "etcd", _etcd(health)
    for one in health.registries:
        room = f"{out.size(one.free_bytes)} of {out.size(one.total_bytes)} free"
        yield "registry", f"{one.url}  {f'{one.version}, {room}' if one.answers else 'does not answer'}"
    yield "nodes", _counted(health.nodes)
    if health.tightest:
        yield "disks", "least room: " + ", ".join(map(_room, health.tightest))
    yield "instances", _counted(health.instances)
    yield "queue", _queue(health.queue)
    behind = f"{health.copy.lag_s:.1f} s behind" if health.copy.lag_s else "up to date"
    yield "store", f"revision {health.copy.revision:,}, copy {behind}, {health.unsure.open} unsure writes"
    if health.backup is not None:
        yield "backup", _backup(health.backup)
    if health.certificates:
        yield "TLS", _certificate(health.certificates[0])
    yield "agents", ", ".join(f"{number} of {version}" for version, number in sorted(health.agents.items())) or "none"
    if not health.troubles:
        yield "troubles", "none"
    for trouble in health.troubles:
        yield "TROUBLE", f"{trouble.text}  ->  {trouble.remedy}"


def _controllers(told: Told) -> Iterator[str]:
    for url, how in told.reached.items():
        yield "  ".join(filter(None, (url, how, told.versions.get(url, ""))))
    for one in told.health.controllers:
        if one.url not in told.reached and not (one.me and not one.url):
            yield f"{one.url or one.id}  announced  {one.version}"


def _etcd(health: troubles.Health) -> str:
    members = [one for one in health.etcd if not one.stranger]
    leader = next((one.name or one.address for one in members if one.leads), "")
    behind = max((one.revisions_behind for one in members if one.answers), default=0)
    largest = max(members, key=lambda one: one.size_bytes)
    quota = f" of {out.size(largest.quota_bytes)}" if largest.quota_bytes else ""
    versions = " and ".join(sorted({one.version for one in members if one.version}))
    return ", ".join(
        [
            f"{sum(one.answers for one in members)} of {len(members)} members answer",
            f"{leader} leads" if leader else "nobody leads",
            f"at most {behind:,} revisions behind",
            f"{out.size(largest.size_bytes)}{quota} on disk, {out.size(largest.used_bytes)} in use",
            *([f"alarms: {' '.join(health.alarms)}"] if health.alarms else []),
            *([versions] if versions else []),
        ]
    )


def _room(node: troubles.Node) -> str:
    return f"{node.name} {out.size(node.free_disk_bytes)} of {out.size(node.disk_bytes)} free"


def _queue(queue: troubles.Queue) -> str:
    if not queue.waiting:
        return "empty"
    return (
        f"{queue.waiting} waiting; {queue.instance} ({queue.template}) longest, for {queue.waits_s} s: "
        f"{queue.why.removeprefix('Waiting: ') or 'no node has room'}"
    )


def _backup(backup: troubles.Backup) -> str:
    if not backup.at:
        return "none was made yet"
    return f"{backup.at}, {out.size(backup.size_bytes)}, {backup.file}"


def _certificate(first: troubles.Certificate) -> str:
    return f"first to expire: {first.name}, {first.expires}, {max(first.left_s, 0) // 86400} days left"


def _counted(states: Mapping[str, int]) -> str:
    return ", ".join(f"{number} {state}" for state, number in sorted(states.items())) or "none"


def add(app: typer.Typer) -> None:
    app.command()(status)
