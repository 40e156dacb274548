"""`covey vm …`: start, look at, explain and terminate instances."""

import asyncio
import base64
from collections.abc import Awaitable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from covey import errors
from covey.cli import flags, out

if TYPE_CHECKING:
    from covey.client import controller as controller_client

app = typer.Typer(help="Instances: VMs asked for by users.", no_args_is_help=True)

T = TypeVar("T")

_SCRIPT_LIMIT_BYTES = 256 * 1024
_NODES_SHOWN = 50
_BEFORE_SHOWN = 3


@app.command()
def start(
    template: Annotated[str, typer.Argument(metavar="TEMPLATE", help="A template's name or id.")],
    tag: Annotated[str, typer.Option(metavar="TAG", help="Which tag; the latest if not given.")] = "",
    count: Annotated[int, typer.Option(metavar="N", help="How many, 1 to 100: all or none.")] = 1,
    script: Annotated[Path | None, typer.Option(metavar="FILE", help="A start script to run in each VM.")] = None,
    monitor: Annotated[
        bool, typer.Option("--monitor", help="A script that fails turns the instance to Error.")
    ] = False,
    external_id: Annotated[str, typer.Option(metavar="TEXT", help="Your own id of what this is for.")] = "",
    name: Annotated[str, typer.Option(metavar="TEXT", help="A name.")] = "",
    wait: Annotated[float, typer.Option(metavar="S", min=0, help="Wait up to S seconds until all are started.")] = 0.0,
    controller: flags.Controller = None,
    json: flags.Json = False,
) -> None:
    """Start instances from a template."""
    from covey.client import controller as controller_client

    async def run() -> tuple[list[str], dict[str, controller_client.Instance]]:
        async with flags.connect(controller) as cloud:
            ids = await cloud.start(
                controller_client.Start(
                    vmid=await cloud.template_id(template),
                    tag=tag,
                    count=count,
                    external_id=external_id,
                    name=name,
                    startup_script=_script_text(script),
                    script_monitoring=monitor,
                )
            )
            if not json:
                for id in ids:
                    out.say(id)
            if not wait:
                return ids, {}
            with out.progress(f"Starting {len(ids)}") as bar:
                return ids, await cloud.wait_until_settled(ids, wait, lambda seen: _watch(bar, ids, seen))

    ids, seen = asyncio.run(run())
    if json:
        out.as_json({"instances": ids, "vms": [seen[id] for id in ids]} if seen else {"instances": ids})
    elif seen:
        for id in ids:
            out.say(_line(seen[id]))
    _judge(ids, seen, wait)


@app.command("list")
def list_(
    state: Annotated[
        list[str] | None, typer.Option("--state", metavar="STATE", help="Only those in this state; may be repeated.")
    ] = None,
    template: Annotated[str, typer.Option(metavar="TEMPLATE", help="Only those of this template: name or id.")] = "",
    group: Annotated[str, typer.Option(metavar="GROUP", help="Only those of this group of nodes.")] = "",
    external_id: Annotated[str, typer.Option(metavar="TEXT", help="Only those with this id of yours.")] = "",
    controller: flags.Controller = None,
    json: flags.Json = False,
) -> None:
    """List instances: all, or those that every given option lets through."""

    async def run() -> "list[controller_client.Instance]":
        async with flags.connect(controller) as cloud:
            return await cloud.instances(
                state=",".join(state or ()), group=group, template=template, external_id=external_id
            )

    found = asyncio.run(run())
    if json:
        out.as_json(found)
        return
    columns = ("instance", "state", "template", "tag", "node", "ip", "ports", "message")
    out.table(columns, [_row(one) for one in sorted(found, key=lambda one: one.cr_time)])


@app.command()
def show(
    instance: Annotated[str, typer.Argument(metavar="INSTANCE", help="An instance's id.")],
    controller: flags.Controller = None,
    json: flags.Json = False,
) -> None:
    """Show one instance."""
    one = asyncio.run(_instance(instance, controller))
    if json:
        out.as_json(one)
        return
    vm = one.vminfo
    pairs = [
        ("instance", one.instance_id),
        ("state", one.instance_state),
        ("message", one.message),
        ("template", one.vmid),
        ("tag", one.tag),
        ("name", one.name),
        ("external id", one.external_id),
        ("node", one.node_id),
        ("created", one.cr_time),
        ("changed", one.ts),
    ]
    if vm is not None:
        pairs += [
            ("vm", vm.name),
            ("ip", vm.ip),
            ("host", vm.host_ip),
            ("ports", _ports(one)),
            ("vnc", vm.vnc_connection_string),
        ]
    if one.startup_script is not None:
        pairs.append(("script ended with", str(one.startup_script.return_code)))
    out.fields(pairs)


@app.command()
def explain(
    instance: Annotated[str, typer.Argument(metavar="INSTANCE", help="An instance's id.")],
    controller: flags.Controller = None,
    json: flags.Json = False,
) -> None:
    """Say why an instance waits: its place in the queue, and what each node says of it."""

    async def run() -> "controller_client.Explanation":
        async with flags.connect(controller) as cloud:
            return await found(cloud.explain(instance), instance)

    told = asyncio.run(run())
    if json:
        out.as_json(told)
        return
    out.fields(
        [
            ("instance", told.instance_id),
            ("state", told.instance_state),
            ("why", told.text),
            ("queue", _place_in_queue(told)),
            ("turn", _turn(told)),
        ]
    )
    nodes = told.nodes or []
    if nodes:
        out.say("")
        out.table(
            ("node", "verdict", "because"),
            [(node.node_name, node.verdict.replace("_", " "), node.text) for node in nodes[:_NODES_SHOWN]],
        )
    if len(nodes) > _NODES_SHOWN:
        out.note(f"{len(nodes) - _NODES_SHOWN} more nodes; --json shows all")


@app.command()
def terminate(
    instances: Annotated[list[str], typer.Argument(metavar="INSTANCE…", help="Ids of instances.")],
    controller: flags.Controller = None,
    json: flags.Json = False,
) -> None:
    """Terminate instances."""

    async def run() -> list[tuple[str, str]]:
        failed = []
        async with flags.connect(controller) as cloud:
            for id in instances:
                try:
                    await cloud.terminate(id)
                except errors.Refused as error:
                    failed.append((id, str(error)))
        return failed

    failed = asyncio.run(run())
    done = [id for id in instances if id not in dict(failed)]
    if json:
        out.as_json({"terminated": done, "failed": dict(failed)})
    else:
        for id in done:
            out.say(f"{id} terminating")
    if failed:
        raise errors.Refused("; ".join(f"{id}: {why}" for id, why in failed))


async def _instance(id: str, controller: str | None) -> "controller_client.Instance":
    async with flags.connect(controller) as cloud:
        return await find(cloud, id)


async def find(cloud: "controller_client.Controller", id: str) -> "controller_client.Instance":
    """One instance. Raises NotFound with the remedy."""
    return await found(cloud.instance(id), id)


async def found(ask: Awaitable[T], id: str) -> T:
    """What is asked of an instance. Raises NotFound with the remedy."""
    try:
        return await ask
    except errors.NotFound:
        raise errors.NotFound(f"there is no instance {id}; `covey vm list` shows those there are") from None


def _place_in_queue(told: "controller_client.Explanation") -> str:
    if not told.position:
        return ""
    before = told.before or []
    names = ", ".join(before[:_BEFORE_SHOWN]) + (", …" if told.competitors > _BEFORE_SHOWN else "")
    rivals = f"; before it, for the same nodes: {told.competitors} ({names})" if before else ""
    return f"{told.position} of {told.waiting} waiting{rivals}"


def _turn(told: "controller_client.Explanation") -> str:
    """Only when waiting has changed it."""
    return f"{told.turn}, by waiting; its priority is {told.priority}" if told.turn != told.priority else ""


def _script_text(file: Path | None) -> str:
    if file is None:
        return ""
    return base64.b64encode(out.read("--script", file, _SCRIPT_LIMIT_BYTES)).decode("ascii")


def _judge(ids: Sequence[str], seen: "Mapping[str, controller_client.Instance]", wait_s: float) -> None:
    bad = [seen[id] for id in ids if id in seen and seen[id].instance_state != "Started"]
    if bad:
        first = bad[0]
        why = first.message or f"still {first.instance_state} after {wait_s:.0f} s"
        more = f" (and {len(bad) - 1} more)" if len(bad) > 1 else ""
        raise errors.Refused(f"instance {first.instance_id} is {first.instance_state}: {why}{more}")


def _watch(bar: out.Bar, ids: Sequence[str], seen: "Mapping[str, controller_client.Instance]") -> None:
    started = sum(one.instance_state == "Started" for one in seen.values())
    states = sorted({one.instance_state for one in seen.values()})
    bar(started, len(ids), ", ".join(states))


def _line(one: "controller_client.Instance") -> str:
    parts = [one.instance_id, one.instance_state, _ports(one), one.message]
    return "  ".join(part for part in parts if part)


def _ports(one: "controller_client.Instance") -> str:
    forwards = (one.vminfo.port_forwarding or []) if one.vminfo else []
    host = one.vminfo.host_ip if one.vminfo else ""
    return ",".join(f"{rule.host_ip or host}:{rule.host_port}->{rule.guest_port}" for rule in forwards)


def _row(one: "controller_client.Instance") -> tuple[str, ...]:
    ip = one.vminfo.ip if one.vminfo else ""
    return (one.instance_id, one.instance_state, one.vmid, one.tag, one.node_id, ip, _ports(one), one.message)
