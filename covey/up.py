"""The whole cloud in one command: etcd, registry, controller, and on request synthetic nodes, as one process tree.

Each part is a program of its own, the same that runs in a large installation, configured by the environment that it
is given here; `supervise` keeps them running. Below DATA_DIR: etcd/ (one member), etcd.log, registry/, nodes/,
ports.json (ports that were picked, used again at the next start when they are free), standalone.lock.

Several hosts that each run this, with etcd members of one cluster (INITIAL_CLUSTER) and registries of one set
(REGISTRY_PEERS), are one cloud. Each waits at its start for a majority of etcd, which answers nobody before, but then
not for its controller to be ready.
"""

import asyncio
import contextlib
import errno
import http.client
import json
import os
import shutil
import signal
import socket
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import msgspec

from covey import durable, errors, settings, supervise
from covey.store import etcd_flags

Say = Callable[[str], None]
Address = settings.Address


class Where(msgspec.Struct, frozen=True, kw_only=True):
    """The addresses of one running cloud, once ports are picked."""

    controller: Address
    registry: Address | None
    etcd_client: str = ""  # URL; "": somebody else's etcd
    etcd_peer: str = ""


async def run(
    chosen: settings.Standalone,
    environ: Mapping[str, str],
    say: Say,
    *,
    etcd: bool = True,
    registry: bool = True,
) -> None:
    """Start everything, print where it listens, keep it running until SIGTERM or Ctrl-C, stop it in order."""
    with _sole_user(chosen.data_dir):
        binary = etcd_binary(chosen.etcd_binary) if etcd else ""
        where = places(chosen, etcd=etcd, registry=registry)
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop.set)
        children: list[supervise.Child] = []
        try:
            for program in _programs(chosen, where, environ, binary):
                children.append(supervise.Child(program, say))
                if not await _start(children[-1], stop):
                    return
            _welcome(chosen, where, say)
            await stop.wait()
            say("Stopping")
        finally:
            for child in reversed(children):
                await child.stop()


async def _start(child: supervise.Child, stop: asyncio.Event) -> bool:
    """False when the user changed their mind meanwhile."""
    starting = asyncio.create_task(child.start())
    stopping = asyncio.create_task(stop.wait())
    await asyncio.wait((starting, stopping), return_when=asyncio.FIRST_COMPLETED)
    if stop.is_set():
        starting.cancel()
        with contextlib.suppress(asyncio.CancelledError, errors.SettingError):
            await starting
        return False
    stopping.cancel()
    await starting
    return True


def _welcome(chosen: settings.Standalone, where: Where, say: Say) -> None:
    controller = base_url(where.controller)
    say(f"The controller listens on {controller}")
    if where.registry is not None:
        say(f"The registry listens on   {base_url(where.registry)}")
    if where.etcd_client:
        say(f"etcd listens on           {where.etcd_client}")
    say(f"Data is kept in           {chosen.data_dir}")
    if chosen.nodes:
        say(f"Synthetic nodes           {chosen.nodes}")
        say(f"Next: covey node list --controller {controller}")
    else:
        say(f"Next: covey join {controller}")


# ---- the programs ----------------------------------------------------------------------------------------------


def _programs(
    chosen: settings.Standalone, where: Where, environ: Mapping[str, str], binary: str
) -> Iterator[supervise.Program]:
    """In the order of starting."""
    covey = (sys.executable, "-m", "covey")
    common = {name: text for name, text in environ.items() if name not in _OF_THE_SET}
    common |= {"COVEY_STANDALONE": "false", "COVEY_RUN_REGISTRY": "false", "COVEY_NODES": "0"}
    patience_s = chosen.shutdown_delay_s + chosen.graceful_shutdown_timeout_s + 5
    if where.etcd_client:
        yield _etcd(chosen, where, binary, environ)
        common["COVEY_ETCD_ENDPOINTS"] = where.etcd_client
    if where.registry is not None:
        env = {
            "COVEY_LISTEN_ADDR": str(where.registry),
            "COVEY_BASE_PATH": str(chosen.registry_base_path),
            "COVEY_REGISTRY_WORKERS": str(chosen.registry_workers),
            **_set_of(chosen),
        }
        if chosen.metrics is not None and chosen.metrics.port:
            env["COVEY_METRICS_PORT"] = str(chosen.metrics.port + 1)
        yield supervise.Program(
            "registry", (*covey, "registry"), {**common, **env}, _readyz(where.registry), stop_s=patience_s
        )
    env = {"COVEY_LISTEN_ADDR": str(where.controller)}
    if where.registry is not None:
        peers = () if chosen.replicas is None else chosen.replicas.peers
        env["COVEY_LOCAL_ANKA_REGISTRY"] = ",".join((base_url(where.registry), *peers))
        env["COVEY_ANKA_REGISTRY"] = ",".join(chosen.registries or _pulled_from(chosen.replicas, where.registry))
    begun = _livez(where.controller) if _one_of_several(chosen) else _readyz(where.controller)
    yield supervise.Program("controller", (*covey, "controller"), {**common, **env}, begun, stop_s=patience_s)
    if chosen.nodes:
        env = {
            "COVEY_CONTROLLER": base_url(where.controller),
            "COVEY_DATA_DIR": str(chosen.data_dir / "nodes"),
            "COVEY_HYPERVISOR": "synthetic",
            "COVEY_NODES": str(chosen.nodes),
        }
        yield supervise.Program("nodes", (*covey, "agent"), {**common, **env}, _at_once)


_OF_THE_SET = frozenset(
    f"{prefix}_{name}" for prefix in ("COVEY", "ANKA") for name in ("REGISTRY_MODE", *settings.OF_REPLICAS)
)


def _set_of(chosen: settings.Standalone) -> dict[str, str]:
    """What the registry is told of others."""
    told = {"COVEY_REGISTRY_MODE": chosen.registry_mode}
    replicas = chosen.replicas
    if replicas is not None:
        told |= {
            "COVEY_REGISTRY_ADVERTISE_URL": replicas.own_url,
            "COVEY_REGISTRY_PEERS": ",".join(replicas.peers),
            "COVEY_REGISTRY_PEER_SECRET": replicas.registry_peer_secret,
            "COVEY_REGISTRY_PUSH_COPIES": str(replicas.push_copies),
        }
    if replicas is not None and replicas.push_url:
        told |= {"COVEY_REGISTRY_PUSH": replicas.push_url, "COVEY_ETCD_ENDPOINTS": "", "ANKA_ETCD_ENDPOINTS": ""}
    return told


def _pulled_from(replicas: settings.Replicas | None, own: Address) -> tuple[str, ...]:
    """Where nodes pull from, if nobody says."""
    if replicas is None:
        return (base_url(own, outward=True),)
    return replicas.peers if replicas.write_only else (replicas.own_url, *replicas.peers)


def _one_of_several(chosen: settings.Standalone) -> bool:
    """Whether the built-in etcd has a majority only together with other hosts."""
    return "," in chosen.initial_cluster or chosen.initial_cluster_state == "existing"


def _etcd(chosen: settings.Standalone, where: Where, binary: str, environ: Mapping[str, str]) -> supervise.Program:
    """One member with fsync, pre-vote, a quota, and compaction of what is older than the retention (safety S28)."""
    client, peer = where.etcd_client, where.etcd_peer
    advertised_peer = ",".join(chosen.initial_advertise_peer_urls) or peer
    member = etcd_flags.Run(
        name=chosen.etcd_name,
        data_dir=str(chosen.data_dir / "etcd"),
        listen_client=client,
        advertise_client=",".join(chosen.advertise_client_urls) or client,
        listen_peer=peer,
        advertise_peer=advertised_peer,
        cluster=chosen.initial_cluster or f"{chosen.etcd_name}={advertised_peer}",
        state=chosen.initial_cluster_state,
        token=chosen.initial_cluster_token,
        retention_s=chosen.auto_compaction_retention_s,
    )
    return supervise.Program(
        "etcd",
        (binary, *member.arguments()),
        etcd_flags.environment(environ),
        _answers(client.split(",")[0], "/health", majority=not _one_of_several(chosen)),
        log=chosen.data_dir / "etcd.log",
    )


def etcd_binary(named: str) -> str:
    """The etcd program: the one named, else that on the PATH. Raises SettingError with the remedy."""
    found = shutil.which(named or "etcd")
    if found is not None:
        return found
    if named:
        raise errors.SettingError(f"COVEY_ETCD_BINARY: {named} is not a program that can be run")
    raise errors.SettingError(
        "etcd is not installed: install it (Debian: apt-get install etcd-server) or name it in COVEY_ETCD_BINARY"
    )


def _readyz(address: Address) -> Callable[[], "asyncio.Future[bool]"]:
    return _answers(base_url(address), "/readyz")


def _livez(address: Address) -> Callable[[], "asyncio.Future[bool]"]:
    return _answers(base_url(address), "/livez")


def _answers(base: str, path: str, *, majority: bool = True) -> Callable[[], "asyncio.Future[bool]"]:
    """Asks once whether a server answers 200; unless it needs a `majority`, 503 is an answer too. The supervisor needs
    no more of HTTP than this."""
    host = base.partition("://")[2].partition("/")[0]

    def ask() -> bool:
        connection = http.client.HTTPConnection(host, timeout=2)
        try:
            connection.request("GET", path)
            return connection.getresponse().status in ((200,) if majority else (200, 503))
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()

    return lambda: asyncio.get_running_loop().run_in_executor(None, ask)


async def _at_once() -> bool:
    return True


# ---- places ----------------------------------------------------------------------------------------------------


def base_url(address: Address, *, outward: bool = False) -> str:
    """The URL of a server that listens there; for one on every interface loopback, or the host's `outward` address."""
    host = address.host
    if host in ("", "0.0.0.0", "::"):  # noqa: S104 (compared, not listened on)
        host = _outward_ip() if outward else "127.0.0.1"
    return f"http://{Address(host, address.port)}"


def _outward_ip() -> str:
    """This host's address on the way to others. Nothing is sent: connecting UDP only looks up the route."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # a documentation address, RFC 5737
        except OSError:
            return "127.0.0.1"
        return str(probe.getsockname()[0])


def free_port(host: str) -> int:
    """A port that nobody listens on now, of the kernel's choice."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


def places(
    chosen: settings.Standalone, *, etcd: bool, registry: bool, offer: Callable[[str], int] = free_port
) -> Where:
    """Check the ports that were asked for and take the others from `offer`. Raises SettingError naming a taken one."""
    file = chosen.data_dir / "ports.json"
    kept = _read_ports(file)
    picked: dict[str, int] = {}

    def settle(name: str, asked: Address, setting: str) -> Address:
        if asked.port:
            check_free(asked, setting)
            return asked
        port = kept.get(name, 0)
        while not port or port in picked.values() or not _free(Address(asked.host, port)):
            port = offer(asked.host)  # the kernel may give the same one twice
        picked[name] = port
        return Address(asked.host, port)

    loopback = Address("127.0.0.1", 0)
    client = peer = ""
    if etcd:
        client = ",".join(chosen.listen_client_urls) or f"http://{settle('etcd-client', loopback, '')}"
        peer = ",".join(chosen.listen_peer_urls) or f"http://{settle('etcd-peer', loopback, '')}"
    where = Where(
        controller=settle("controller", chosen.listen, "--listen-addr"),
        registry=settle("registry", chosen.registry_listen, "--registry-listen-address") if registry else None,
        etcd_client=client,
        etcd_peer=peer,
    )
    file.write_text(json.dumps({**kept, **picked}))
    return where


def _read_ports(file: Path) -> dict[str, int]:
    try:
        return msgspec.json.decode(file.read_bytes(), type=dict[str, int])
    except (FileNotFoundError, msgspec.MsgspecError, UnicodeDecodeError):  # a torn file only costs other ports
        return {}


def check_free(address: Address, setting: str) -> None:
    """Raises SettingError when somebody listens there."""
    if not _free(address):
        raise errors.SettingError(f"{address} is taken by another program: stop that, or choose another with {setting}")


def _free(address: Address) -> bool:
    family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((address.host, address.port))
        except PermissionError as error:
            raise errors.SettingError(f"{address}: only root may listen on ports below 1024") from error
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                return False
            raise errors.SettingError(f"{address}: cannot listen there: {error.strerror or error}") from error
    return True


@contextlib.contextmanager
def _sole_user(data_dir: Path) -> Iterator[None]:
    """One service per data directory: the lock is the kernel's and ends with the process."""
    try:
        data_dir.mkdir(parents=True, exist_ok=True)
        lock = durable.lock(data_dir / "standalone.lock")
    except BlockingIOError:
        raise errors.SettingError(
            f"another `covey standalone` runs on {data_dir}: stop it, or choose another place with --data-dir"
        ) from None
    except OSError as error:
        raise errors.SettingError(
            f"DATA_DIR {data_dir} cannot be written ({error.strerror}): choose another with --data-dir"
        ) from error
    try:
        yield
    finally:
        os.close(lock)
