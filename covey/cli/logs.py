"""`covey vm logs`: what a start script wrote.

    (nothing)     the last 64 KiB of each stream: as the cloud keeps them once a monitored script has ended, else from
                  the node, which keeps the last 16 MiB for as long as the VM is there
    --all         all that the node keeps
    --follow      that, and what comes, until the script ends

The node is asked part by part, at the pace at which they are printed. When it does not answer, what the cloud keeps is
shown instead, and that is said.
"""

import asyncio
import sys
from collections.abc import Sequence
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer

from covey import errors
from covey.cli import flags, out, vms

if TYPE_CHECKING:
    from covey.client import controller as controller_client

_LAST_BYTES = 64 * 1024
_PAUSE_S = 0.5
_PATIENCE = 40  # how often a busy node is asked again


class Stream(StrEnum):
    """What can be asked for."""

    STDOUT = "stdout"
    STDERR = "stderr"


def logs(
    instance: Annotated[str, typer.Argument(metavar="INSTANCE", help="An instance's id.")],
    stream: Annotated[Stream | None, typer.Option(help="Only this stream; both if not given.")] = None,
    all_: Annotated[bool, typer.Option("--all", help="All that the node keeps: the last 16 MiB.")] = False,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the script ends.")] = False,
    controller: flags.Controller = None,
    json: flags.Json = False,
) -> None:
    """Print what the instance's start script wrote: the last 64 KiB of each stream, or all that is kept."""
    if json and follow:
        raise typer.BadParameter("--follow prints as it goes, --json once at the end: use one of them")
    streams = tuple(Stream) if stream is None else (stream,)

    async def run() -> None:
        async with flags.connect(controller) as cloud:
            one = await vms.find(cloud, instance)
            if one.startup_script is not None and not (all_ or follow):
                _show_kept(one.startup_script, streams, json)
                return
            reader = _Reader(cloud, instance, streams, keep=json)
            try:
                await reader.read(0 if all_ or follow else -_LAST_BYTES, follow)
            except errors.Refused as error:
                if one.startup_script is None or reader.began:
                    raise
                out.note(str(error))
                _show_kept(one.startup_script, streams, json)
                return
            if json:
                out.as_json({name: bytes(text).decode("utf-8", "replace") for name, text in reader.kept.items()})
            elif (ended := (await vms.find(cloud, instance)).startup_script) is not None:
                _note_end(ended)

    asyncio.run(run())


class _Reader:
    """Reads the streams side by side. `keep`: for the end instead of printing."""

    def __init__(
        self, cloud: "controller_client.Controller", instance: str, streams: Sequence[Stream], *, keep: bool
    ) -> None:
        self._cloud = cloud
        self._instance = instance
        self._offsets: dict[Stream, int] = {}
        self._open = list(streams)
        self._keep = keep
        self.kept = {stream: bytearray() for stream in streams}
        self.began = False

    async def read(self, offset: int, follow: bool) -> None:
        self._offsets = dict.fromkeys(self._open, offset)
        while self._open:
            moved = [await self._read_some(stream, follow) for stream in tuple(self._open)]
            if self._open and not any(moved):
                await asyncio.sleep(_PAUSE_S)

    async def _read_some(self, stream: Stream, follow: bool) -> bool:
        """Whether there was something."""
        offset = self._offsets[stream]
        part = await self._ask(stream, offset)
        if 0 <= offset < part.offset:
            out.note(f"{part.offset - offset} bytes of {stream} are left out: only the last 16 MiB are kept")
        self._put(stream, part.data)
        self._offsets[stream] = part.offset + len(part.data)
        if part.end or (not follow and self._offsets[stream] >= part.size):
            self._open.remove(stream)
        return bool(part.data)

    async def _ask(self, stream: Stream, offset: int) -> "controller_client.Log":
        for _ in range(_PATIENCE):
            try:
                return await self._cloud.log(self._instance, stream, offset)
            except errors.RemoteError as error:
                if error.status != 503:
                    raise
            await asyncio.sleep(_PAUSE_S)
        return await self._cloud.log(self._instance, stream, offset)

    def _put(self, stream: Stream, data: bytes) -> None:
        self.began = self.began or bool(data)
        if self._keep:
            self.kept[stream] += data
        else:
            shown = sys.stderr if stream is Stream.STDERR else sys.stdout
            shown.buffer.write(data)
            shown.flush()


def _show_kept(result: "controller_client.ScriptResult", streams: Sequence[Stream], json: bool) -> None:
    """The last 64 KiB, as the cloud keeps them."""
    if json:
        out.as_json(result)
        return
    texts = {Stream.STDOUT: result.stdout, Stream.STDERR: result.stderr}
    for stream, text in ((stream, texts[stream]) for stream in streams):
        if text:
            typer.echo(text, err=stream is Stream.STDERR, nl=not text.endswith("\n"))
    _note_end(result)


def _note_end(result: "controller_client.ScriptResult") -> None:
    if result.errors:
        out.note(result.errors)
    out.note("the script timed out" if result.did_timeout else f"the script ended with {result.return_code}")


def add(app: typer.Typer) -> None:
    app.command()(logs)
