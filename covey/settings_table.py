"""Every setting of every program, declared once: the table that `settings` reads by and that docs are drawn from.

A row says which programs read the setting, its type, its default as one would write it, one sentence, and other names
it goes by. ``COVEY_<name>`` and ``ANKA_<name>`` mean the same. Two more columns keep promises:

* `unbuilt`: the feature behind the setting does not exist yet. Any value but the default stops the start with this
  sentence: nobody shall believe in a protection that is not there.
* `without_effect`: accepted for the sake of existing deployments; said once in the log.
"""

from dataclasses import dataclass
from enum import StrEnum


class Part(StrEnum):
    """A program that reads settings."""

    CONTROLLER = "controller"
    REGISTRY = "registry"
    AGENT = "agent"
    STANDALONE = "standalone"
    CLIENT = "client"
    ETCD = "etcd"  # `covey etcd …`: commands that talk to etcd itself


class Kind(StrEnum):
    """How a value is written."""

    TEXT = "text"
    SWITCH = "true or false"
    NUMBER = "whole number"
    DURATION = "duration"  # Go's: 30s, 2m, 1m30s
    LIST = "comma separated list"
    ADDRESS = "[address]:port"
    URLS = "comma separated URLs"
    PATH = "path"


@dataclass(frozen=True, slots=True)
class Setting:
    """One row. `default` is what one would write in the environment; "" is unset."""

    name: str
    parts: tuple[Part, ...]
    kind: Kind
    default: str
    doc: str
    aliases: tuple[str, ...] = ()
    unbuilt: str = ""
    without_effect: str = ""
    secret: bool = False


_C, _R, _A, _S = (Part.CONTROLLER,), (Part.REGISTRY,), (Part.AGENT,), (Part.STANDALONE,)
_CS, _RS = (Part.CONTROLLER, Part.STANDALONE), (Part.REGISTRY, Part.STANDALONE)
_CE = (Part.CONTROLLER, Part.ETCD)
_CR = (Part.CONTROLLER, Part.REGISTRY)
_CER = (Part.CONTROLLER, Part.ETCD, Part.REGISTRY)
_SERVERS = (Part.CONTROLLER, Part.REGISTRY, Part.STANDALONE)
_ALL = (Part.CONTROLLER, Part.REGISTRY, Part.AGENT, Part.STANDALONE)
_K = Kind

# ---- where programs listen, keep their data and find each other ------------------------------------------------

_PLACES = (
    Setting(
        "LISTEN_ADDR",
        _CS,
        _K.ADDRESS,
        "127.0.0.1:8090",
        "Where the controller listens; port 0 takes a free one.",
    ),
    Setting(
        "ADVERTISE_URL",
        _CS,
        _K.URLS,
        "",
        "The URL at which nodes reach this very controller. Nodes learn it and spread over all that have one; leave it"
        " unset where nodes shall go through a balancer only.",
    ),
    Setting("LISTEN_ADDR", _R, _K.ADDRESS, "127.0.0.1:8089", "Where the registry listens; port 0 takes a free one."),
    Setting(
        "ALLOW_ANONYMOUS",
        _SERVERS,
        _K.SWITCH,
        "false",
        "Listen on an address that other machines reach although nobody has to log in.",
    ),
    Setting(
        "DATA_DIR",
        (Part.AGENT, Part.REGISTRY, Part.STANDALONE),
        _K.PATH,
        "/var/lib/covey as root, else ~/.local/share/covey",
        "Where everything is kept: etcd below etcd/, the registry below registry/, a node below agent/.",
    ),
    Setting("BASE_PATH", _R, _K.PATH, "registry/ in DATA_DIR", "The registry's data directory."),
    Setting(
        "REGISTRY_DELETES",
        _R,
        _K.SWITCH,
        "true",
        "Whether tags, manifests, blobs and templates may be deleted and reverted; `false`: what is pushed stays.",
    ),
    Setting(
        "REGISTRY_GC_EVERY",
        _R,
        _K.DURATION,
        "1h",
        "How often garbage is collected, by all servers of one storage together; 0 leaves it to `covey registry gc`.",
    ),
    Setting(
        "REGISTRY_GC_GRACE",
        _R,
        _K.DURATION,
        "24h",
        "How long a blob that nothing needs stays after it was last stored, mounted or asked for; also how long a"
        " template's version stays that was replaced or taken back. Longer than any push takes.",
    ),
    Setting(
        "REGISTRY_GC_TRASH",
        _R,
        _K.DURATION,
        "24h",
        "How long it then lies in the trash, from where a request takes it back, before it is deleted.",
    ),
    Setting(
        "REGISTRY_UPLOAD_TIMEOUT", _R, _K.DURATION, "24h", "How long an upload is kept in which nothing moves any more."
    ),
    Setting(
        "REGISTRY_SCRUB_EVERY",
        _R,
        _K.DURATION,
        "168h",
        "How often every blob is read again and compared with its digest, by all servers of one storage together;"
        " 0 leaves it to `covey registry scrub`.",
    ),
    Setting(
        "REGISTRY_SCRUB_SPEED", _R, _K.NUMBER, "50", "How fast that reads at most, in MB/s; 0: as fast as it goes."
    ),
    Setting(
        "REGISTRY_HEAL_FROM",
        _R,
        _K.URLS,
        "",
        "Other registries that hold the same repositories: a damaged blob is fetched again from there.",
    ),
    Setting(
        "REGISTRY_RESERVED_SPACE",
        _R,
        _K.NUMBER,
        "64",
        "MiB of the disk that uploads are never given: what is left for log entries, so that deleting still works when"
        " the disk is full.",
    ),
    Setting(
        "TRUSTED_PROXIES",
        _SERVERS,
        _K.LIST,
        "",
        "Addresses or networks of balancers whose X-Forwarded-For is believed: it tells whose decision is recorded and"
        " whose share of the server a request takes.",
    ),
    Setting(
        "ANKA_REGISTRY",
        _CS,
        _K.URLS,
        "",
        "Registry URLs that nodes pull templates from. The all-in-one service tells its own registry's, and those of"
        " REGISTRY_PEERS, unless this is set.",
        aliases=("NODE_REGISTRY",),
    ),
    Setting(
        "LOCAL_ANKA_REGISTRY",
        _CS,
        _K.URLS,
        "",
        "Registry URLs that the controller itself uses, when they differ from those of the nodes.",
    ),
    Setting(
        "PUSH_REGISTRY",
        (Part.CONTROLLER, Part.STANDALONE, Part.AGENT, Part.CLIENT),
        _K.URLS,
        "",
        "Registry URLs that templates and saved images are pushed to, when they differ from those that all else uses.",
    ),
    Setting(
        "ALLOW_EMPTY_REGISTRY", _CS, _K.SWITCH, "false", "Start a controller although no registry address is given."
    ),
    Setting(
        "CONTROLLER",
        (Part.AGENT, Part.CLIENT),
        _K.URLS,
        "http://127.0.0.1:8090",
        "Controller URLs that commands and agents talk to.",
    ),
    Setting(
        "REGISTRY",
        (Part.CLIENT,),
        _K.URLS,
        "http://127.0.0.1:8089",
        "Registry URLs that template commands talk to.",
    ),
    Setting("FAILPOINTS", _ALL, _K.TEXT, "", "For tests: name=action[,…] places where the program crashes on purpose."),
    Setting("LOG_LEVEL", _ALL, _K.TEXT, "info", "debug, info, warning or error."),
    Setting("LOG_JSON", _ALL, _K.TEXT, "auto", "true, false or auto: JSON lines unless stderr is a terminal."),
    Setting(
        "LOG_DIR",
        _ALL,
        _K.PATH,
        "",
        "Logs also go there, as JSON lines, to covey-<program>.log; opened again once that was moved away.",
    ),
)

# ---- etcd, as a controller sees it -----------------------------------------------------------------------------

_ETCD = (
    Setting("ETCD_ENDPOINTS", _CE, _K.LIST, "127.0.0.1:2379", "etcd's client addresses, with or without scheme."),
    Setting(
        "ETCD_ENDPOINTS",
        _R,
        _K.LIST,
        "",
        "For registries with disks of their own: the etcd in which they agree who takes pushes; unset: an operator says"
        " so (REGISTRY_PUSH, `covey registry promote`).",
    ),
    Setting(
        "ETCD_REQUEST_TIMEOUT",
        (Part.CONTROLLER, Part.STANDALONE, Part.ETCD, Part.REGISTRY),
        _K.DURATION,
        "20s",
        "How long one request to etcd may take, fail-over included.",
    ),
    Setting("USE_ETCD_TLS", _CER, _K.SWITCH, "false", "Talk TLS to etcd (also when its endpoints say https)."),
    Setting("ETCD_CA_CERT", _CER, _K.PATH, "", "The authority that signed etcd's certificates, PEM."),
    Setting("ETCD_CERT", _CER, _K.PATH, "", "The client certificate shown to etcd, PEM."),
    Setting("ETCD_CERT_KEY", _CER, _K.PATH, "", "Its private key, PEM."),
    Setting(
        "SKIP_ETCD_TLS_VERIFICATION",
        _CE,
        _K.SWITCH,
        "false",
        "Believe any certificate of etcd.",
        unbuilt="etcd's certificate is always verified; name its authority in ETCD_CA_CERT",
    ),
    Setting("USE_ETCD_LOGIN", _CER, _K.SWITCH, "false", "Log in to etcd with name and password."),
    Setting("ETCD_USERNAME", _CER, _K.TEXT, "", "The name."),
    Setting("ETCD_PASSWORD", _CER, _K.TEXT, "", "The password.", secret=True),
    Setting(
        "ETCD_BACKUP_DIR",
        _CS,
        _K.PATH,
        "",
        "Where backups of etcd are put, one controller of all making each; unset: none are made.",
    ),
    Setting("ETCD_BACKUP_INTERVAL", _CS, _K.DURATION, "1h", "How long after one backup the next is made."),
    Setting("ETCD_BACKUP_KEEP", _CS, _K.NUMBER, "48", "How many are kept in ETCD_BACKUP_DIR; older ones are removed."),
    Setting(
        "DEFRAG_DB_INTERVAL",
        _CS,
        _K.DURATION,
        "0s",
        "How often etcd's members are defragmented where that pays, one after the other, one controller of all doing"
        " it; 0 is never.",
    ),
)

# ---- times that users notice -----------------------------------------------------------------------------------

_TIMES = (
    Setting("INSTANCE_TIME_OUT", _CS, _K.DURATION, "1m", "How long a terminated instance is still listed."),
    Setting(
        "INSTANCE_ACTIVE_TIMEOUT",
        _CS,
        _K.DURATION,
        "2m",
        "After this long without word from its node an instance is shown as not communicating.",
    ),
    Setting("NODE_ACTIVE_TIMEOUT", _CS, _K.DURATION, "2m", "After this long without word a node is shown as Offline."),
    Setting(
        "UNKNOWN_VM_THRESHOLD",
        _CS,
        _K.NUMBER,
        "150",
        "Seconds after which a VM that no instance wants is ordered to be destroyed.",
    ),
    Setting(
        "GRACEFUL_SHUTDOWN_TIMEOUT", _SERVERS, _K.DURATION, "10s", "How long requests in flight may take at shutdown."
    ),
    Setting(
        "SHUTDOWN_DELAY",
        _CS,
        _K.DURATION,
        "2s",
        "At shutdown /readyz is red for this long while requests are still taken, so that balancers look away first;"
        " skipped when nobody has asked /readyz for half a minute.",
    ),
    Setting(
        "PRIORITY",
        _CS,
        _K.NUMBER,
        "10",
        "How far before other programs of its host a controller gets the processor (a nice value of minus so many, 0 to"
        " 20): everybody waits for it, and builds take all that there is. Where that is not permitted (it takes root or"
        " CAP_SYS_NICE) it runs like the others.",
    ),
    Setting("HEARTBEAT", _CS, _K.DURATION, "5s", "How often agents send a sign of life; told longer in a large fleet."),
    Setting(
        "VM_LIST_CACHE_TTL",
        _SERVERS,
        _K.DURATION,
        "30s",
        "The product's template list cache.",
        without_effect="template lists are always fresh",
    ),
)

# ---- a registry ------------------------------------------------------------------------------------------------

_TLS = (
    Setting("USE_HTTPS", _CR, _K.SWITCH, "false", "Speak TLS, with SERVER_CERT and SERVER_KEY."),
    Setting("SERVER_CERT", _CR, _K.PATH, "", "The server's certificate and what leads to its authority, PEM."),
    Setting("SERVER_KEY", _CR, _K.PATH, "", "Its private key, PEM."),
    Setting("MIN_TLS_VERSION", _CR, _K.TEXT, "1.2", "The oldest TLS that clients may speak: 1.2 or 1.3."),
    Setting("MAX_TLS_VERSION", _CR, _K.TEXT, "1.3", "The newest one."),
    Setting(
        "CIPHER_SUITES",
        _CR,
        _K.LIST,
        "",
        "Ciphers of TLS 1.2 in their order, by OpenSSL's or IANA's names; unset: the good ones that OpenSSL has."
        " Those of TLS 1.3 are always on.",
    ),
)

_REGISTRY = (
    Setting(
        "REGISTRY_WORKERS",
        _RS,
        _K.NUMBER,
        "0",
        "How many processes serve one listener; 0 takes one for each processor, four at most. The all-in-one service"
        " runs one unless this is set.",
    ),
    Setting(
        "CA_CERT",
        (Part.CONTROLLER, Part.REGISTRY, Part.AGENT, Part.STANDALONE, Part.CLIENT),
        _K.PATH,
        "",
        "Authorities that are believed beside the system's own where a server is reached by https, PEM.",
        aliases=("ROOT_CERT",),
    ),
    Setting(
        "ENABLE_METRICS",
        _SERVERS,
        _K.SWITCH,
        "false",
        "Tell Prometheus figures, on a port of their own beside LISTEN_ADDR.",
    ),
    Setting(
        "METRICS_PORT",
        _SERVERS,
        _K.NUMBER,
        "2112",
        "That port; 0 takes a free one. In the all-in-one service it is the controller's, and the next one the"
        " registry's.",
    ),
    Setting("METRICS_PATH", _SERVERS, _K.TEXT, "/metrics", "The path of the figures."),
    Setting("BACKEND_TYPE", _R, _K.TEXT, "disk", "Where the registry keeps its data: disk (below BASE_PATH) or s3."),
    Setting(
        "BACKEND_S3_BUCKET",
        _R,
        _K.TEXT,
        "",
        "The bucket. Its endpoint, region and keys come from the usual AWS_ENDPOINT_URL, AWS_REGION, AWS_ACCESS_KEY_ID,"
        " AWS_SECRET_ACCESS_KEY and AWS_SESSION_TOKEN, or from the machine's role.",
    ),
    Setting(
        "BACKEND_S3_UPLOAD_PART_SIZE",
        _R,
        _K.NUMBER,
        "8",
        "Size of one part of an upload to S3, in MiB (a number above 5000 counts bytes); at least 5 MiB.",
    ),
    Setting(
        "BACKEND_S3_UPLOAD_CONCURRENCY",
        _R,
        _K.NUMBER,
        "4",
        "How many parts of one upload are on their way at once; an upload needs this many parts of memory.",
    ),
    Setting(
        "BACKEND_S3_USE_PATH_STYLE",
        _R,
        _K.SWITCH,
        "false",
        "Name the bucket in the path of URLs, not in the host; most stores that are not Amazon's need it.",
    ),
    Setting("BACKEND_S3_SKIP_TLS_VERIFICATION", _R, _K.SWITCH, "false", "Believe any certificate of the S3 store."),
    Setting(
        "BACKEND_S3_REDIRECT",
        _R,
        _K.DURATION,
        "0s",
        "Send clients to S3 itself for a blob, by an address that holds for so long; 0 passes its bytes through.",
    ),
)

# ---- registries with disks of their own ------------------------------------------------------------------------

_REPLICAS = (
    Setting(
        "REGISTRY_MODE",
        _RS,
        _K.TEXT,
        "single",
        "single; shared: other servers use the same BASE_PATH or bucket; replica: this one has its own disk and follows"
        " the one that takes pushes; write-only: a replica that takes pushes and feeds its peers, and serves no pulls.",
    ),
    Setting(
        "REGISTRY_PEERS",
        _RS,
        _K.URLS,
        "",
        "For replica and write-only: the URLs of all servers of the set; this one's own may be among them.",
    ),
    Setting("REGISTRY_ADVERTISE_URL", _RS, _K.URLS, "", "The URL at which its peers reach this registry."),
    Setting(
        "REGISTRY_PEER_SECRET",
        _RS,
        _K.TEXT,
        "",
        "How servers of the set know each other: the same at all of them, 16 characters or more.",
        secret=True,
    ),
    Setting("REGISTRY_PEER_SECRET_FILE", _RS, _K.PATH, "", "A file that holds it, instead."),
    Setting(
        "REGISTRY_PUSH",
        _RS,
        _K.URLS,
        "",
        "Without etcd: which server takes pushes at first. Later `covey registry promote URL` says so. The all-in-one"
        " service has etcd: unless this is set, the servers agree there.",
    ),
    Setting(
        "REGISTRY_PUSH_COPIES",
        _RS,
        _K.NUMBER,
        "1",
        "How many servers must have all of a push before it is answered; 2: the loss of one disk loses nothing.",
    ),
)

# ---- the all-in-one service ------------------------------------------------------------------------------------

_STANDALONE = (
    Setting(
        "STANDALONE", _C, _K.SWITCH, "false", "`covey controller` runs its own etcd beside it.", aliases=("STANDLONE",)
    ),
    Setting("RUN_REGISTRY", _C, _K.SWITCH, "false", "`covey controller` runs a registry beside it."),
    Setting("REGISTRY_LISTEN_ADDRESS", _S, _K.ADDRESS, "127.0.0.1:8089", "Where the built-in registry listens."),
    Setting("REGISTRY_BASE_PATH", _S, _K.PATH, "registry/ in DATA_DIR", "The built-in registry's data directory."),
    Setting("ETCD_BINARY", _S, _K.PATH, "etcd on the PATH", "The etcd program to run."),
    Setting("NAME", _S, _K.TEXT, "anka-etcd", "The built-in etcd's member name."),
    Setting("LISTEN_CLIENT_URLS", _S, _K.URLS, "a free loopback port", "Where the built-in etcd serves clients."),
    Setting("ADVERTISE_CLIENT_URLS", _S, _K.URLS, "LISTEN_CLIENT_URLS", "What it tells clients."),
    Setting("LISTEN_PEER_URLS", _S, _K.URLS, "a free loopback port", "Where the built-in etcd serves its peers."),
    Setting("INITIAL_ADVERTISE_PEER_URLS", _S, _K.URLS, "LISTEN_PEER_URLS", "What it tells its peers."),
    Setting("INITIAL_CLUSTER", _S, _K.TEXT, "itself alone", "etcd's initial-cluster."),
    Setting("INITIAL_CLUSTER_STATE", _S, _K.TEXT, "new", "etcd's initial-cluster-state: new or existing."),
    Setting("INITIAL_CLUSTER_TOKEN", _S, _K.TEXT, "covey", "etcd's initial-cluster-token."),
    Setting(
        "AUTO_COMPACTION_MODE", _S, _K.TEXT, "periodic", "etcd's auto-compaction-mode; only periodic keeps a time."
    ),
    Setting(
        "AUTO_COMPACTION_RETENTION",
        _S,
        _K.DURATION,
        "30m",
        "How long etcd keeps old revisions; at least 15m, because watches resume from them.",
    ),
    Setting("NODES", (Part.STANDALONE, Part.AGENT), _K.NUMBER, "0", "How many synthetic nodes to run in this process."),
)

# ---- a node ----------------------------------------------------------------------------------------------------

_AGENT = (
    Setting("HYPERVISOR", _A, _K.TEXT, "qemu", "What runs the VMs: qemu or synthetic."),
    Setting("NODE_NAME", _A, _K.TEXT, "the host's name", "The node's name."),
    Setting("NODE_IP", _A, _K.TEXT, "the address it reaches the controller from", "Where forwarded ports listen."),
    Setting("MAX_VMS", _A, _K.NUMBER, "0", "VMs that this node takes at once; 0 lets the agent judge by the host."),
    Setting("QEMU_ACCEL", _A, _K.TEXT, "auto", "auto (KVM where it really works), kvm or tcg (software)."),
    Setting(
        "QEMU_FIRST_USER",
        _A,
        _K.NUMBER,
        "0",
        "As root each VM runs as a user id of its own, from this one on; 0 takes a range that follows from DATA_DIR.",
    ),
    Setting(
        "SHARE_LAYERS",
        _A,
        _K.SWITCH,
        "true",
        "Send layers of templates to other nodes that pull them, and fetch layers from nodes that have them.",
    ),
    Setting(
        "SHARE_LISTEN",
        _A,
        _K.ADDRESS,
        "port 8091, or a free one",
        "Where other nodes fetch layers from this one, at the address of NODE_IP.",
    ),
    Setting("SHARE_LIMIT_MIB", _A, _K.NUMBER, "0", "MiB a second that all other nodes together get; 0: no limit."),
    Setting("SYNTHETIC_BOOT", _A, _K.DURATION, "0s", "Synthetic VMs: how long a boot takes."),
    Setting("SYNTHETIC_PULL", _A, _K.DURATION, "0s", "Synthetic VMs: how long preparing the disks takes."),
    Setting("SYNTHETIC_FAIL", _A, _K.TEXT, "0", "Synthetic VMs: the share of boots that fail, 0 to 1."),
    Setting("SYNTHETIC_HANG", _A, _K.TEXT, "0", "Synthetic VMs: the share of boots that never end, 0 to 1."),
    Setting(
        "SYNTHETIC_VANISH", _A, _K.TEXT, "0", "Synthetic VMs: the share of running VMs that end by themselves, 0 to 1."
    ),
)

# ---- named by existing deployments, not built or without effect ------------------------------------------------

_AUTH = "authentication is not built yet"
_ALONE = "the all-in-one service speaks no TLS yet; run its programs apart, or put a TLS proxy before it"
_TRUST = "certificates are always checked; name the authority to believe in CA_CERT"
_FOLDER = "Covey keeps all data of the registry below BASE_PATH"


def _unbuilt(names: str, kind: Kind, why: str, parts: tuple[Part, ...] = _SERVERS) -> tuple[Setting, ...]:
    default = "false" if kind is Kind.SWITCH else ""
    return tuple(Setting(name, parts, kind, default, f"Not built: {why}.", unbuilt=why) for name in names.split())


_LATER = (
    *_unbuilt("ENABLE_AUTH ENABLE_API_KEYS ENABLE_INGRESS_NGINX OIDC_USER_INFO", _K.SWITCH, _AUTH),
    Setting("ROOT_TOKEN", _SERVERS, _K.TEXT, "", f"Not built: {_AUTH}.", unbuilt=_AUTH, secret=True),
    Setting("API_KEYS_SESSION_TTL", _SERVERS, _K.DURATION, "5m", f"Not built: {_AUTH}.", unbuilt=_AUTH),
    Setting("OIDC_CLIENT_SECRET", _SERVERS, _K.TEXT, "", f"Not built: {_AUTH}.", unbuilt=_AUTH, secret=True),
    *_unbuilt("OIDC_PROVIDER_URL OIDC_CLIENT_ID OIDC_DISPLAY_NAME OIDC_SCOPES", _K.TEXT, _AUTH),
    Setting("OIDC_GROUPS_CLAIM", _SERVERS, _K.TEXT, "groups", f"Not built: {_AUTH}.", unbuilt=_AUTH),
    Setting("OIDC_USERNAME_CLAIM", _SERVERS, _K.TEXT, "name", f"Not built: {_AUTH}.", unbuilt=_AUTH),
    *_unbuilt("USE_HTTPS", _K.SWITCH, _ALONE, _S),
    *_unbuilt("SERVER_CERT SERVER_KEY", _K.PATH, _ALONE, _S),
    *_unbuilt("MIN_TLS_VERSION MAX_TLS_VERSION CIPHER_SUITES", _K.TEXT, _ALONE, _S),
    *_unbuilt("SKIP_TLS_VERIFICATION", _K.SWITCH, _TRUST),
    *_unbuilt("CRL", _K.PATH, _AUTH),
    *_unbuilt("ENABLE_CENTRAL_LOGGING", _K.SWITCH, "central logging is not built yet; each program logs to stderr"),
    *_unbuilt("QUEUE_ADDR", _K.TEXT, "the product's queue address has no counterpart; agents use LISTEN_ADDR"),
    *(
        Setting(name, _RS, _K.PATH, "", "The product's folder.", without_effect=_FOLDER)
        for name in ("IMAGE_DIR_PATH", "STATE_FILE_DIR_PATH", "VM_DIR_PATH")
    ),
)

TABLE: tuple[Setting, ...] = (*_PLACES, *_ETCD, *_TIMES, *_TLS, *_REGISTRY, *_REPLICAS, *_STANDALONE, *_AGENT, *_LATER)

# Read elsewhere than through a table row: where the settings file is.
CONFIG = "CONFIG"
CONFIG_DEFAULT = "/etc/covey/covey.toml"
