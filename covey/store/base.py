"""The store: an ordered map of keys to bytes with revisions, guarded transactions, leases and watches (etcd's model).

Two implementations pass one contract suite (tests/contract/test_store.py): `store.memory`, which ships, and
`store.etcd`. Everything that Covey decides rests on four promises of a store:

1. A `Txn` is applied wholly or not at all, and its compares are evaluated at the revision before its own.
2. `range` without `serializable` shows every write that was answered before it was sent.
3. A watch delivers every revision from its start once, whole and in order (safety S20), or raises Compacted.
4. A call ends within its deadline, as: done; `Unavailable` (certainly not applied); `Unsure` (safety S15).

Keys are text. Bytes that are no UTF-8 (another program's keys in a shared etcd) are carried by surrogate escapes.
"""

from collections.abc import AsyncIterator, Sequence
from enum import StrEnum
from typing import NamedTuple, Protocol

from covey.decide import permission

EVERYTHING = "\0"  # as key and as end: the whole key space


class Kv(NamedTuple):
    """One key as it stood at the revision of the answer that carried it."""

    key: str
    value: bytes
    create_revision: int
    mod_revision: int
    lease: int = 0


class Target(StrEnum):
    """What a compare looks at; an absent key has create and mod revision 0."""

    CREATE = "create"
    MOD = "mod"
    VALUE = "value"


class Compare(NamedTuple):
    """Equality of one attribute of one key. There are no range compares: two in one batch would both pass (S11)."""

    key: str
    target: Target
    revision: int = 0
    value: bytes = b""


class Put(NamedTuple):
    key: str
    value: bytes
    lease: int = 0


class Delete(NamedTuple):
    """Delete one key, or the half-open range up to `end`."""

    key: str
    end: str = ""


class Get(NamedTuple):
    """Read one key inside a transaction."""

    key: str


Op = Put | Delete | Get


class Txn(NamedTuple):
    """If all `compares` hold then `then` else `otherwise`. A key is written at most once."""

    compares: tuple[Compare, ...]
    then: tuple[Op, ...]
    otherwise: tuple[Op, ...] = ()


class Outcome(NamedTuple):
    """How a transaction ended. `got` holds one item per `Get` of the branch that ran, in order (None: absent)."""

    succeeded: bool
    revision: int
    got: tuple[Kv | None, ...] = ()


class Page(NamedTuple):
    """Keys of a range, ascending, as of `revision`. `total` is the number of all keys in the range."""

    kvs: tuple[Kv, ...]
    revision: int
    total: int
    more: bool
    term: int = 0  # the raft term of whoever answered, and the store's identity; 0 and "": not known
    cluster: str = ""


class Change(NamedTuple):
    """One key's change. `kv` None: deleted."""

    key: str
    kv: Kv | None


class Batch(NamedTuple):
    """All changes of one revision (promise 3). `changes` keeps the store's order within the revision."""

    revision: int
    changes: tuple[Change, ...]


class Lease(Protocol):
    """A lease granted to this process. It knows by its own clock when it is lost, whatever the server says later."""

    id: int
    ttl_s: float

    @property
    def lost(self) -> bool:
        """True from the moment at which the server may have ended it."""
        ...

    async def keep_alive(self) -> None:
        """Renew for ever; raises LeaseLost when it is gone. Run it as a task."""
        ...

    async def revoke(self) -> None:
        """End it now and delete its keys. Harmless when already gone."""
        ...


class Store(Protocol):
    """Eight verbs. Every one may be called at once from many tasks of one event loop."""

    async def range(
        self,
        key: str,
        end: str = "",
        *,
        limit: int = 0,
        revision: int = 0,
        keys_only: bool = False,
        count_only: bool = False,
        serializable: bool = False,
        oldest_first: bool = False,
    ) -> Page:
        """Keys in [key, end); one key when `end` is empty. Linearizable unless `serializable`. `oldest_first` sorts by
        create revision. Raises Compacted when `revision` is no longer kept. Retried on other members."""
        ...

    async def commit(self, txn: Txn, *, within_s: float | None = None) -> Outcome:
        """Apply `txn`, alone or in a batch with others that are ready at the same moment (safety S23). Nothing is sent
        after `within_s` (safety S24). Raises Unavailable, Unsure or Rejected."""
        ...

    def watch(self, key: str, end: str, start_revision: int) -> AsyncIterator[Batch]:
        """Changes of [key, end) from `start_revision` on, revision by revision, for ever; survives the loss of any
        member by itself. Raises Compacted when the start, or the place to resume from, is no longer kept."""
        ...

    async def grant(self, ttl_s: int) -> Lease:
        """A new lease."""
        ...

    async def renew(self, leases: Sequence[int]) -> dict[int, float]:
        """Keep leases alive on behalf of others, many in one go: id -> seconds left, 0 for one that is gone.
        Raises Unavailable when no member answered."""
        ...

    async def compact(self, revision: int) -> None:
        """Drop history before `revision`. Compacting twice at one revision is harmless."""
        ...

    async def origin(self, revision: int) -> permission.Origin:
        """Where the store is in its own life (safety S18), by the word of a member that has applied `revision`. Raises
        Unavailable."""
        ...

    async def close(self) -> None:
        """Let go of everything; watches end with CancelledError in their tasks."""
        ...


def absent(key: str) -> Compare:
    """The key does not exist."""
    return Compare(key, Target.CREATE, 0)


def unchanged(key: str, mod_revision: int) -> Compare:
    """The key is as it was at `mod_revision` (0: still absent)."""
    return Compare(key, Target.MOD, mod_revision)


def same_life(key: str, create_revision: int) -> Compare:
    """The key has not been deleted since it was created at `create_revision`, whatever was written to it."""
    return Compare(key, Target.CREATE, create_revision)


def equals(key: str, value: bytes) -> Compare:
    """The key holds exactly `value`."""
    return Compare(key, Target.VALUE, 0, value)


def prefix_end(prefix: str) -> str:
    """The end of the range of all keys that start with `prefix` (which ends in an ASCII character)."""
    return prefix[:-1] + chr(ord(prefix[-1]) + 1)


def within(key: str, start: str, end: str) -> bool:
    """Whether `key` lies in [start, end) in the order of bytes; only `start` itself when `end` is empty."""
    if not end:
        return key == start
    return to_bytes(start) <= to_bytes(key) and (end == EVERYTHING or to_bytes(key) < to_bytes(end))


def to_bytes(key: str) -> bytes:
    return key.encode("utf-8", "surrogateescape")


def to_text(key: bytes) -> str:
    return key.decode("utf-8", "surrogateescape")
