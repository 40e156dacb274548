"""THE key tree, format 1. All is below one prefix; values are JSON nouns of `covey.model` unless said.

    /covey/
    ├── format                      {"format": 1}; every write compares it (safety S27); written anew at a break
    ├── cloud                       {"id": …}: this cloud's id, written once; VM records carry it (safety S12)
    ├── history/<nonce>             Nonce: the chain of history nonces, newest = greatest create revision (S18)
    ├── break                       Break: the newest nonce that begins a new history after a restore (S18)
    ├── backup                      Backup: the last scheduled backup, and who makes the next one
    ├── defrag                      Defrag: the last scheduled defragmentation, and who does the next one
    ├── settled                     {"nonce": …}: the newest break that all nodes have answered for (safety S19)
    ├── adopted/<node>              Adopted: the newest break after which the node told what it has (safety S19)
    ├── instance/<id>               Instance
    ├── script/<key>                text of a start script, base64; shared by the instances of one request
    ├── output/<id>/<stream>        last 64 KiB of a script's stdout | stderr, raw bytes (safety S26)
    ├── born/<id>                   {"tx": …}: this id was used once; lives 24 h by a lease (safety S16)
    ├── key/<sha256>                Idempotency-Key: {"tx", "body", "ids"}; lives 24 h by a lease (safety S17)
    ├── twin/<sha256>               external_id + name of a start: {"tx", "body", "ids"}
    ├── pin/<sha256>                Pin: what a template's tag or version was when a start asked; lives 30 days (S14)
    ├── node/<id>                   Node: what the operator configured
    ├── session/<id>                Session: the agent's present life
    ├── alive/<id>                  {"session": n}, bound to the session's lease: the node is there
    ├── word/<id>                   Word: the node's last word; compared by nobody
    ├── ledger/<id>                 Ledger: the claims on the node; compared by every placement (safety S11)
    ├── order/<node>/<instance>     Order: destroy this VM (safety S2)
    ├── ask/<node>/<slot>           Question: to the node, about a VM's output; lives a minute by a lease (safety S26)
    ├── answer/<nonce>              Answer: the node's, until the reader took it; lives a minute by a lease
    ├── removed/<node>              {"at_ns", "session"}: the node was removed; its agent gets 410 (safety S12)
    ├── controller/<id>             {"version", "format", "url", "started_ns"}, bound to the controller's lease
    └── event/<ns, 20 digits>-<tx>  Event: what was decided, who and why; lives 7 days by a lease (safety S28)

Keys that change often (word) are apart from keys that decisions compare (ledger, session, instance).
"""

import hashlib

import msgspec

from covey import model

FORMAT = 1  # the newest that this program writes; it reads and writes the older ones too
OLDEST_FORMAT = 1
PREFIX = "/covey/"

FORMAT_KEY = PREFIX + "format"
CLOUD = PREFIX + "cloud"
HISTORY = PREFIX + "history/"
BREAK = PREFIX + "break"
BACKUP = PREFIX + "backup"
DEFRAG = PREFIX + "defrag"
SETTLED = PREFIX + "settled"
ADOPTED = PREFIX + "adopted/"
INSTANCES = PREFIX + "instance/"
SCRIPTS = PREFIX + "script/"
OUTPUTS = PREFIX + "output/"
BORN = PREFIX + "born/"
KEYS = PREFIX + "key/"
TWINS = PREFIX + "twin/"
PINS = PREFIX + "pin/"
NODES = PREFIX + "node/"
SESSIONS = PREFIX + "session/"
ALIVE = PREFIX + "alive/"
WORDS = PREFIX + "word/"
LEDGERS = PREFIX + "ledger/"
ORDERS = PREFIX + "order/"
ASKS = PREFIX + "ask/"
ANSWERS = PREFIX + "answer/"
REMOVED = PREFIX + "removed/"
CONTROLLERS = PREFIX + "controller/"
EVENTS = PREFIX + "event/"

# What every controller holds in memory; the rest only transactions and single answers look at.
MIRRORED = (
    *(FORMAT_KEY, CLOUD, HISTORY, INSTANCES, NODES, SESSIONS, ALIVE, WORDS),
    *(LEDGERS, ORDERS, ASKS, REMOVED, CONTROLLERS, BREAK, SETTLED, ADOPTED),
)

DAY_S = 24 * 3600
OUTPUT_LIMIT_BYTES = 64 * 1024
SCRIPT_LIMIT_BYTES = 256 * 1024
ANSWER_LIMIT_BYTES = 256 * 1024
ASK_SLOTS = 8  # questions that one node may have at a time


class Format(model.Noun, frozen=True, kw_only=True):
    format: int


class Cloud(model.Noun, frozen=True, kw_only=True):
    id: str


class Nonce(model.Noun, frozen=True, kw_only=True):
    """A link of the history chain. `term`, `index` and `cluster` say where the store was in its own life just before
    (0 and "": not known). `broke` says why a new history begins here after a restore; "" normally."""

    at_ns: int
    term: int = 0
    index: int = 0
    cluster: str = ""
    broke: str = ""


class Break(model.Noun, frozen=True, kw_only=True):
    """The store was restored; found out at the nonce of this name. Its key's mod revision is the break's."""

    nonce: str
    why: str
    at_ns: int


class Backup(model.Noun, frozen=True, kw_only=True):
    """`at_ns` to `took_s` tell of the last scheduled backup that was made; 0 and "" before the first. `claim`: the
    controller that makes one now, since `tried_ns`. `trouble`: why the last try came to nothing."""

    at_ns: int = 0
    by: str = ""
    file: str = ""
    size_bytes: int = 0
    revision: int = 0
    took_s: float = 0.0
    claim: str = ""
    tried_ns: int = 0
    trouble: str = ""


class Defrag(model.Noun, frozen=True, kw_only=True):
    """`at_ns` to `took_s` tell of the last scheduled defragmentation; 0 and "" before the first. `members` are those
    for which it paid. `claim`, `tried_ns` and `trouble` as in Backup."""

    at_ns: int = 0
    by: str = ""
    members: tuple[str, ...] = ()
    freed_bytes: int = 0
    took_s: float = 0.0
    claim: str = ""
    tried_ns: int = 0
    trouble: str = ""


class Settled(model.Noun, frozen=True, kw_only=True):
    nonce: str


class Adopted(model.Noun, frozen=True, kw_only=True):
    """`nonce`: the break after which the node told what it has. `excused`: the break for which its operator gave it up.
    `history` and `revision`: the view that the node had before, so that a repeat after a lost answer is known."""

    nonce: str = ""
    excused: str = ""
    history: str = ""
    revision: int = 0
    tx: str = ""


class Alive(model.Noun, frozen=True, kw_only=True):
    session: int


class Born(model.Noun, frozen=True, kw_only=True):
    """`closed`: the door was closed on a create whose reply was lost; no instance was made (safety S15)."""

    tx: str
    closed: bool = False


class Remembered(model.Noun, frozen=True, kw_only=True):
    """What a repeated request is answered with: value of key/… and twin/…"""

    tx: str
    body: str  # SHA-256 of the request's body
    ids: tuple[model.InstanceId, ...]


class Pin(model.Noun, frozen=True, kw_only=True):
    """A registry's word. Sizes are the template's own, 0 when it names none."""

    name: str
    tag: str
    version: int
    digest: model.Digest
    arch: model.Arch
    size_bytes: int
    vcpu: int = 0
    vram_mb: int = 0


class Answer(model.Noun, frozen=True, kw_only=True):
    """What the node found; `fault` says why nothing."""

    output: model.Output | None = None
    fault: str = ""
    tx: str


class Removed(model.Noun, frozen=True, kw_only=True):
    """`session` is the counter of the node's last life: one that an operator joins again counts on from there."""

    at_ns: int
    session: int = 0


class Controller(model.Noun, frozen=True, kw_only=True):
    id: str
    version: str
    format: int
    url: str  # where nodes reach it; "": they are not told
    started_ns: int


class Event(model.Noun, frozen=True, kw_only=True):
    """One line of the cloud's history. `about` is an instance or node id."""

    what: str
    about: str
    who: str
    why: str
    at_ns: int
    details: dict[str, str] = {}


def instance(id: str) -> str:
    return INSTANCES + id


def script(key: str) -> str:
    return SCRIPTS + key


def output(id: str, stream: str) -> str:
    return f"{OUTPUTS}{id}/{stream}"


def born(id: str) -> str:
    return BORN + id


def idempotency(key: str) -> str:
    return KEYS + _sha(key)


def twin(external_id: str, name: str) -> str:
    return TWINS + _sha(f"{external_id}\0{name}")


def pin(template: str, tag: str, version: int | None) -> str:
    return PINS + _sha(f"{template}\0{tag}\0{'' if version is None else version}")


def node(id: str) -> str:
    return NODES + id


def session(id: str) -> str:
    return SESSIONS + id


def alive(id: str) -> str:
    return ALIVE + id


def word(id: str) -> str:
    return WORDS + id


def ledger(id: str) -> str:
    return LEDGERS + id


def order(node_id: str, instance_id: str) -> str:
    return f"{ORDERS}{node_id}/{instance_id}"


def ask(node_id: str, slot: int) -> str:
    return f"{ASKS}{node_id}/{slot}"


def answer(nonce: str) -> str:
    return ANSWERS + nonce


def removed(id: str) -> str:
    return REMOVED + id


def adopted(node_id: str) -> str:
    return ADOPTED + node_id


def controller(id: str) -> str:
    return CONTROLLERS + id


def event(at_ns: int, tx: str) -> str:
    return f"{EVENTS}{at_ns:020d}-{tx}"


def nonce(value: str) -> str:
    return HISTORY + value


def tail(key: str) -> str:
    """The last part of a key: the id it is about."""
    return key.rsplit("/", 1)[-1]


def encode(noun: msgspec.Struct) -> bytes:
    return msgspec.json.encode(noun)


def _sha(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()
