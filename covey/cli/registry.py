"""`covey registry …`: the server, and the care of what it stores.

The verbs work on the storage itself, not on a server: beside any number of running servers, or without one. They are
started where the storage can be reached, with the settings that the servers have.
"""

import asyncio
import functools
import os
from collections.abc import Awaitable, Callable, Mapping
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from covey import errors
from covey.cli import flags, out, servers

if TYPE_CHECKING:
    from covey import settings
    from covey.registry import roll_call as roll_calls
    from covey.registry import scrub as scrubbing
    from covey.registry import verify as verification

app = typer.Typer(invoke_without_command=True, subcommand_metavar="[COMMAND]")

T = TypeVar("T")
_SECRETS = frozenset({"REGISTRY_PEER_SECRET", "ETCD_PASSWORD"})  # what is in argv, all of this host see
_BasePath = Annotated[
    str | None, typer.Option("--base-path", metavar="PATH", help="The registry's data directory [COVEY_BASE_PATH].")
]


@app.callback()
@flags.of(servers.Part.REGISTRY, without=_SECRETS)
def registry(context: typer.Context, flags: flags.Flags) -> None:
    """Run one registry; any number of them may share one BASE_PATH. With a command: care of what it stores."""
    context.obj = flags
    if context.invoked_subcommand is None:
        servers.registry(flags)


@app.command()
def gc(
    context: typer.Context,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be kept and removed.")] = False,
    grace: Annotated[
        str | None,
        typer.Option(metavar="TIME", help="Instead of REGISTRY_GC_GRACE; a push that takes longer may fail."),
    ] = None,
    trash: Annotated[str | None, typer.Option(metavar="TIME", help="Instead of REGISTRY_GC_TRASH.")] = None,
    base_path: _BasePath = None,
    json: flags.Json = False,
) -> None:
    """Collect garbage now: say what is removed, and why the rest stays."""
    chosen = {"REGISTRY_GC_GRACE": grace, "REGISTRY_GC_TRASH": trash, "BASE_PATH": base_path}
    report = _work(context, chosen, lambda care: care.collector.run(dry_run=dry_run))
    if json:
        out.as_json(report)
        return
    rows = [
        (ruling.fate.value, str(ruling.digest), out.size(ruling.size_bytes), ruling.reason) for ruling in report.rulings
    ]
    rows += [("expire", one.name, out.size(one.size_bytes), "nothing moves in it any more") for one in report.leftovers]
    rows += [("forget", name, "", "a version that was replaced or taken back") for name in report.forgotten]
    if rows:
        out.table(("what", "which", "size", "why"), rows)
    kept = ", ".join(f"{count} {why}" for why, count in report.kept.items()) or "none"
    out.say(f"blobs kept: {kept}; {out.size(report.kept_bytes)}")
    out.say(f"{'would be' if dry_run else ''} freed: {out.size(report.freed_bytes)}".strip())


@app.command()
def scrub(
    context: typer.Context,
    speed: Annotated[str | None, typer.Option(metavar="N", help="Instead of REGISTRY_SCRUB_SPEED: MB/s.")] = None,
    base_path: _BasePath = None,
    json: flags.Json = False,
) -> None:
    """Read every blob now and compare it with its digest; damaged ones go to quarantine and are fetched again."""

    async def run(care: "_Care") -> "tuple[scrubbing.Progress, list[str]]":
        with out.progress("Reading") as bar:

            def on_blob(told: "scrubbing.Progress") -> None:
                bar(told.bytes, 0, f"{told.blobs} blobs, {out.size(told.bytes)}")

            found = await care.scrub.run(anew=True, on_blob=on_blob)
        return found, [str(digest) for digest in await care.scrub.heal()]

    found, healed = _work(context, {"REGISTRY_SCRUB_SPEED": speed, "BASE_PATH": base_path}, run)
    lost = [digest for digest in found.damaged if digest not in healed]
    if json:
        out.as_json({"blobs": found.blobs, "bytes": found.bytes, "damaged": list(found.damaged), "healed": healed})
    else:
        out.say(
            f"read {found.blobs} blobs, {out.size(found.bytes)};"
            f" {len(found.damaged)} damaged, {len(healed)} fetched again"
        )
        for digest in lost:
            out.say(f"in quarantine: {digest}; push it again")
    if lost:
        raise typer.Exit(1)


@app.command()
def verify(
    context: typer.Context,
    quick: Annotated[bool, typer.Option("--quick", help="Do not read the blobs' bytes.")] = False,
    base_path: _BasePath = None,
    json: flags.Json = False,
) -> None:
    """Check everything that is stored: every entry, every reference, every digest. Changes nothing."""

    async def run(care: "_Care") -> "verification.Report":
        with out.progress("Reading") as bar:
            return await care.verification(quick=quick).run(lambda count, size: bar(size, 0, f"{count} blobs"))

    report = _work(context, {"BASE_PATH": base_path}, run)
    if json:
        out.as_json(report)
    else:
        out.say(
            f"{report.repositories} repositories, {report.entries} entries, {report.manifests} manifests,"
            f" {report.blobs} blobs, {out.size(report.bytes)}{' (not read)' if quick else ''}"
        )
        for problem in report.problems:
            out.say(f"wrong: {problem}")
        out.say(f"{len(report.problems)} problems" if report.problems else "all is well")
    if report.problems:
        raise typer.Exit(1)


@app.command()
def promote(
    context: typer.Context,
    url: Annotated[str, typer.Argument(metavar="URL", help="The server that is to take pushes, as in REGISTRY_PEERS.")],
    force: Annotated[
        bool,
        typer.Option(
            "--force", help="Even if it lacks what only the present one has; that is then set aside, not lost."
        ),
    ] = False,
    json: flags.Json = False,
) -> None:
    """Make another server of a set of replicas the one that takes pushes."""
    from covey import settings
    from covey.registry import reign

    chosen = settings.registry(os.environ, context.obj)
    view = asyncio.run(reign.promote(chosen, url, force=force))
    if json:
        out.as_json(view)
        return
    out.say(f"{view.holder} takes pushes now (term {view.term})")


@app.command()
def status(context: typer.Context, json: flags.Json = False) -> None:
    """Show how all servers of a set of replicas stand. Exit status 1 when something is wrong."""
    from covey import settings
    from covey.registry import roll_call

    chosen = settings.registry(os.environ, context.obj)
    if chosen.replicas is None:
        raise errors.SettingError("REGISTRY_MODE is not replica or write-only here: run this with a server's settings")
    urls = (chosen.replicas.own_url, *chosen.replicas.peers)
    answers = asyncio.run(roll_call.ask(urls, ca_cert=chosen.ca_cert))
    disputes = roll_call.disputes(answers)
    if json:
        out.as_json(answers)
    else:
        out.table(("server", "role", "term", "lag", "behind", "missing", "aside"), [_row(one) for one in answers])
        for one in answers:
            if one.trouble:
                out.say(f"{one.url}: {one.trouble}")
            if one.seen is not None:
                for name, count in one.seen.aside.items():
                    out.say(f"{one.url}: {count} entries of {name} were set aside")
                for digest in one.seen.nowhere:
                    out.say(f"{one.url}: no server has {digest}")
        for text in disputes:
            out.say(text)
    if disputes or any(one.trouble for one in answers):
        raise typer.Exit(1)


def _row(one: "roll_calls.Answer") -> tuple[str, ...]:
    seen = one.seen
    if seen is None:
        return (one.url, "?", "", "", "", "", "")
    return (
        one.url,
        "takes pushes" if seen.mine else "follows",
        str(seen.term),
        f"{seen.lag_s:g} s",
        out.size(seen.lag_bytes),
        str(seen.missing_blobs),
        str(sum(seen.aside.values())),
    )


class _Care:
    """What the verbs work with: a storage, and who takes care of it."""

    def __init__(self, chosen: "settings.Registry") -> None:
        from covey import world
        from covey.registry import catalog, service, upkeep, verify

        config = service.configured(chosen)
        if config.bucket is None and not (chosen.base_path / "format").exists():
            raise errors.SettingError(f"BASE_PATH {chosen.base_path} holds no registry")
        system = world.System()
        self._storage = service.storage_of(config, os.environ, system)
        self.open, self.close = self._storage.open, self._storage.close
        care, log_care = self._storage.care, self._storage.log_care
        held = self._storage.replica
        known = catalog.Catalog(
            self._storage.content,
            self._storage.logs,
            system,
            deletes=chosen.registry_deletes and held is None,  # of several disks' logs, only the push registry writes
            eras=None if held is None else held.eras,
        )
        working = upkeep.Upkeep(known, care, log_care, system, upkeep.of(chosen), held=held)
        self.collector, self.scrub = working.collector, working.scrub
        self.verification = functools.partial(verify.Verification, known, care, log_care)


def _work(context: typer.Context, more: Mapping[str, object], work: Callable[[_Care], Awaitable[T]]) -> T:
    """Do `work` on the storage that the settings name; `more` are options of the verb itself."""
    from covey import observe, settings

    given = {name: value for name, value in more.items() if value is not None}
    chosen = settings.registry(os.environ, {**context.obj, **given})
    observe.configure(json=chosen.log_json, level="warning")

    async def run() -> T:
        care = _Care(chosen)
        try:
            await care.open()
            return await work(care)
        finally:
            care.close()

    return asyncio.run(run())
