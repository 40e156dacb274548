"""`covey join` and `covey leave`: make this host a node of a cloud, and take it out again.

Joining looks first (each controller, then each registry the nodes pull from), saves the settings, starts the agent in
the background, and ends when the agent's session has begun. VMs do not depend on the agent: it may be restarted.
"""

import asyncio
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from covey import errors, settings_table
from covey.cli import background, flags, out

if TYPE_CHECKING:
    from covey import settings
    from covey.agent import identity

Part = settings_table.Part
_TEST_S = 10.0


@flags.of(Part.AGENT, without=frozenset({"CONTROLLER", "NODES"}))
def join(
    controllers: Annotated[str, typer.Argument(metavar="URL[,URL…]", help="The cloud's controllers.")],
    flags: flags.Flags,
    foreground: Annotated[bool, typer.Option("--foreground", help="Stay, instead of going to the background.")] = False,
    json: flags.Json = False,
) -> None:
    """Make this host a node of the cloud."""
    from covey import settings

    given = {**flags, "CONTROLLER": controllers}
    chosen = settings.agent({**os.environ, "COVEY_NODES": ""}, given)
    if pid := background.running_pid(chosen.data_dir):
        raise errors.Refused(f"an agent runs here already (process {pid}); `covey leave` stops it")
    say = out.note if json else out.say
    asyncio.run(_test(chosen.controllers, say))
    background.save(chosen.data_dir, _to_save(chosen, given))
    background.mark_explicit(chosen.data_dir)
    if foreground:
        environ = {**os.environ, **background.saved(chosen.data_dir)}
        os.execve(sys.executable, [sys.executable, "-m", "covey", "agent"], environ)  # noqa: S606 (no shell is meant)
    before = _identity(chosen.data_dir).counter
    how = background.start(chosen.data_dir, lambda: _identity(chosen.data_dir).counter > before)
    me = _identity(chosen.data_dir)
    if json:
        out.as_json({"node": me.node, "cloud": me.cloud, "controllers": chosen.controllers, "agent": how})
        return
    say(f"This host is node {me.node} of cloud {me.cloud}")
    say(f"The agent runs in the background: {how}")


def leave(
    data_dir: Annotated[Path | None, typer.Option(metavar="PATH", help="The node's data directory.")] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Leave although instances run here, or no controller answers.")
    ] = False,
    json: flags.Json = False,
) -> None:
    """Take this host out of its cloud and stop its agent."""
    from covey import settings

    where = settings.agent({**os.environ, "COVEY_NODES": ""}, {"DATA_DIR": data_dir}).data_dir
    me = _identity(where)
    if not me.node:
        raise errors.Refused(f"this host is no node of a cloud: nothing is known of one in {where}")
    controllers = background.saved(where).get("COVEY_CONTROLLER", "")
    chosen = settings.client(os.environ, {"CONTROLLER": controllers or None})
    try:
        asyncio.run(_sign_off(chosen.controllers, where, force=force))
    except errors.RemoteError as error:
        if not force:
            raise errors.RemoteError(f"{error}; --force leaves without telling the controllers") from error
        out.note(f"no controller was told: {error}")
    stopped = background.stop(where)
    background.forget(where)
    if json:
        out.as_json({"node": me.node, "stopped": stopped})
        return
    out.say(f"Node {me.node} has left its cloud")
    out.say("The agent has stopped" if stopped else "No agent was running")


def _to_save(chosen: "settings.Agent", given: Mapping[str, object]) -> dict[str, str]:
    """All that this agent was told, by flag or environment, under COVEY_ names."""
    from covey import settings_reader

    read = settings_reader.Reader(Part.AGENT, os.environ, given)
    rows = [row for row in settings_table.TABLE if Part.AGENT in row.parts and row.name not in ("NODES", "DATA_DIR")]
    values = {row.name: found.text for row in rows if (found := read.find(row.name)) is not None}
    values["DATA_DIR"] = str(chosen.data_dir)
    values["CONTROLLER"] = ",".join(chosen.controllers)
    if chosen.log_dir is not None:
        values["LOG_DIR"] = str(chosen.log_dir)  # absolute: the agent starts elsewhere
    return {f"COVEY_{name}": value for name, value in values.items()}


async def _test(urls: Sequence[str], say: Callable[[str], None]) -> None:
    """One line per server. At least one controller must answer, and every registry it names."""
    reached = [url for url in urls if await _reached(url, "controller", say)]
    if not reached:
        raise errors.Refused("no controller can be reached from here: check the URLs, and that one is started")
    for url in await _registries(reached):
        if not await _reached(url, "registry", say):
            raise errors.Refused(
                f"this host cannot reach the registry {url}: "
                "set the controller's COVEY_ANKA_REGISTRY to the URL that nodes can reach"
            )


async def _reached(url: str, what: str, say: Callable[[str], None]) -> bool:
    from covey.client import http

    async with http.Endpoints((url,), timeout_s=_TEST_S) as one:
        try:
            status, _ = await one.call("GET", "/readyz")
        except errors.RemoteError as error:
            say(f"Testing connection to the {what}...: Failed ({error})")
            return False
    say(f"Testing connection to the {what}...: {'Ok' if status == 200 else f'Failed (HTTP {status})'} ({url})")
    return status == 200


async def _registries(controllers: Sequence[str]) -> list[str]:
    from covey import world
    from covey.client import controller as controller_client

    async with controller_client.Controller(controllers, world.System()) as cloud:
        address = (await cloud.status()).registry_address
    return [url.strip() for url in address.split(",") if url.strip()]


async def _sign_off(controllers: Sequence[str], data_dir: Path, *, force: bool) -> None:
    """Tell the cloud that this node leaves. One that was removed before (410) has nothing to tell."""
    from covey import world
    from covey.agent import identity, session
    from covey.client import http

    clock = world.System()
    async with http.Endpoints(controllers) as cloud:
        try:
            await session.Session(identity.File(background.folder(data_dir), clock), cloud, clock).leave(force=force)
        except errors.RemoteError as error:
            if error.status != 410:
                raise


def _identity(data_dir: Path) -> "identity.Identity":
    from covey import world
    from covey.agent import identity

    return identity.File(background.folder(data_dir), world.System()).now


def add(app: typer.Typer) -> None:
    app.command()(join)
    app.command()(leave)
