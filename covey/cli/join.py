"""`covey join` and `covey leave` (also `disjoin`): make this host a node of a cloud, and take it out again.

Joining looks first (each controller, then each registry the nodes pull from), saves the settings, starts the agent in
the background, and ends when the agent's session has begun. One that fails leaves everything as it was. VMs do not
depend on the agent: joining again restarts it, and it finds them.
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
    pid = background.running_pid(chosen.data_dir)
    if pid and (foreground or not background.is_ours(chosen.data_dir, pid)):
        raise errors.Refused(f"an agent runs here already (process {pid}): end it first")
    _refuse_a_copy(chosen.data_dir)
    say = out.note if json else out.say
    asyncio.run(_test(chosen.controllers, say))
    with background.unless_it_fails(chosen.data_dir):
        if pid:
            say(f"The agent that runs here (process {pid}) is restarted; VMs run on")
            background.stop(chosen.data_dir)
        background.save(chosen.data_dir, _to_save(chosen, given))
        background.mark_explicit(chosen.data_dir)
        if foreground:
            environ = {**os.environ, **background.saved(chosen.data_dir)}
            os.execve(sys.executable, [sys.executable, "-m", "covey", "agent"], environ)  # noqa: S606 (no shell)
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
    if _is_copy(me, where):
        out.note(f"this is a copy of a node that may run elsewhere: node {me.node} stays in its cloud")
    else:
        _tell(where, force=force)
    stopped = background.stop(where)
    background.forget(where)
    if json:
        out.as_json({"node": me.node, "stopped": stopped})
        return
    out.say(f"Node {me.node} has left its cloud")
    out.say("The agent has stopped" if stopped else "No agent was running")


def _tell(data_dir: Path, *, force: bool) -> None:
    """Tell the controllers that this node leaves."""
    from covey import settings

    controllers = background.saved(data_dir).get("COVEY_CONTROLLER", "")
    chosen = settings.client(os.environ, {"CONTROLLER": controllers or None})
    try:
        asyncio.run(_sign_off(chosen.controllers, data_dir, force=force))
    except errors.RemoteError as error:
        if not force:
            raise errors.RemoteError(f"{error}; --force leaves without telling the controllers") from error
        out.note(f"no controller was told: {error}")


def _is_copy(me: "identity.Identity", data_dir: Path) -> bool:
    """Whether this identity belongs to another directory, which may be in use (safety S7)."""
    from covey.agent import host, identity

    here = identity.Home.of(background.folder(data_dir), host.machine())
    return me.home is not None and me.home.elsewhere(here)


def _refuse_a_copy(data_dir: Path) -> None:
    """A data directory that was moved may join again; not a copy of one on which an agent runs (safety S7)."""
    me = _identity(data_dir)
    if me.node and me.home is not None and _is_copy(me, data_dir):
        first = Path(me.home.path).parent
        if pid := background.running_pid(first):
            raise errors.Refused(
                f"{data_dir} is a copy of {first}, on which an agent runs (process {pid}): `covey leave` there, or"
                " choose another place with --data-dir"
            )


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
    """One line per server. At least one controller must answer, and of the registries that they name at least one."""
    reached = [url for url in urls if await _reached(url, "controller", say)]
    if not reached:
        raise errors.Refused("no controller can be reached from here: check the URLs, and that one is started")
    if len(reached) < len(urls):
        out.note(f"warning: {len(urls) - len(reached)} of {len(urls)} controllers cannot be reached now")
    registries = await _registries(reached)
    good = [url for url in registries if await _reached(url, "registry", say)]
    if registries and not good:
        raise errors.Refused(
            f"this host cannot reach the registry {', '.join(registries)}: "
            "set the controller's COVEY_ANKA_REGISTRY to the URL that nodes can reach"
        )
    if len(good) < len(registries):
        out.note(f"warning: {len(registries) - len(good)} of {len(registries)} registries cannot be reached now")


async def _reached(url: str, what: str, say: Callable[[str], None]) -> bool:
    from covey.client import http

    async with http.Endpoints((url,), timeout_s=_TEST_S, ca_cert=flags.trusted()) as one:
        try:
            status, _ = await one.call("GET", "/readyz")
        except errors.RemoteError as error:
            say(f"Testing connection to the {what}...: Failed ({error})")
            return False
    say(f"Testing connection to the {what}...: {'Ok' if status == 200 else f'Failed (HTTP {status})'} ({url})")
    return status == 200


async def _registries(controllers: Sequence[str]) -> list[str]:
    """Each registry that one of these names, once."""
    from covey import world
    from covey.client import controller as controller_client

    found: list[str] = []
    for url in controllers:
        async with controller_client.Controller((url,), world.System(), ca_cert=flags.trusted()) as cloud:
            found += (part.strip() for part in (await cloud.status()).registry_address.split(","))
    return [url for url in dict.fromkeys(found) if url]


async def _sign_off(controllers: Sequence[str], data_dir: Path, *, force: bool) -> None:
    """Tell the cloud that this node leaves. One that was removed before (410) has nothing to tell."""
    from covey import world
    from covey.agent import identity, session
    from covey.client import http

    clock = world.System()
    learnt = identity.learnt(background.folder(data_dir))
    async with http.Endpoints(controllers, learnt=learnt, ca_cert=flags.trusted()) as cloud:
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
    app.command(name="disjoin", help="The same as `leave`.")(leave)
