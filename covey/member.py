"""One member of etcd's cluster, begun the right way by itself: `covey etcd bootstrap`.

    look      at the data directory, at what peers say and can prove, at who else waits; decide (decide/bootstrap)
    wait      until that says how to begin; meanwhile tell at our own peer address that we wait
    run       etcd takes this process's place; or runs as its child while there is something left to do:
                  a newcomer gets its vote once it has caught up
                  a restored store gets a new history nonce (safety S18)

The same command with the same list of members runs on every host, at every start.
"""

import asyncio
import contextlib
import os
import shutil
import signal
import ssl
import urllib.parse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, NoReturn

import msgspec

from covey import durable, errors, settings
from covey import world as worlds
from covey.decide import bootstrap
from covey.store import (
    commit,
    commit_cloud,
    etcd,
    etcd_admin,
    etcd_backup,
    etcd_care,
    etcd_connect,
    etcd_flags,
    etcd_member,
    schema,
)

_LOOK_S = 0.5
_PROOF_S = 5.0
_PROMOTE_S = 24 * 3600.0

Say = Callable[[str], None]


class Plan(NamedTuple):
    """What the operator says. `more`: further flags of etcd, name → value."""

    name: str
    members: Mapping[str, str]
    data_dir: Path
    client_url: str
    listen_client: str
    listen_peer: str
    token: str
    quota_bytes: int
    rejoin: bool
    more: Mapping[str, str]

    @property
    def url(self) -> str:
        return self.members[self.name]


def check(plan: Plan) -> None:
    """Raises SettingError naming what is wrong and the remedy."""
    if plan.name not in plan.members:
        raise errors.SettingError(f"--name {plan.name} is not among --members {', '.join(plan.members)}")
    if len(set(plan.members.values())) < len(plan.members):
        raise errors.SettingError("--members gives two members the same address")
    if len(plan.members) > 1 and _loopback(plan.client_url) and not _loopback(plan.url):
        raise errors.SettingError(
            f"--client-url {plan.client_url} is what clients on other hosts are told: give an address that they reach"
        )


def _loopback(url: str) -> bool:
    return urllib.parse.urlsplit(url).hostname in ("127.0.0.1", "localhost", "::1")


# ---- look and wait -------------------------------------------------------------------------------------------------


class Found(NamedTuple):
    """How to begin, and where the cluster's clients' addresses are."""

    run: bootstrap.Run
    client_urls: tuple[str, ...]


async def prepare(plan: Plan, access: settings.Etcd, world: worlds.World, say: Say) -> Found:
    """Wait until it is known how to begin. Raises SettingError with one sentence when that needs the operator."""
    disk = etcd_member.on_disk(plan.data_dir)
    if disk is not None:
        etcd_member.forget_agreement(plan.data_dir)
        return await _decided(plan, disk, access, world, say)
    sign = etcd_member.Sign(plan.members, plan.token).text()

    def agreed() -> bool:
        return etcd_member.agreed(plan.data_dir, sign)

    await _listen(plan)  # one that does not fit ends before the others hear of it
    async with etcd_member.rendezvous(plan.name, sign, plan.listen_peer, _server_tls(plan), agreed):
        return await _decided(plan, disk, access, world, say)


async def _decided(
    plan: Plan, disk: bootstrap.Disk | None, access: settings.Etcd, world: worlds.World, say: Say
) -> Found:
    said = ""
    while True:
        heard, waiting = await _listen(plan)
        if disk is None or any(disk.member not in {known.id for known in one.members} for one in heard):
            heard = await asyncio.gather(*(_proved(plan, one, access, world) for one in heard))
        decision = bootstrap.decide(_me(plan), disk, heard, waiting)
        clients = tuple(url for one in heard for member in one.members for url in member.client_urls)
        match decision:
            case bootstrap.Run():
                return Found(decision, tuple(dict.fromkeys((*clients, plan.client_url))))
            case bootstrap.Refuse():
                raise errors.SettingError(decision.why)
            case bootstrap.Rejoin():
                if not plan.rejoin:
                    raise errors.SettingError(decision.why)
                await _rejoin(plan, decision.id, _to(access, clients), world, say)
            case bootstrap.Agree():
                etcd_member.agree(plan.data_dir, etcd_member.Sign(plan.members, plan.token).text())
                continue
            case bootstrap.Wait() if decision.why not in ("", said):
                said = decision.why
                say(f"{plan.name}: {said}")
        await asyncio.sleep(_LOOK_S)


def _me(plan: Plan) -> bootstrap.Me:
    ids = etcd_member.member_ids(plan.members, plan.token)
    agreed = etcd_member.agreed(plan.data_dir, etcd_member.Sign(plan.members, plan.token).text())
    cluster = etcd_member.cluster_id(ids)
    return bootstrap.Me(plan.name, plan.url, plan.members, str(plan.data_dir), cluster, frozenset(ids), agreed)


async def _listen(plan: Plan) -> tuple[list[bootstrap.Heard], dict[str, bool]]:
    """What is at the other members' addresses: clusters, and who waits. Raises SettingError when they were given
    another list."""
    tls = _client_tls(plan)
    others = {name: url for name, url in plan.members.items() if name != plan.name}
    words = await asyncio.gather(*(etcd_member.ask(url, tls) for url in others.values()))
    sign = etcd_member.Sign(plan.members, plan.token).text()
    for name, word in zip(others, words, strict=True):
        if isinstance(word, etcd_member.Waiting) and (word.name != name or word.sign != sign):
            raise errors.SettingError(
                f"{others[name]} waits as {word.name} with other --members or another --token than this one: give every"
                " host the same"
            )
    waiting = {word.name: word.agreed for word in words if isinstance(word, etcd_member.Waiting)}
    return [word for word in words if isinstance(word, bootstrap.Heard)], waiting


# etcd judges who may read after the linearizable read itself (etcdserver/v3_server.go Range)
_REFUSED_AFTER_READING = ("user name is empty", "permission denied")


async def _proved(plan: Plan, heard: bootstrap.Heard, access: settings.Etcd, world: worlds.World) -> bootstrap.Heard:
    """Have the member that told this list do a linearizable read, and ask it for its list again."""
    own = [url for one in heard.members if heard.url in one.peer_urls for url in one.client_urls]
    if not own:
        return heard._replace(doubt=f"the member at {heard.url} has just begun")
    store = etcd_connect.connect(there := _to(access, own), world)
    try:
        async with asyncio.timeout(_PROOF_S):
            await store.range(schema.FORMAT_KEY)
    except TimeoutError:
        return heard._replace(doubt=await etcd_connect.trouble(there) or "it has no leader")
    except errors.StoreError as error:
        if not any(text in str(error) for text in _REFUSED_AFTER_READING):
            return heard._replace(doubt=await etcd_connect.explain(there, error))
    finally:
        await store.close()
    again = await etcd_member.ask(heard.url, _client_tls(plan))
    return again._replace(doubt="") if isinstance(again, bootstrap.Heard) else heard._replace(doubt="it went away")


async def _rejoin(plan: Plan, id: int, access: settings.Etcd, world: worlds.World, say: Say) -> None:
    """Take the member whose data is lost out, and enter it anew without a vote."""
    store = etcd_connect.connect(access, world)
    try:
        now = await etcd_care.survey(store.admin)
        if any(one.member.id == id for one in now.standings):
            await etcd_care.remove(store.admin, f"{id:x}", say)
        await etcd_care.welcome(store.admin, [plan.url])
    except errors.StoreError as error:
        why = await etcd_connect.explain(access, error)
        raise errors.SettingError(
            f"{plan.name} cannot be entered anew: {why}; if a majority of the members is lost, restore a backup"
            " (covey etcd restore)"
        ) from error
    finally:
        await store.close()


def _to(access: settings.Etcd, urls: Sequence[str]) -> settings.Etcd:
    """The same certificates and login, to these members."""
    tls = access.etcd_tls or any(url.startswith("https://") for url in urls)
    targets = tuple(dict.fromkeys(etcd_admin.target(url) for url in urls))
    return msgspec.structs.replace(access, etcd_endpoints=targets, etcd_tls=tls)


# ---- TLS between members: etcd's own flags say what is used ---------------------------------------------------------


def _client_tls(plan: Plan) -> ssl.SSLContext | None:
    if not any(url.startswith("https://") for url in plan.members.values()):
        return None
    try:
        context = ssl.create_default_context(cafile=plan.more.get("peer-trusted-ca-file"))
        if "peer-cert-file" in plan.more:
            context.load_cert_chain(plan.more["peer-cert-file"], plan.more.get("peer-key-file"))
    except (OSError, ssl.SSLError) as error:
        raise errors.SettingError(f"--peer-trusted-ca-file, --peer-cert-file or --peer-key-file: {error}") from error
    return context


def _server_tls(plan: Plan) -> ssl.SSLContext | None:
    if not plan.listen_peer.startswith("https://"):
        return None
    if "peer-cert-file" not in plan.more:
        raise errors.SettingError(f"{plan.listen_peer} needs --peer-cert-file and --peer-key-file: add them after --")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_cert_chain(plan.more["peer-cert-file"], plan.more.get("peer-key-file"))
    except (OSError, ssl.SSLError) as error:
        raise errors.SettingError(f"--peer-cert-file or --peer-key-file: {error}") from error
    return context


# ---- run -----------------------------------------------------------------------------------------------------------


def arguments(plan: Plan, run: bootstrap.Run) -> tuple[str, ...]:
    """etcd's flags."""
    return etcd_flags.Run(
        name=plan.name,
        data_dir=str(plan.data_dir),
        listen_client=plan.listen_client,
        advertise_client=plan.client_url,
        listen_peer=plan.listen_peer,
        advertise_peer=plan.url,
        cluster=",".join(f"{name}={url}" for name, url in run.cluster.items()),
        state=run.state,
        token=plan.token,
        quota_bytes=plan.quota_bytes,
        more=tuple(f"--{name}={value}" for name, value in plan.more.items()),
    ).arguments()


def needs_care(plan: Plan, found: Found) -> bool:
    """Whether something is left to do once etcd runs."""
    return found.run.learner or etcd_backup.fresh_mark(plan.data_dir).exists()


def become(binary: str, flags: Sequence[str], environ: Mapping[str, str]) -> NoReturn:
    """etcd takes this process's place."""
    os.execve(binary, [binary, *flags], etcd_flags.environment(environ))  # noqa: S606 (no shell is wanted)


async def attend(
    plan: Plan,
    found: Found,
    access: settings.Etcd,
    world: worlds.World,
    binary: str,
    environ: Mapping[str, str],
    say: Say,
) -> int:
    """Run etcd as a child, do what is left to do, and end when it ends: its exit code."""
    guard = ["setpriv", "--pdeathsig", "TERM", "--"] if shutil.which("setpriv") else []
    process = await asyncio.create_subprocess_exec(
        *guard, binary, *arguments(plan, found.run), env=etcd_flags.environment(environ)
    )
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, _pass_on, process, number)
    caring = asyncio.create_task(_care(plan, found, access, world, say))
    code = await process.wait()
    caring.cancel()
    await asyncio.gather(caring, return_exceptions=True)
    if code in (-signal.SIGTERM, -signal.SIGINT):  # how etcd ends when it is asked to
        return 0
    return code if code >= 0 else 128 - code


def _pass_on(process: asyncio.subprocess.Process, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        process.send_signal(number)


async def _care(plan: Plan, found: Found, access: settings.Etcd, world: worlds.World, say: Say) -> None:
    """Said and left to the next start when it cannot be done."""
    store = etcd_connect.connect(_to(access, found.client_urls), world)
    try:
        if found.run.learner:
            await _vote(plan, store.admin, say)
        mark = etcd_backup.fresh_mark(plan.data_dir)
        if mark.exists():
            await _begin_history(store, world, say)
            durable.remove(mark)
    except errors.StoreError as error:
        say(f"{plan.name}: {await etcd_connect.explain(access, error)}")
    finally:
        await store.close()


async def _vote(plan: Plan, admin: etcd_admin.Admin, say: Say) -> None:
    while True:
        with contextlib.suppress(errors.Unavailable):
            mine = [one for one in await admin.members() if plan.url in one.peer_urls]
            if not mine:
                return
            await etcd_care.promote(admin, mine[0].id, _PROMOTE_S)
            say(f"{plan.name} has caught up and votes now")
            return
        await asyncio.sleep(_LOOK_S)


async def _begin_history(store: etcd.Etcd, world: worlds.World, say: Say) -> None:
    """The first nonce after a restore: it finds out, and enters the break (safety S18)."""
    writer = commit.Writer(store, world, who="covey etcd restore")
    try:
        while True:
            try:
                await commit_cloud.add_nonce(writer)
            except (errors.Unavailable, errors.Unsure):
                await asyncio.sleep(_LOOK_S)
                continue
            say("The restored store has a new history nonce: controllers and nodes find out by it")
            return
    finally:
        await writer.close()
