"""`covey node …`: hosts and their agents."""

import asyncio
from typing import TYPE_CHECKING, Annotated

import typer

from covey.cli import flags, out

if TYPE_CHECKING:
    from covey.client import controller as controller_client

app = typer.Typer(help="Nodes: hosts with an agent.", no_args_is_help=True)

_Node = Annotated[str, typer.Argument(help="A node's name or id.", metavar="NODE")]


@app.command("list")
def list_(
    state: Annotated[
        list[str] | None, typer.Option("--state", metavar="STATE", help="Only those in this state; may be repeated.")
    ] = None,
    group: Annotated[str, typer.Option(metavar="GROUP", help="Only those of this group.")] = "",
    controller: flags.Controller = None,
    json: flags.Json = False,
) -> None:
    """List nodes: all, or those that every given option lets through."""

    async def run() -> "list[controller_client.Node]":
        async with flags.connect(controller) as cloud:
            return await cloud.nodes(state=",".join(state or ()), group=group)

    found = asyncio.run(run())
    if json:
        out.as_json(found)
        return
    rows = [
        (
            one.node_name,
            one.node_id,
            one.state,
            f"{one.vm_count}/{one.capacity}",
            one.host_arch,
            one.ip_address,
            out.size(one.free_disk_space),
        )
        for one in sorted(found, key=lambda one: one.node_name)
    ]
    out.table(("name", "node", "state", "vms", "arch", "address", "free disk"), rows)


@app.command()
def show(node: _Node, controller: flags.Controller = None, json: flags.Json = False) -> None:
    """Show one node."""

    async def run() -> "controller_client.Node":
        async with flags.connect(controller) as cloud:
            return await cloud.node(node)

    one = asyncio.run(run())
    if json:
        out.as_json(one)
        return
    templates = ", ".join(f"{template.name}:{template.tag}" for template in one.templates or [])
    out.fields(
        [
            ("name", one.node_name),
            ("node", one.node_id),
            ("state", one.state),
            ("trouble", one.trouble),
            ("address", one.ip_address),
            ("architecture", one.host_arch),
            ("vms", f"{one.vm_count} of {one.capacity} ({one.capacity_mode})"),
            ("processors", f"{one.cpu_count}, {one.vcpu_count} given to VMs, {one.cpu_util:.0%} busy"),
            ("memory", f"{one.ram} GB, {one.vram} MB given to VMs, {one.ram_util:.0%} used"),
            ("disk", f"{out.size(one.free_disk_space)} free of {out.size(one.disk_size)}"),
            ("templates", templates),
            ("last word", one.last_updated),
            ("agent", one.agent_version),
        ]
    )


@app.command()
def drain(
    node: _Node,
    off: Annotated[bool, typer.Option("--off", help="Take new instances again.")] = False,
    controller: flags.Controller = None,
    json: flags.Json = False,
) -> None:
    """Give a node nothing new; what runs there goes on."""

    async def run() -> "controller_client.Node":
        async with flags.connect(controller) as cloud:
            one = await cloud.node(node)
            await cloud.drain(one.node_id, not off)
            return await cloud.node(one.node_id)

    one = asyncio.run(run())
    if json:
        out.as_json(one)
    else:
        out.say(
            f"{one.node_name or one.node_id} takes new instances again"
            if off
            else f"{one.node_name or one.node_id} takes no new instances; {one.vm_count} still run there"
        )


@app.command()
def release(node: _Node, controller: flags.Controller = None, json: flags.Json = False) -> None:
    """After a restore of etcd: give up waiting for a node that is lost, so that what it may have run starts elsewhere.

    Only when no VM runs on that host any more, and none ever will: otherwise it would run twice."""

    async def run() -> "controller_client.Node":
        async with flags.connect(controller) as cloud:
            one = await cloud.node(node)
            await cloud.release(one.node_id)
            return one

    one = asyncio.run(run())
    if json:
        out.as_json(one)
    else:
        out.say(f"nothing waits for {one.node_name or one.node_id} any more")
