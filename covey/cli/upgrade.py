"""`covey upgrade …`: what stands between the cloud and a new format of its store (docs/operate/upgrade.md)."""

import asyncio
from typing import TYPE_CHECKING, Annotated

import typer

from covey.cli import flags, out

if TYPE_CHECKING:
    from covey.client import controller as controller_client

app = typer.Typer(help="Upgrades: what blocks their end, and ending them.", no_args_is_help=True)


@app.command()
def check(controller: flags.Controller = None, json: flags.Json = False) -> None:
    """Show what blocks raising the format of the store. Ends with 1 when something does."""

    async def run() -> "controller_client.Upgrade":
        async with flags.connect(controller) as cloud:
            return await cloud.upgrade()

    found = asyncio.run(run())
    if json:
        out.as_json(found)
    else:
        _show(found)
        if found.may_finish:
            out.say(f"Nothing blocks format {found.target}. `covey upgrade finish` raises it; there is no way back.")
    if found.blockers:
        raise typer.Exit(1)


@app.command()
def finish(
    format: Annotated[
        int, typer.Option("--format", min=0, metavar="NUMBER", help="0: the newest that any controller knows.")
    ] = 0,
    controller: flags.Controller = None,
    json: flags.Json = False,
) -> None:
    """Raise the format of the store. Programs that do not know it can write nothing any more."""

    async def run() -> "controller_client.Upgrade":
        async with flags.connect(controller) as cloud:
            return await cloud.finish_upgrade(format)

    found = asyncio.run(run())
    if json:
        out.as_json(found)
    else:
        _show(found)


def _show(found: "controller_client.Upgrade") -> None:
    out.say(f"The store has format {found.format}")
    rows = [(one.url or "-", one.id, one.version, str(one.format)) for one in found.controllers]
    out.table(("controller", "id", "version", "format"), rows)
    for note in found.notes:
        out.say(note)
    for blocker in found.blockers:
        out.say(f"BLOCKED: {blocker}")
