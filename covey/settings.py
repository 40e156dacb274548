"""Settings: flags over environment over file over default, read once into a frozen struct per program.

* ``COVEY_X`` and ``ANKA_X`` mean the same; COVEY wins. An empty variable is an unset one.
* The file is TOML: ``/etc/covey/covey.toml`` or what ``COVEY_CONFIG`` names. Keys are the settings' names in lower
  case; those below ``[controller]``, ``[registry]``, ``[agent]``, ``[standalone]`` are for that program alone and win.
* What cannot be honoured stops the start (`errors.SettingError`, one sentence with the remedy): a malformed value, a
  feature that is not built. What does no harm is a notice, which the program logs once.

Nothing here reads the environment by itself: it arrives as an argument. The rows are in `settings_table`.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import msgspec

from covey import errors, settings_reader, settings_table

Part = settings_table.Part
Address = settings_reader.Address
TABLE = settings_table.TABLE

Flags = settings_reader.Flags
NO_FLAGS: Flags = {}


class _Settings(msgspec.Struct, frozen=True, kw_only=True):
    """What every program has. `notices`: sentences to log once at start."""

    failpoints: str
    log_level: str
    log_json: bool | None
    log_dir: Path | None  # None: to stderr only
    notices: tuple[str, ...]


class Tls(msgspec.Struct, frozen=True, kw_only=True):
    """With what a server proves who it is (files in PEM), and what it takes. `ciphers` (): the library's."""

    cert: Path
    key: Path
    lowest: str = "1.2"
    highest: str = "1.3"
    ciphers: tuple[str, ...] = ()


class Metrics(msgspec.Struct, frozen=True, kw_only=True):
    """Where figures are told."""

    port: int
    path: str


class Controller(_Settings, frozen=True, kw_only=True):
    """A controller replica. Endpoints of etcd are host:port."""

    tls: Tls | None  # None: plain HTTP
    ca_cert: Path | None  # believed where registries are reached by https
    listen: settings_reader.Address
    advertise_url: str  # "": nodes do not learn of this controller
    etcd_endpoints: tuple[str, ...]
    etcd_request_timeout_s: float
    etcd_tls: bool
    etcd_ca_cert: Path | None
    etcd_cert: Path | None
    etcd_cert_key: Path | None
    etcd_username: str
    etcd_password: str
    etcd_backup_dir: Path | None  # None: no backups are made
    etcd_backup_interval_s: float
    etcd_backup_keep: int
    defrag_db_interval_s: float  # 0: never
    metrics: Metrics | None
    registries: tuple[str, ...]  # those that nodes use
    local_registries: tuple[str, ...]  # those that the controller itself uses
    push_registries: tuple[str, ...]  # those that are pushed to
    instance_time_out_s: float
    instance_active_timeout_s: float
    node_active_timeout_s: float
    unknown_vm_threshold_s: float
    graceful_shutdown_timeout_s: float
    shutdown_delay_s: float
    trusted_proxies: tuple[settings_reader.Network, ...]
    heartbeat_s: float
    priority: int
    standalone: bool
    run_registry: bool


class S3(msgspec.Struct, frozen=True, kw_only=True):
    """A bucket that a registry keeps its data in. How to reach it is told by AWS_* variables."""

    bucket: str
    part_size_bytes: int
    concurrency: int
    path_style: bool
    skip_tls_verification: bool
    redirect_s: float  # 0: bytes pass through


class Etcd(msgspec.Struct, frozen=True, kw_only=True):
    """What `covey etcd …` needs: the way to etcd, as a controller has it."""

    etcd_endpoints: tuple[str, ...]
    etcd_request_timeout_s: float
    etcd_tls: bool
    etcd_ca_cert: Path | None
    etcd_cert: Path | None
    etcd_cert_key: Path | None
    etcd_username: str
    etcd_password: str


class Replicas(msgspec.Struct, frozen=True, kw_only=True):
    """A registry among others that have disks of their own."""

    write_only: bool
    own_url: str
    peers: tuple[str, ...]  # without this one
    registry_peer_secret: str
    push_url: str  # "": etcd decides
    push_copies: int
    etcd: Etcd | None  # None: an operator decides, or the all-in-one service's own


class Registry(_Settings, frozen=True, kw_only=True):
    """A registry server."""

    workers: int  # 0: as many as are worth it
    tls: Tls | None  # None: plain HTTP
    ca_cert: Path | None
    metrics: Metrics | None
    s3: S3 | None  # None: on disk, below `base_path`
    listen: settings_reader.Address
    base_path: Path
    graceful_shutdown_timeout_s: float
    trusted_proxies: tuple[settings_reader.Network, ...]
    registry_deletes: bool
    gc_every_s: float
    gc_grace_s: float
    gc_trash_s: float
    upload_timeout_s: float
    scrub_every_s: float
    scrub_mb_per_s: int
    heal_from: tuple[str, ...]
    reserved_mib: int
    replicas: Replicas | None  # None: alone, or one of several on one storage


class Agent(_Settings, frozen=True, kw_only=True):
    """A node's agent, or `nodes` synthetic ones. Everything of it is below `data_dir`/agent."""

    controllers: tuple[str, ...]
    push_registries: tuple[str, ...]  # (): those that are pulled from
    ca_cert: Path | None  # believed where controllers and registries are reached by https
    data_dir: Path
    data_dir_given: bool  # False: the default holds
    hypervisor: str
    node_name: str  # "": the host's
    node_ip: str  # "": found out
    nodes: int  # 0: one ordinary node
    max_vms: int  # 0: judged by the host
    qemu_accel: Literal["auto", "kvm", "tcg"]
    qemu_first_user: int  # 0: a range of this node's own
    share_layers: bool
    share_listen: settings_reader.Address | None  # None: chosen by the agent
    share_limit_mib: int  # a second; 0: no limit
    boot_s: float
    pull_s: float
    fail_share: float
    hang_share: float
    vanish_share: float


class Standalone(_Settings, frozen=True, kw_only=True):
    """The all-in-one service; its children read their own settings from the environment it gives them."""

    listen: settings_reader.Address
    registry_listen: settings_reader.Address
    registry_base_path: Path
    registry_workers: int
    registry_mode: str
    replicas: Replicas | None  # None: the built-in registry is alone, or one of several on one storage
    registries: tuple[str, ...]
    data_dir: Path
    nodes: int
    graceful_shutdown_timeout_s: float
    shutdown_delay_s: float
    etcd_binary: str  # "": found on the PATH
    etcd_name: str
    listen_client_urls: tuple[str, ...]  # (): a free loopback port
    advertise_client_urls: tuple[str, ...]
    listen_peer_urls: tuple[str, ...]
    initial_advertise_peer_urls: tuple[str, ...]
    initial_cluster: str
    initial_cluster_state: str
    initial_cluster_token: str
    auto_compaction_mode: str
    auto_compaction_retention_s: float
    metrics: Metrics | None


class Client(_Settings, frozen=True, kw_only=True):
    """What commands need: whom to talk to."""

    controllers: tuple[str, ...]
    registries: tuple[str, ...]
    push_registries: tuple[str, ...]
    ca_cert: Path | None  # believed where they are reached by https


# ---- the programs' settings ------------------------------------------------------------------------------------


def controller(environ: Mapping[str, str], flags: Flags = NO_FLAGS) -> Controller:
    """Settings of `covey controller`."""
    read = settings_reader.Reader(Part.CONTROLLER, environ, flags)
    registries = read.urls("ANKA_REGISTRY")
    alone = read.switch("STANDALONE")
    run_registry = read.switch("RUN_REGISTRY")
    if not (registries or run_registry or read.switch("ALLOW_EMPTY_REGISTRY")):
        raise errors.SettingError(
            "ANKA_REGISTRY is not set: name the registry that nodes pull from (COVEY_ANKA_REGISTRY=http://HOST:8089),"
            " or set COVEY_ALLOW_EMPTY_REGISTRY=true to start without one"
        )
    if (priority := read.number("PRIORITY")) > 20:
        raise errors.SettingError(f"PRIORITY is {priority}: 20 is the most that there is")
    kept = read.number("ETCD_BACKUP_KEEP")
    if kept < 1:
        raise errors.SettingError("ETCD_BACKUP_KEEP is 0: keep one backup at least, or unset ETCD_BACKUP_DIR")
    return Controller(
        tls=_tls(read),
        ca_cert=read.file("CA_CERT"),
        listen=read.listen("LISTEN_ADDR"),
        advertise_url=read.one_url("ADVERTISE_URL"),
        **_way_to_etcd(read),
        etcd_backup_dir=read.path("ETCD_BACKUP_DIR"),
        etcd_backup_interval_s=read.positive("ETCD_BACKUP_INTERVAL"),
        etcd_backup_keep=kept,
        metrics=_metrics(read),
        defrag_db_interval_s=read.duration("DEFRAG_DB_INTERVAL"),
        registries=registries,
        local_registries=read.urls("LOCAL_ANKA_REGISTRY") or registries,
        push_registries=read.urls("PUSH_REGISTRY") or registries,
        instance_time_out_s=read.duration("INSTANCE_TIME_OUT"),
        instance_active_timeout_s=read.duration("INSTANCE_ACTIVE_TIMEOUT"),
        node_active_timeout_s=read.duration("NODE_ACTIVE_TIMEOUT"),
        unknown_vm_threshold_s=float(read.number("UNKNOWN_VM_THRESHOLD")),
        graceful_shutdown_timeout_s=read.duration("GRACEFUL_SHUTDOWN_TIMEOUT"),
        shutdown_delay_s=read.duration("SHUTDOWN_DELAY"),
        trusted_proxies=read.networks("TRUSTED_PROXIES"),
        heartbeat_s=read.positive("HEARTBEAT"),
        priority=priority,
        standalone=alone,
        run_registry=run_registry,
        **read.common(),
    )


def etcd(environ: Mapping[str, str], flags: Flags = NO_FLAGS) -> Etcd:
    """Settings of `covey etcd …`."""
    return Etcd(**_way_to_etcd(settings_reader.Reader(Part.ETCD, environ, flags)))


def _way_to_etcd(read: settings_reader.Reader) -> dict[str, Any]:
    """Where etcd is, and who we are to it."""
    endpoints = read.items("ETCD_ENDPOINTS")
    login = read.switch("USE_ETCD_LOGIN")
    if login and not read.text("ETCD_USERNAME"):
        raise errors.SettingError("USE_ETCD_LOGIN is true but ETCD_USERNAME is not set")
    return {
        "etcd_endpoints": tuple(settings_reader.host_port(endpoint) for endpoint in endpoints),
        "etcd_request_timeout_s": read.duration("ETCD_REQUEST_TIMEOUT"),
        "etcd_tls": read.switch("USE_ETCD_TLS") or any(endpoint.startswith("https://") for endpoint in endpoints),
        "etcd_ca_cert": read.file("ETCD_CA_CERT"),
        "etcd_cert": read.file("ETCD_CERT"),
        "etcd_cert_key": read.file("ETCD_CERT_KEY"),
        "etcd_username": read.text("ETCD_USERNAME") if login else "",
        "etcd_password": read.text("ETCD_PASSWORD") if login else "",
    }


def registry(environ: Mapping[str, str], flags: Flags = NO_FLAGS) -> Registry:
    """Settings of `covey registry`."""
    read = settings_reader.Reader(Part.REGISTRY, environ, flags)
    return Registry(
        workers=read.number("REGISTRY_WORKERS"),
        tls=_tls(read),
        ca_cert=read.file("CA_CERT"),
        metrics=_metrics(read),
        s3=_s3(read),
        listen=read.listen("LISTEN_ADDR"),
        base_path=read.path("BASE_PATH") or read.data_dir() / "registry",
        graceful_shutdown_timeout_s=read.duration("GRACEFUL_SHUTDOWN_TIMEOUT"),
        trusted_proxies=read.networks("TRUSTED_PROXIES"),
        registry_deletes=read.switch("REGISTRY_DELETES"),
        gc_every_s=read.duration("REGISTRY_GC_EVERY"),
        gc_grace_s=read.duration("REGISTRY_GC_GRACE"),
        gc_trash_s=read.duration("REGISTRY_GC_TRASH"),
        upload_timeout_s=read.duration("REGISTRY_UPLOAD_TIMEOUT"),
        scrub_every_s=read.duration("REGISTRY_SCRUB_EVERY"),
        scrub_mb_per_s=read.number("REGISTRY_SCRUB_SPEED"),
        heal_from=read.urls("REGISTRY_HEAL_FROM"),
        reserved_mib=read.number("REGISTRY_RESERVED_SPACE"),
        replicas=_replicas(read),
        **read.common(),
    )


_SHORTEST_SECRET = 16
_MODES = ("single", "shared", "replica", "write-only")
OF_REPLICAS = (
    "REGISTRY_PEERS",
    "REGISTRY_ADVERTISE_URL",
    "REGISTRY_PEER_SECRET",
    "REGISTRY_PEER_SECRET_FILE",
    "REGISTRY_PUSH",
    "REGISTRY_PUSH_COPIES",
)


def _replicas(read: settings_reader.Reader) -> Replicas | None:
    """Of a registry program, whose etcd is somebody else's."""
    mode = read.one_of("REGISTRY_MODE", _MODES)
    if mode in ("replica", "write-only") and read.one_of("BACKEND_TYPE", ("disk", "s3")) != "disk":
        raise errors.SettingError(
            f"REGISTRY_MODE is {mode} but BACKEND_TYPE is not disk: servers on one bucket share it"
            " (REGISTRY_MODE=shared)"
        )
    found = _one_of_a_set(read, mode)
    if found is None or not read.items("ETCD_ENDPOINTS"):
        if found is not None and not found.push_url:
            raise errors.SettingError(
                "nobody says which registry takes pushes: name it in REGISTRY_PUSH, the same at all servers,"
                " or set ETCD_ENDPOINTS to have them agree by themselves"
            )
        return found
    if found.push_url:
        raise errors.SettingError(
            "REGISTRY_PUSH and ETCD_ENDPOINTS are both set: with etcd the servers agree by themselves; unset one"
        )
    return msgspec.structs.replace(found, etcd=Etcd(**_way_to_etcd(read)))


def _one_of_a_set(read: settings_reader.Reader, mode: str) -> Replicas | None:
    if mode in ("single", "shared"):
        for name in OF_REPLICAS:
            if read.find(name) is not None:
                raise errors.SettingError(
                    f"{name} is set but REGISTRY_MODE is {mode}: it is for REGISTRY_MODE=replica or write-only"
                )
        return None
    own = read.one_url("REGISTRY_ADVERTISE_URL")
    peers = tuple(url for url in dict.fromkeys(read.urls("REGISTRY_PEERS")) if url != own)
    if not own or not peers:
        name = "REGISTRY_PEERS" if own else "REGISTRY_ADVERTISE_URL"
        text = "name the other servers of the set" if own else "name the URL at which its peers reach this server"
        raise errors.SettingError(f"REGISTRY_MODE is {mode} but {name} names none: {text}")
    copies = read.number("REGISTRY_PUSH_COPIES")
    if not 1 <= copies <= 1 + len(peers):
        raise errors.SettingError(
            f"REGISTRY_PUSH_COPIES={copies} is not 1 to {1 + len(peers)}, which is how many servers the set has"
        )
    return Replicas(
        write_only=mode == "write-only",
        own_url=own,
        peers=peers,
        registry_peer_secret=_peer_secret(read),
        push_copies=copies,
        push_url=_named_to_push(read, (own, *peers)),
        etcd=None,
    )


def _named_to_push(read: settings_reader.Reader, servers: tuple[str, ...]) -> str:
    push = read.one_url("REGISTRY_PUSH")
    if push and push not in servers:
        raise errors.SettingError(
            f"REGISTRY_PUSH={push} is none of the set: use one of {', '.join(servers)} (REGISTRY_ADVERTISE_URL,"
            " REGISTRY_PEERS)"
        )
    return push


def _peer_secret(read: settings_reader.Reader) -> str:
    secret, file = read.text("REGISTRY_PEER_SECRET"), read.file("REGISTRY_PEER_SECRET_FILE")
    if file is not None:
        if secret:
            raise errors.SettingError("REGISTRY_PEER_SECRET and REGISTRY_PEER_SECRET_FILE are both set: unset one")
        try:
            secret = file.read_text("utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise errors.SettingError(f"REGISTRY_PEER_SECRET_FILE: {file} cannot be read as text") from error
    if len(secret) < _SHORTEST_SECRET or not secret.isascii() or not secret.isprintable():
        raise errors.SettingError(
            "REGISTRY_PEER_SECRET is not set, too short, or not plain text: give all servers of the set the same"
            f" {_SHORTEST_SECRET} or more characters (`openssl rand -hex 32`), best in REGISTRY_PEER_SECRET_FILE"
        )
    return secret


def _tls(read: settings_reader.Reader) -> Tls | None:
    """What a server that speaks TLS needs; None for one that does not."""
    if not read.switch("USE_HTTPS"):
        return None
    cert, key = read.file("SERVER_CERT"), read.file("SERVER_KEY")
    if cert is None or key is None:
        missing = "SERVER_CERT" if cert is None else "SERVER_KEY"
        raise errors.SettingError(f"USE_HTTPS is true but {missing} is not set: name the file, or unset USE_HTTPS")
    lowest, highest = _tls_version(read, "MIN_TLS_VERSION"), _tls_version(read, "MAX_TLS_VERSION")
    if lowest > highest:
        raise errors.SettingError(
            f"MIN_TLS_VERSION={lowest} is above MAX_TLS_VERSION={highest}, which leaves none: unset one of them"
        )
    return Tls(cert=cert, key=key, lowest=lowest, highest=highest, ciphers=read.items("CIPHER_SUITES"))


_TLS_VERSION = re.compile(r"(?:version)?(?:tls)?[ _]?v?(1)[._]?([0-9])", re.IGNORECASE)  # 1.2, TLSv1.2, VersionTLS12


def _tls_version(read: settings_reader.Reader, name: str) -> str:
    text = read.text(name)
    found = _TLS_VERSION.fullmatch(text)
    if found is None or found[2] not in "23":
        raise errors.SettingError(f"{name}={text} is not 1.2 or 1.3: older versions of TLS are not safe")
    return f"{found[1]}.{found[2]}"


def _metrics(read: settings_reader.Reader) -> Metrics | None:
    if not read.switch("ENABLE_METRICS"):
        return None
    path, port = read.text("METRICS_PATH"), read.number("METRICS_PORT")
    if not path.startswith("/") or not path.isascii() or set(path) & set("{}?# "):
        raise errors.SettingError(f"METRICS_PATH={path} is not a path such as /metrics")
    if port > 65535:
        raise errors.SettingError(f"METRICS_PORT={port} is not a port: use 0 to 65535")
    return Metrics(port=port, path=path)


_MIB = 1 << 20
_SMALLEST_PART, _LARGEST_PART = 5 * _MIB, 1024 * _MIB  # S3 takes no smaller ones; larger ones fill the memory


def _s3(read: settings_reader.Reader) -> S3 | None:
    if read.one_of("BACKEND_TYPE", ("disk", "s3")) == "disk":
        return None
    bucket = read.text("BACKEND_S3_BUCKET")
    if not bucket:
        raise errors.SettingError("BACKEND_TYPE is s3 but BACKEND_S3_BUCKET is not set: name the bucket")
    part, concurrency = read.number("BACKEND_S3_UPLOAD_PART_SIZE"), read.number("BACKEND_S3_UPLOAD_CONCURRENCY")
    size = part if part > 5000 else part * _MIB
    if not _SMALLEST_PART <= size <= _LARGEST_PART:
        raise errors.SettingError(f"BACKEND_S3_UPLOAD_PART_SIZE={part} is not 5 to 1024 MiB (or the same in bytes)")
    if not 1 <= concurrency <= 64:
        raise errors.SettingError(f"BACKEND_S3_UPLOAD_CONCURRENCY={concurrency} is not 1 to 64")
    return S3(
        bucket=bucket,
        part_size_bytes=size,
        concurrency=concurrency,
        path_style=read.switch("BACKEND_S3_USE_PATH_STYLE"),
        skip_tls_verification=read.switch("BACKEND_S3_SKIP_TLS_VERIFICATION"),
        redirect_s=read.duration("BACKEND_S3_REDIRECT"),
    )


def agent(environ: Mapping[str, str], flags: Flags = NO_FLAGS) -> Agent:
    """Settings of `covey agent` and `covey join`."""
    read = settings_reader.Reader(Part.AGENT, environ, flags)
    nodes = read.number("NODES")
    hypervisor = read.one_of("HYPERVISOR", ("qemu", "synthetic"))
    if nodes and hypervisor != "synthetic":
        raise errors.SettingError("NODES is for synthetic nodes only: add --hypervisor synthetic")
    return Agent(
        ca_cert=read.file("CA_CERT"),
        controllers=read.urls("CONTROLLER"),
        push_registries=read.urls("PUSH_REGISTRY"),
        data_dir=read.data_dir(),
        data_dir_given=read.find("DATA_DIR") is not None,
        hypervisor=hypervisor,
        node_name=read.text("NODE_NAME"),
        node_ip=read.text("NODE_IP"),
        nodes=nodes,
        max_vms=read.number("MAX_VMS"),
        qemu_accel=_accel(read),
        qemu_first_user=read.number("QEMU_FIRST_USER"),
        share_layers=read.switch("SHARE_LAYERS"),
        share_listen=read.place("SHARE_LISTEN"),
        share_limit_mib=read.number("SHARE_LIMIT_MIB"),
        boot_s=read.duration("SYNTHETIC_BOOT"),
        pull_s=read.duration("SYNTHETIC_PULL"),
        fail_share=read.share("SYNTHETIC_FAIL"),
        hang_share=read.share("SYNTHETIC_HANG"),
        vanish_share=read.share("SYNTHETIC_VANISH"),
        **read.common(),
    )


def _accel(read: settings_reader.Reader) -> Literal["auto", "kvm", "tcg"]:
    match read.one_of("QEMU_ACCEL", ("auto", "kvm", "tcg")):
        case "kvm":
            return "kvm"
        case "tcg":
            return "tcg"
    return "auto"


def standalone(environ: Mapping[str, str], flags: Flags = NO_FLAGS) -> Standalone:
    """Settings of `covey standalone` and `covey up`."""
    read = settings_reader.Reader(Part.STANDALONE, environ, flags)
    data_dir = read.data_dir()
    mode = read.one_of("REGISTRY_MODE", _MODES)
    return Standalone(
        listen=read.listen("LISTEN_ADDR"),
        registry_listen=read.listen("REGISTRY_LISTEN_ADDRESS"),
        registry_workers=read.number("REGISTRY_WORKERS") if read.find("REGISTRY_WORKERS") else 1,  # a small cloud
        registry_base_path=read.path("REGISTRY_BASE_PATH") or data_dir / "registry",
        registry_mode=mode,
        replicas=_one_of_a_set(read, mode),
        registries=read.urls("ANKA_REGISTRY"),
        data_dir=data_dir,
        nodes=read.number("NODES"),
        graceful_shutdown_timeout_s=read.duration("GRACEFUL_SHUTDOWN_TIMEOUT"),
        shutdown_delay_s=read.duration("SHUTDOWN_DELAY"),
        etcd_binary=read.text("ETCD_BINARY"),
        etcd_name=read.text("NAME"),
        listen_client_urls=read.urls("LISTEN_CLIENT_URLS"),
        advertise_client_urls=read.urls("ADVERTISE_CLIENT_URLS"),
        listen_peer_urls=read.urls("LISTEN_PEER_URLS"),
        initial_advertise_peer_urls=read.urls("INITIAL_ADVERTISE_PEER_URLS"),
        initial_cluster=read.text("INITIAL_CLUSTER"),
        initial_cluster_state=read.one_of("INITIAL_CLUSTER_STATE", ("new", "existing")),
        initial_cluster_token=read.text("INITIAL_CLUSTER_TOKEN"),
        auto_compaction_mode=read.one_of("AUTO_COMPACTION_MODE", ("periodic",)),
        auto_compaction_retention_s=_retention_s(read),
        metrics=_metrics(read),
        **read.common(),
    )


def client(environ: Mapping[str, str], flags: Flags = NO_FLAGS) -> Client:
    """Settings of all other commands."""
    read = settings_reader.Reader(Part.CLIENT, environ, flags)
    registries = read.urls("REGISTRY")
    return Client(
        controllers=read.urls("CONTROLLER"),
        registries=registries,
        push_registries=read.urls("PUSH_REGISTRY") or registries,
        ca_cert=read.file("CA_CERT"),
        failpoints="",
        log_level="warning",
        log_json=None,
        log_dir=None,
        notices=(),
    )


_OLDEST_S = 15 * 60  # revisions younger than this are never compacted (safety S28)


def _retention_s(read: settings_reader.Reader) -> float:
    """etcd's own meaning: a bare number counts hours."""
    text = read.raw("AUTO_COMPACTION_RETENTION")
    kept_s = int(text) * 3600.0 if text.isdecimal() else read.duration("AUTO_COMPACTION_RETENTION")
    if kept_s < _OLDEST_S:
        raise errors.SettingError(
            f"AUTO_COMPACTION_RETENTION={text} is too short: watches resume from revisions of the last 15 minutes;"
            " use 15m or more"
        )
    return kept_s
