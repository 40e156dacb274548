"""`covey etcd …`: the care of etcd. These commands talk to etcd itself, so they work while no controller does."""

import asyncio
import os
import secrets
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import msgspec
import typer

from covey import errors, settings_table
from covey.cli import flags, out

if TYPE_CHECKING:
    from covey import member as etcd_program
    from covey import settings
    from covey.store import etcd, etcd_admin, etcd_care, schema

app = typer.Typer(help="etcd, which holds all control state: its members, backups and space.", no_args_is_help=True)

T = TypeVar("T")
Part = settings_table.Part
_ACCESS = flags.of(Part.ETCD)
_Name = Annotated[str, typer.Argument(help="A member's name or id.", metavar="MEMBER")]
_Members = Annotated[
    str, typer.Option("--members", help="All members, the same on every host.", metavar="NAME=PEER_URL,…")
]
_Force = Annotated[bool, typer.Option("--force", help="Also when writes stop meanwhile.")]


def _on_etcd(given: flags.Flags, work: "Callable[[etcd.Etcd, settings.Etcd], Awaitable[T]]") -> T:
    """Do something with a client of etcd; what goes wrong becomes one sentence."""
    from covey import observe, settings, world
    from covey.store import etcd_connect

    access = settings.etcd(os.environ, given)
    observe.configure(json=None, level="error")

    async def run() -> T:
        if why := await etcd_connect.trouble(access):
            raise errors.Unavailable(why)
        store = etcd_connect.connect(access, world.System())
        try:
            return await work(store, access)
        except errors.StoreError as error:
            raise errors.StoreError(await etcd_connect.explain(access, error)) from error
        finally:
            await store.close()

    return asyncio.run(run())


# ---- looking -------------------------------------------------------------------------------------------------------


class _Shown(msgspec.Struct, frozen=True, kw_only=True):
    """One member, as programs read it."""

    name: str
    id: str
    address: str
    role: str
    version: str
    behind: int
    size_bytes: int
    used_bytes: int
    quota_bytes: int
    alarms: list[str]
    trouble: str


@app.command()
@_ACCESS
def status(flags: flags.Flags, json: flags.Json = False) -> None:
    """Show every member: who leads, who lags, how full each one is, which alarms are raised. Ends with 1 when
    something is wrong."""
    from covey.store import etcd_care, etcd_connect

    async def run(
        store: "etcd.Etcd", access: "settings.Etcd"
    ) -> "tuple[etcd_care.Survey, list[int], schema.Backup | None, schema.Defrag | None]":
        found = await etcd_care.survey(store.admin)
        tls = etcd_connect.ssl_context(access) if access.etcd_tls else None
        asked = [asyncio.to_thread(etcd_care.quota_bytes, one.address, tls) for one in found.standings]
        chores = await asyncio.gather(etcd_care.last_backup(store), etcd_care.last_defrag(store))
        return found, list(await asyncio.gather(*asked)), *chores

    survey, quotas, backup, defrag = _on_etcd(flags, run)
    shown = [_shown(survey, one, quota) for one, quota in zip(survey.standings, quotas, strict=True)]
    troubles = etcd_care.troubles(survey)
    if json:
        out.as_json({"members": shown, "backup": backup, "defrag": defrag, "troubles": troubles})
    else:
        columns = ("member", "address", "role", "version", "behind", "size", "in use", "quota", "alarms")
        out.table(columns, [_row(one) for one in shown])
        if backup is not None:
            out.say(_told(backup))
        if defrag is not None:
            out.say(_told_of_defrag(defrag))
        for trouble in troubles:
            out.say(f"! {trouble}")
    if troubles:
        raise typer.Exit(1)


def _told(backup: "schema.Backup") -> str:
    """The last scheduled backup in a line."""
    if not backup.at_ns:
        return f"No scheduled backup was made yet: {backup.trouble}"
    when = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(backup.at_ns / 1e9))
    failed = f"; since then: {backup.trouble}" if backup.trouble else ""
    return f"Last scheduled backup: {when}, {out.size(backup.size_bytes)}, {backup.file}{failed}"


def _told_of_defrag(done: "schema.Defrag") -> str:
    if not done.at_ns:
        return f"No scheduled defragmentation was done yet: {done.trouble}"
    when = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(done.at_ns / 1e9))
    what = f"{out.size(done.freed_bytes)} of {', '.join(done.members)}" if done.members else "nothing was worth it"
    failed = f"; since then: {done.trouble}" if done.trouble else ""
    return f"Last scheduled defragmentation: {when}, {what}{failed}"


def _shown(survey: "etcd_care.Survey", one: "etcd_care.Standing", quota: int) -> _Shown:
    word = one.status
    role = "leader" if one.leads else "learner" if one.member.learner else "follower"
    return _Shown(
        name=one.member.name,
        id=f"{one.member.id:x}",
        address=one.address,
        role=role if word else "not started" if not one.member.name else "no answer",
        version=word.version if word else "",
        behind=one.behind,
        size_bytes=word.size_bytes if word else 0,
        used_bytes=word.used_bytes if word else 0,
        quota_bytes=quota,
        alarms=[alarm.name for alarm in survey.alarms if alarm.member_id == one.member.id],
        trouble="; ".join(word.troubles) if word else "",
    )


def _row(one: _Shown) -> tuple[str, ...]:
    well = bool(one.version)
    return (
        one.name or one.id,
        one.address,
        one.role,
        one.version,
        str(one.behind) if well else "",
        out.size(one.size_bytes) if well else "",
        out.size(one.used_bytes) if well else "",
        out.size(one.quota_bytes) if one.quota_bytes else "",
        ",".join(one.alarms),
    )


@app.command()
@_ACCESS
def alarms(
    flags: flags.Flags,
    disarm: Annotated[bool, typer.Option("--disarm", help="End them, once their cause is mended.")] = False,
) -> None:
    """Show alarms that members have raised: NOSPACE (etcd is full), CORRUPT. Ends with 1 when there are any."""

    async def run(store: "etcd.Etcd", _: "settings.Etcd") -> list[str]:
        from covey.store import etcd_care

        if disarm:
            await etcd_care.disarm(store.admin)
        names = {member.id: member.name for member in await store.admin.members()}
        return [f"{names.get(one.member_id, f'{one.member_id:x}')}: {one.name}" for one in await store.admin.alarms()]

    found = _on_etcd(flags, run)
    for line in found:
        out.say(line)
    if found:
        raise typer.Exit(1)
    out.say("No alarm is raised")


# ---- space ---------------------------------------------------------------------------------------------------------


@app.command()
@_ACCESS
def compact(flags: flags.Flags) -> None:
    """Drop history older than 15 minutes, counted from now on: controllers do the same each minute, so this is for an
    etcd without one."""

    async def run(store: "etcd.Etcd", _: "settings.Etcd") -> int:
        from covey import world
        from covey.store import etcd_care

        return await etcd_care.compact(store, world.System(), out.note)

    out.say(f"Compacted up to revision {_on_etcd(flags, run)}")


@app.command()
@_ACCESS
def defrag(
    flags: flags.Flags,
    member: Annotated[list[str] | None, typer.Argument(help="Only these.", metavar="[MEMBER…]")] = None,
    force: _Force = False,
) -> None:
    """Give space back to the file system, on one member after the other; the leader hands over first."""

    async def run(store: "etcd.Etcd", _: "settings.Etcd") -> None:
        from covey.store import etcd_care

        await etcd_care.defragment(store.admin, out.say, member or (), force=force)

    _on_etcd(flags, run)


# ---- members -------------------------------------------------------------------------------------------------------


@app.command()
@_ACCESS
def remove(flags: flags.Flags, member: _Name, force: _Force = False) -> None:
    """Take a member out of the cluster for good."""

    async def run(store: "etcd.Etcd", _: "settings.Etcd") -> None:
        from covey.store import etcd_care

        await etcd_care.remove(store.admin, member, out.say, force=force)

    _on_etcd(flags, run)


_PeerUrl = Annotated[str, typer.Option("--peer-url", help="Where the new machine is for its peers.")]
_Wait = Annotated[str, typer.Option("--wait", help="How long to wait until it votes.", metavar="TIME")]


@app.command()
@_ACCESS
def add(
    flags: flags.Flags,
    name: Annotated[str, typer.Argument(help="The new member's name.", metavar="NAME")],
    peer_url: _PeerUrl,
    wait: _Wait = "10m",
) -> None:
    """Let the cluster grow by one member, as from one to three; waits until the newcomer has caught up and votes."""
    from covey import settings_reader

    wait_s = settings_reader.duration_s(wait)

    async def run(store: "etcd.Etcd", _: "settings.Etcd") -> None:
        from covey.store import etcd_care

        url = peer_url.rstrip("/")
        how = _how_to_begin(await store.admin.members(), name)
        await etcd_care.add(store.admin, name, url, out.say, how, wait_s=wait_s)

    _on_etcd(flags, run)


@app.command()
@_ACCESS
def replace(
    flags: flags.Flags,
    member: _Name,
    peer_url: _PeerUrl,
    name: Annotated[str, typer.Option("--name", help="The new member's name; by default the old one's.")] = "",
    wait: _Wait = "10m",
) -> None:
    """Put a new machine in the place of a member, lost or not; waits until the newcomer has caught up and votes."""
    from covey import settings_reader

    wait_s = settings_reader.duration_s(wait)

    async def run(store: "etcd.Etcd", _: "settings.Etcd") -> None:
        from covey.store import etcd_care

        others = [one for one in await store.admin.members() if one.name != member]
        how = _how_to_begin(others, name or member)
        await etcd_care.replace(store.admin, member, peer_url.rstrip("/"), out.say, how, wait_s=wait_s)

    _on_etcd(flags, run)


def _how_to_begin(others: "Sequence[etcd_admin.Member]", name: str) -> Callable[[str], None]:
    """Says what to run on a new member's machine, given its peer URL."""
    listed = {one.name: one.peer_urls[0] for one in others if one.name}

    def how(url: str) -> None:
        members = ",".join(f"{each}={at}" for each, at in sorted({**listed, name: url}.items()))
        out.say(f"Run there: covey etcd bootstrap --name {name} --members {members} --data-dir DIR")

    return how


# ---- backups -------------------------------------------------------------------------------------------------------


@app.command()
@_ACCESS
def backup(flags: flags.Flags, file: Annotated[Path, typer.Argument(help="Where to.", metavar="FILE")]) -> None:
    """Write a backup of the whole store, proved, while everything runs."""
    from covey.store import etcd_backup

    async def run(store: "etcd.Etcd", _: "settings.Etcd") -> etcd_backup.Taken:
        from covey import world

        return await etcd_backup.take(store, file, world.System(), "covey etcd backup")

    taken = _on_etcd(flags, run)
    if taken.trouble:
        out.note(taken.trouble)
    content = taken.content
    out.say(
        f"{file}: {out.size(content.size_bytes)}, revision {content.revision}, "
        f"{f'cloud {content.cloud}' if content.cloud else 'no Covey cloud'}, {taken.took_s:.1f} s"
    )


@app.command()
def restore(
    file: Annotated[Path, typer.Argument(help="A backup.", metavar="FILE", exists=True, dir_okay=False)],
    name: Annotated[str, typer.Option("--name", help="This member's name.")],
    members: _Members,
    data_dir: Annotated[Path, typer.Option("--data-dir", help="Where its data is to be; must be empty.")],
    token: Annotated[
        str, typer.Option("--token", help="The new cluster's token, as the first host printed it.", metavar="TOKEN")
    ] = "",
    etcd_binary: Annotated[str, typer.Option(envvar="COVEY_ETCD_BINARY", help="etcd, beside etcdctl.")] = "",
) -> None:
    """Make this host's data directory from a backup. Run it on every member's host with the same file, all of them
    stopped; the first prints what to run on the others."""
    from covey.store import etcd_backup

    chosen = token or f"covey-restored-{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}-{secrets.token_hex(3)}"
    listed = _listed(members)
    place = etcd_backup.Place(name, listed, data_dir.absolute(), chosen)
    content = etcd_backup.restore(file, place, etcd_binary)
    out.say(f"{data_dir} holds the store at revision {content.revision}, as member {name} of the new cluster {chosen}")
    if not token:
        for other in listed:
            if other != name:
                out.say(
                    f"Run at {other}: covey etcd restore {file} --name {other} --members {members} --token {chosen}"
                    f" --data-dir {data_dir}"
                )
    out.say("When all have it: start them as before (covey etcd bootstrap …, or etcd's own service)")


# ---- beginning -----------------------------------------------------------------------------------------------------


@app.command()
@flags.of(Part.ETCD, without=frozenset({"ETCD_ENDPOINTS"}))
def bootstrap(
    flags: flags.Flags,
    name: Annotated[str, typer.Option("--name", help="This host's member.")],
    members: _Members,
    data_dir: Annotated[Path, typer.Option("--data-dir", help="Where its data is kept.")],
    more: Annotated[
        list[str] | None, typer.Argument(help="After --: further flags for etcd.", metavar="[-- ETCD_FLAG…]")
    ] = None,
    client_url: Annotated[
        str, typer.Option("--client-url", help="Where clients reach it [its peer URL's host, port 2379]")
    ] = "",
    listen_client_urls: Annotated[str, typer.Option(help="Where it listens for clients [--client-url]")] = "",
    listen_peer_urls: Annotated[str, typer.Option(help="Where it listens for peers [its peer URL]")] = "",
    token: Annotated[str, typer.Option("--token", help="The cluster's token, the same on every host [covey]")] = "",
    quota_bytes: Annotated[int, typer.Option(help="How large its database may get.", min=1 << 20)] = 8 << 30,
    rejoin: Annotated[
        bool, typer.Option("--rejoin", help="If this member's data is lost: remove it and enter it anew.")
    ] = False,
    show: Annotated[bool, typer.Option("--print", help="Only print etcd's command, once it is known.")] = False,
    etcd_binary: Annotated[str, typer.Option(envvar="COVEY_ETCD_BINARY", help="etcd [on the PATH]")] = "",
) -> None:
    """Run this host's member of etcd. The same command on every host, with the same members, at every start: it finds
    out by itself whether the cluster is new, goes on, or is to be joined."""
    from covey import member as etcd_program
    from covey import settings, up, world
    from covey.store import etcd_flags

    listed = _listed(members)
    url = listed.get(name, "")
    client = client_url.rstrip("/") or _client_url(url)
    plan = etcd_program.Plan(
        name=name,
        members=listed,
        data_dir=data_dir.absolute(),
        client_url=client,
        listen_client=listen_client_urls or client,
        listen_peer=listen_peer_urls or url,
        token=token or etcd_flags.TOKEN,
        quota_bytes=quota_bytes,
        rejoin=rejoin,
        more=etcd_flags.further(tuple(more or ())),
    )
    etcd_program.check(plan)
    access = settings.etcd(os.environ, flags)
    binary = up.etcd_binary(etcd_binary)
    found = asyncio.run(etcd_program.prepare(plan, access, world.System(), out.note))
    arguments = etcd_program.arguments(plan, found.run)
    if show:
        out.say(" ".join((binary, *arguments)))
        return
    out.note(f"{name}: {_how(plan, found)}")
    if etcd_program.needs_care(plan, found):
        work = etcd_program.attend(plan, found, access, world.System(), binary, os.environ, out.note)
        raise typer.Exit(asyncio.run(work))
    etcd_program.become(binary, arguments, os.environ)


def _how(plan: "etcd_program.Plan", found: "etcd_program.Found") -> str:
    if found.run.learner:
        return "joins the cluster; it has no vote until it has caught up"
    if found.run.state == "new":
        return f"begins the new cluster of {', '.join(found.run.cluster)}"
    return f"goes on with {plan.data_dir}" if any(plan.data_dir.glob("member/wal/*.wal")) else "joins the cluster"


def _listed(text: str) -> dict[str, str]:
    """name=url,… Raises SettingError."""
    from covey import settings_reader

    found: dict[str, str] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, mark, url = part.partition("=")
        try:
            found[name.strip()] = settings_reader.url(url.strip()) if mark and name.strip() and url.strip() else ""
        except ValueError:
            found[name.strip()] = ""
        if not found[name.strip()]:
            raise errors.SettingError(f"--members: {part!r} is not NAME=PEER_URL, such as n1=http://10.0.0.1:2380")
    if not found:
        raise errors.SettingError("--members is empty: list all, such as n1=http://10.0.0.1:2380,n2=…")
    return found


def _client_url(peer_url: str) -> str:
    scheme, _, rest = peer_url.partition("://")
    host = rest.rpartition(":")[0] if ":" in rest.rpartition("]")[2] else rest
    return f"{scheme}://{host}:2379"
