"""`covey status`: is the cloud well, in a few lines."""

import asyncio
import collections
from collections.abc import Mapping
from dataclasses import dataclass

import typer

from covey import errors
from covey.cli import flags, out


@dataclass(frozen=True, slots=True)
class _Health:
    controllers: Mapping[str, str]  # URL -> how it is
    version: str
    registry: Mapping[str, str]
    nodes: Mapping[str, int]  # state -> how many
    instances: Mapping[str, int]


def status(controller: flags.Controller = None, json: flags.Json = False) -> None:
    """Show how the cloud is. Ends with 1 when no controller answers."""
    from covey import world
    from covey.client import controller as controller_client

    async def look(url: str) -> str:
        async with controller_client.Controller((url,), world.System(), timeout_s=5) as one:
            try:
                code, _ = await one.endpoints.call("GET", "/readyz")
            except errors.RemoteError as error:
                return str(error)
            return "ready" if code == 200 else f"not ready ({code})"

    async def run() -> _Health:
        async with flags.connect(controller) as cloud:
            looks = await asyncio.gather(*(look(url) for url in cloud.endpoints.urls))
            controllers = dict(zip(cloud.endpoints.urls, looks, strict=True))
            if "ready" not in looks:
                raise errors.RemoteError("; ".join(f"controller {url}: {how}" for url, how in controllers.items()))
            shown = await cloud.status()
            nodes = collections.Counter(one.state for one in await cloud.nodes())
            instances = collections.Counter(one.instance_state for one in await cloud.instances())
        registry = {"address": shown.registry_address, "status": shown.registry_status}
        return _Health(controllers, shown.version, registry, nodes, instances)

    found = asyncio.run(run())
    if json:
        out.as_json(found)
        return
    for url, how in found.controllers.items():
        out.say(f"controller  {url}  {how}")
    out.say(f"registry    {found.registry['address'] or '-'}  {found.registry['status']}")
    out.say(f"nodes       {_counted(found.nodes)}")
    out.say(f"instances   {_counted(found.instances)}")


def _counted(states: Mapping[str, int]) -> str:
    return ", ".join(f"{number} {state}" for state, number in sorted(states.items())) or "none"


def add(app: typer.Typer) -> None:
    app.command()(status)
