"""`covey template …`: push, pull and look at VM templates, and build one to try things out."""

import asyncio
import contextlib
import datetime
import os
import platform
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from covey import errors
from covey.cli import flags, out

if TYPE_CHECKING:
    from covey import model
    from covey.client import oci, remembered, templates
    from covey.client import registry as registry_client

app = typer.Typer(help="Templates: what instances are started from.", no_args_is_help=True)

T = TypeVar("T")
_CONFIG_LIMIT_BYTES = 1 << 20
_Template = Annotated[str, typer.Argument(help="A template's name or id.", metavar="TEMPLATE")]
_Tag = Annotated[str, typer.Option("--tag", metavar="TAG", help="Which tag; the newest version if not given.")]
_Version = Annotated[int | None, typer.Option("--version", metavar="N", help="Which version, by its number.")]
_Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]


@app.command()
def push(
    name: Annotated[str, typer.Argument(metavar="NAME", help="The template's name; a new name makes a new template.")],
    files: Annotated[list[Path], typer.Argument(help="Disk layers, base first.", metavar="FILE…")],
    tag: Annotated[str, typer.Option(metavar="TAG", help="The version's tag: any text.")],
    kernel: Annotated[Path | None, typer.Option(metavar="FILE", help="A kernel to boot directly.")] = None,
    initrd: Annotated[Path | None, typer.Option(metavar="FILE", help="Its initial RAM disk.")] = None,
    nvram: Annotated[Path | None, typer.Option(metavar="FILE", help="The firmware's variables.")] = None,
    state: Annotated[Path | None, typer.Option(metavar="FILE", help="Suspended memory.")] = None,
    config: Annotated[
        Path | None, typer.Option(metavar="FILE", help="JSON: arch, vcpu, ram_mb and what the hypervisor wants.")
    ] = None,
    description: Annotated[str, typer.Option(metavar="TEXT", help="A few words about this version.")] = "",
    force: Annotated[bool, typer.Option("--force", help="Replace the tag if it exists.")] = False,
    no_compress: Annotated[
        bool, typer.Option("--no-compress", help="Send layers as they are: agents before 0.3 cannot unpack them.")
    ] = False,
    registry: flags.Registry = None,
    json: flags.Json = False,
) -> None:
    """Push files as a new version of a template. Only what the registry lacks is moved, packed where that pays; a push
    that was interrupted goes on where it stood."""
    from covey.agent import qcow2
    from covey.client import templates

    templates.check_files(files)
    qcow2.check_files(files)
    arch, vm = _config(config)
    notes = _notes()

    async def run(client: "registry_client.Registry", moved: "templates.Progress") -> "templates.Pushed":
        return await templates.push_template(
            client,
            name,
            tag,
            files,
            arch=arch,
            vm=vm,
            kernel=kernel,
            initrd=initrd,
            nvram=nvram,
            state=state,
            description=description,
            force=force,
            notes=notes,
            pack=not no_compress,
            progress=moved,
        )

    pushed = _with_progress(registry, run, notes=notes, pushing=True)
    if json:
        out.as_json(pushed)
        return
    out.say(f"{pushed.name} {pushed.tag} is version {pushed.version} of template {pushed.template}")
    out.say(f"{out.size(pushed.file_bytes)} of files")
    out.say(f"moved {out.size(pushed.moved_bytes)}, skipped {out.size(pushed.skipped_bytes)} that the registry had")


@app.command("list")
def list_(registry: flags.Registry = None, json: flags.Json = False) -> None:
    """List all templates."""
    found = _ask(registry, lambda client: client.templates())
    if json:
        out.as_json(found)
        return
    rows = [
        (one.name, one.id, one.arch, out.size(one.size), _when(one.last_push), _when(one.last_pull))
        for one in sorted(found, key=lambda one: one.name)
    ]
    out.table(("name", "template", "arch", "size", "pushed", "pulled"), rows)


@app.command()
def show(template: _Template, registry: flags.Registry = None, json: flags.Json = False) -> None:
    """Show one template and its versions."""
    one = _ask(registry, lambda client: client.template(template), template)
    if json:
        out.as_json(one)
        return
    out.fields(
        [
            ("name", one.name),
            ("template", one.id),
            ("arch", one.arch),
            ("size", out.size(one.size)),
            ("created", _when(one.creation_date)),
            ("pulled", _when(one.last_pull)),
        ]
    )
    out.say("")
    rows = [
        (str(version.number), version.tag, out.size(version.size), _when(version.creation_date), version.description)
        for version in one.versions
    ]
    out.table(("version", "tag", "size", "pushed", "description"), rows)


@app.command()
def pull(
    template: _Template,
    directory: Annotated[Path, typer.Argument(help="Where the files go.", metavar="DIR")] = Path(),
    tag: _Tag = "",
    version: _Version = None,
    registry: flags.Registry = None,
    json: flags.Json = False,
) -> None:
    """Pull a version's files into a directory. Files that are there already are left; a pull that was interrupted goes
    on where it stood."""
    from covey.client import templates

    async def run(client: "registry_client.Registry", moved: "templates.Progress") -> "templates.Pulled":
        return await templates.pull_template(client, template, directory, tag=tag, version=version, progress=moved)

    pulled = _with_progress(registry, run, template)
    if json:
        shown = {name: getattr(pulled, name) for name in pulled.__struct_fields__}
        out.as_json({**shown, "files": [str(file) for file in pulled.files]})
        return
    for file in pulled.files:
        out.say(str(file))
    out.say(f"moved {out.size(pulled.moved_bytes)}, skipped {out.size(pulled.skipped_bytes)} that were here")


@app.command("tag")
def tag_(
    template: _Template,
    new_tag: Annotated[str, typer.Argument(metavar="NEW-TAG", help="The further tag: any text.")],
    tag: _Tag = "",
    version: _Version = None,
    registry: flags.Registry = None,
    json: flags.Json = False,
) -> None:
    """Give a version a further tag. It becomes a new version of the same layers; none of them is moved."""
    from covey.client import templates

    async def run(client: "registry_client.Registry") -> "oci.Resolved":
        async with _reached(registry, pushing=True) as pushes:
            return await templates.tag_template(client, template, new_tag, tag=tag, version=version, pushed_to=pushes)

    found = _ask(registry, run, template)
    if json:
        out.as_json(found)
        return
    out.say(f"{found.name} {found.tag} is version {found.number} of template {found.id}")


@app.command()
def revert(
    template: _Template,
    tag: _Tag = "",
    version: _Version = None,
    yes: _Yes = False,
    registry: flags.Registry = None,
    json: flags.Json = False,
) -> None:
    """Take back a version and all newer ones; with the first version goes the template."""

    async def look(client: "registry_client.Registry") -> "tuple[oci.Resolved, oci.TemplateView]":
        found = await client.resolve(template, tag, version)
        return found, await client.template(found.id)

    found, whole = _ask(registry, look, template)
    goes = [one for one in whole.versions if one.number >= found.number]
    names = ", ".join(f"{one.number} ({one.tag})" for one in goes)
    what = f"template {found.name} with all its versions" if len(goes) == len(whole.versions) else f"versions {names}"
    _confirm(yes, f"Delete {what}?")
    _ask(registry, lambda client: client.revert(found.id, version=found.number))
    if json:
        out.as_json(found)
        return
    out.say(f"deleted {what} of {found.name}" if what.startswith("versions") else f"deleted {what}")


@app.command()
def delete(template: _Template, yes: _Yes = False, registry: flags.Registry = None) -> None:
    """Delete a template with all its versions, for ever. Running VMs keep what they have."""
    whole = _ask(registry, lambda client: client.template(template), template)
    _confirm(yes, f"Delete template {whole.name} with {len(whole.versions)} versions?")
    _ask(registry, lambda client: client.delete(whole.id))
    out.say(f"deleted template {whole.name} with {len(whole.versions)} versions")


def _confirm(yes: bool, question: str) -> None:
    """Ask whoever sits at a terminal; elsewhere --yes must be given. Raises Refused."""
    if yes:
        return
    if not sys.stdin.isatty():
        raise errors.Refused(f"{question} Say so with --yes")
    if not typer.confirm(question):
        raise errors.Refused("nothing was deleted")


@app.command("build-demo")
def build_demo(
    directory: Annotated[Path, typer.Argument(help="Where the template is built.", metavar="DIR")],
    layer: Annotated[
        str, typer.Option(metavar="NAME", help="Build NAME.qcow2 instead: a layer on base.qcow2 in DIR.")
    ] = "",
    cache: Annotated[Path | None, typer.Option(metavar="DIR", help="Where downloaded packages are kept.")] = None,
    json: flags.Json = False,
) -> None:
    """Build a small Linux template from Debian packages, to try things out."""
    from covey.agent import demo_guest

    if layer:
        if not layer.replace("-", "").replace("_", "").isalnum():
            raise errors.Refused(f"--layer {layer!r}: use letters, digits, - and _ only")
        text = f"{layer}\n".encode()
        files = [demo_guest.build_layer(directory, f"{layer}.qcow2", {f"srv/layers/{layer}": text})]
    else:
        demo_guest.build(directory, cache=cache or _cache() / "packages", say=out.note)
        files = [directory / name for name in ("base.qcow2", "vmlinuz", "initrd", "config.json")]
    if json:
        out.as_json({"files": [str(file) for file in files]})
        return
    for file in files:
        out.say(f"{file}  {out.size(file.stat().st_size)}")


def _config(file: Path | None) -> "tuple[model.Arch, dict[str, str | int | bool]]":
    """The architecture and the rest of a configuration file; without one, this machine's architecture."""
    import msgspec

    from covey import model

    here = {"x86_64": model.Arch.AMD64, "amd64": model.Arch.AMD64}.get(platform.machine().lower(), model.Arch.ARM64)
    if file is None:
        return here, {}
    try:
        vm = msgspec.json.decode(out.read("--config", file, _CONFIG_LIMIT_BYTES), type=dict[str, str | int | bool])
        arch = model.Arch(str(vm.pop("arch", here)))
    except (msgspec.MsgspecError, ValueError) as error:
        raise errors.Refused(f"--config {file}: {error}") from error
    for name in ("vcpu", "ram_mb"):
        value = vm.get(name, 1)
        if type(value) is not int or value < 1:
            raise errors.Refused(f"--config {file}: {name}: {value!r} is no whole number above 0")
    return arch, vm


def _when(time_s: int) -> str:
    """A time for people, by their clock; 0 is never."""
    if not time_s:
        return ""
    return datetime.datetime.fromtimestamp(time_s, datetime.UTC).astimezone().strftime("%Y-%m-%d %H:%M")


def _ask(
    registry: str | None,
    question: "Callable[[registry_client.Registry], Awaitable[T]]",
    template: str | None = None,
    *,
    notes: "remembered.Notes | None" = None,
    pushing: bool = False,
) -> T:
    """One question to the registries named on the command line or in the environment, about `template` if given."""

    async def run() -> T:
        async with _reached(registry, notes=notes, pushing=pushing) as client:
            return await question(client)

    try:
        return asyncio.run(run())
    except errors.NotFound:
        if template is None:
            raise
        raise errors.NotFound(f"there is no template {template}; `covey template list` shows those there are") from None


@contextlib.asynccontextmanager
async def _reached(
    registry: str | None, *, notes: "remembered.Notes | None" = None, pushing: bool = False
) -> "AsyncIterator[registry_client.Registry]":
    """`pushing`: the registries that are pushed to (PUSH_REGISTRY), unless some are named on the command line."""
    from covey import settings
    from covey.client import http
    from covey.client import registry as registry_client

    chosen = settings.client(os.environ, {"REGISTRY": registry})
    urls = chosen.push_registries if pushing and registry is None else chosen.registries
    async with http.Endpoints(urls, timeout_s=30, ca_cert=chosen.ca_cert) as endpoints:
        yield registry_client.Registry(endpoints, notes=notes)


def _with_progress(
    registry: str | None,
    work: "Callable[[registry_client.Registry, templates.Progress], Awaitable[T]]",
    template: str | None = None,
    *,
    notes: "remembered.Notes | None" = None,
    pushing: bool = False,
) -> T:
    with out.transfers() as moved:
        return _ask(registry, lambda client: work(client, moved), template, notes=notes, pushing=pushing)


def _notes() -> "remembered.Notes":
    """Where unfinished pushes are remembered."""
    from covey import world
    from covey.client import remembered

    return remembered.Notes(_cache() / "push", world.System())


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "covey"
