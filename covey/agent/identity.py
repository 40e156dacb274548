"""Who this node is, on disk: its id, session, secrets, and the newest view at its last join (safety S7, S18); and where
the cloud's controllers were last.

A session's secret is durable before it is sent. After a crash, or an answer that never came, nobody knows which of
the secrets sent since is the current one; so all of them are kept until one has surely been taken.

The identity belongs to one directory of one host (`Home`). A copy finds out by itself and does not begin, as long as
the system tells hosts apart. A moved directory needs its operator's word.

A damaged file is no reason to become another node: the VMs here are the first one's, and would be removed from the
other one as wanted by nobody. That too needs an operator's word.

An agent that cannot write cannot join, and a node that has not joined cannot be told to remove the VMs that fill its
disk: so a little space is kept for just this file.
"""

import contextlib
from pathlib import Path

import msgspec

from covey import durable, errors, model, observe, wire, world

_KEPT = 16  # secrets of joins whose answer was lost
_SPARE_BYTES = 64 << 10

_log = observe.log("agent")


class Home(model.Noun, frozen=True, kw_only=True):
    """Which directory of which host. `machine` "": the system does not tell hosts apart."""

    machine: str = ""
    path: str = ""
    inode: int = 0

    @classmethod
    def of(cls, data: Path, machine: str) -> "Home":
        return cls(machine=machine, path=str(data.resolve()), inode=data.stat().st_ino)

    def on_another_host(self, here: "Home") -> bool:
        return bool(self.machine and here.machine) and self.machine != here.machine

    def elsewhere(self, here: "Home") -> bool:
        """Another directory: a rename keeps the inode, and a restored backup the path."""
        return self.on_another_host(here) or (self.path != here.path and self.inode != here.inode)


class Identity(model.Noun, frozen=True, kw_only=True):
    """`host_key` is drawn once per data directory: the node's id follows from it, and by it another host with the same
    node id is refused."""

    host_key: str
    home: Home | None = None  # None: not noted yet
    node: model.NodeId = model.NOWHERE
    cloud: str = ""
    counter: int = 0
    secret: str = ""  # of the session that surely was
    offered: tuple[str, ...] = ()  # sent since, newest first: one of them may be the current one
    seen: wire.Seen = wire.Seen()


class _Controllers(model.Noun, frozen=True, kw_only=True):
    """controllers.json: what the cloud said last. Without it there are those that the node was joined with."""

    urls: tuple[str, ...]


def learnt(data: Path | None) -> tuple[str, ...]:
    """URLs of the controllers that the cloud had when it was asked last."""
    known = None if data is None else durable.read(data / "controllers.json", _Controllers)
    return () if known is None else known.urls


class File:
    """The identity file; without a directory it lives in memory. Without `sync` it survives this process, not the
    host: thousands of pretended nodes in one process must not wait for its disk."""

    def __init__(self, data: Path | None, clock: world.World, *, sync: bool = True) -> None:
        self._data = data
        self._clock = clock
        self._sync = sync
        self._learnt = learnt(data)
        self._path = None if data is None else data / "node.json"
        known = None if self._path is None else durable.read(self._path, Identity)
        self.now = known or Identity(host_key=clock.secret())

    def settle(self, home: Home, *, explicit: bool) -> None:
        """Begin here. Raises SettingError for a copy, or when the file was damaged; `explicit`: the operator says that
        it was moved, or shall be a new node (safety S7)."""
        damaged = None if self._path is None else durable.aside(self._path)
        if not self.now.node and not explicit and damaged is not None and damaged.exists():
            raise errors.SettingError(
                f"which node this is cannot be read ({damaged}): put a good copy in the place of {self._path}, or"
                " `covey join` again: that makes a new node of this host, and VMs that run here are removed in time"
            )
        before = self.now.home
        if before is not None and self.now.node:
            if before.on_another_host(home):
                raise errors.SettingError(
                    f"{home.path} belongs to another host: it is a copy of node {self.now.node}. `covey leave` here,"
                    " then `covey join`, make this host a node of its own; the first one is not touched by that"
                )
            if before.elsewhere(home) and not explicit:
                raise errors.SettingError(
                    f"{home.path} is a copy of {before.path}, or was moved: if it was moved, `covey join` again; a copy"
                    " must not run, it would take the node from the first one"
                )
        now = self.now
        if before is not None and not now.node and before.elsewhere(home):  # of an image, say: the key makes the node
            now = Identity(host_key=self._clock.secret())
        if before != home:
            self.write(msgspec.structs.replace(now, home=home))

    def write(self, identity: Identity) -> None:
        """Durable when it returns."""
        if self._path is not None:
            self._path.parent.mkdir(parents=True, exist_ok=True, mode=0o711)
            self._write(self._path, identity)
        self.now = identity

    def _write(self, path: Path, identity: Identity) -> None:
        spare = path.with_name("spare")
        try:
            durable.write(path, identity, fsync=self._sync)
        except OSError as error:
            if error.errno not in durable.NO_ROOM or not spare.exists():
                raise
            durable.discard(spare)
            durable.write(path, identity, fsync=self._sync)
            return
        if self._sync and not spare.exists():
            with contextlib.suppress(OSError):  # another time
                durable.replace(spare, bytes(_SPARE_BYTES))

    def pend(self, secret: str) -> tuple[str, ...]:
        """Make `secret` durable before it is offered; the secrets that may be the current one, likeliest first."""
        before = tuple(other for other in self.now.offered if other != secret)[: _KEPT - 1]
        self.write(msgspec.structs.replace(self.now, offered=(secret, *before)))
        repeated = (self.now.secret,) if self.now.secret else ()
        return (*before, *repeated)

    def remember(self, seen: wire.Seen) -> None:
        self.write(msgspec.structs.replace(self.now, seen=seen))

    def learn(self, controllers: tuple[str, ...]) -> None:
        """Keep where the cloud's controllers are now: those that this node was joined with may be replaced one day."""
        if controllers == self._learnt:
            return
        self._learnt = controllers
        if self._data is not None:
            try:
                durable.write(self._data / "controllers.json", _Controllers(urls=controllers), fsync=self._sync)
            except OSError as error:
                _log.warning("where the controllers are could not be written down", error=str(error))

    def joined(self, answer: wire.Joined, secret: str, seen: wire.Seen) -> None:
        """The session has begun: its secret is the one to show from now on."""
        self.write(
            msgspec.structs.replace(
                self.now,
                node=answer.node,
                cloud=answer.cloud,
                counter=answer.session,
                secret=secret,
                offered=(),
                seen=seen,
            )
        )
