"""Nodes: join, leave, remove, configure, their word, and orders to destroy (safety S2, S7, S11, S12)."""

from collections.abc import Mapping
from enum import StrEnum
from typing import NamedTuple

from covey import model, wire
from covey.store import codec, commit, schema, view


class Joined(NamedTuple):
    """`session.noun.counter` is the new life; the agent's lease is session.noun.lease."""

    session: codec.Kept[model.Session]
    node: codec.Kept[model.Node]
    repeated: bool = False


class Why(StrEnum):
    """Why a join is refused."""

    REMOVED = "the node was removed"  # 410
    SECRET = "the last session's secret is wrong"  # noqa: S105 - a text  # 409
    HOST = "the node id belongs to another host"
    ALIVE = "the node's last session is still alive"  # explicit join: wait until its lease has ended
    UNKNOWN = "the node is not known here"  # hold; `covey join` registers it again
    CLOUD = "the agent belongs to another cloud"


class JoinRefused(NamedTuple):
    why: Why


class StillClaimed(NamedTuple):
    """Leaving is refused: these instances hold claims on the node."""

    instances: tuple[model.InstanceId, ...]


class Left(NamedTuple):
    node: model.NodeId


async def join(
    writer: commit.Writer, snapshot: view.Snapshot, join: wire.Join, until_ns: int = 0
) -> Joined | JoinRefused:
    """A new life of an agent (safety S7): grants its lease, replaces the session, writes the alive key; at the first
    join also the node and its empty ledger. The same join repeated (its reply was lost) gets the same answer."""
    raise NotImplementedError


async def leave(
    writer: commit.Writer, snapshot: view.Snapshot, node: model.NodeId, session: int, *, force: bool, who: str
) -> Left | StillClaimed | commit.Lost | commit.Missing:
    """The agent leaves for good. With `force` and claims it is a removal."""
    raise NotImplementedError


async def remove(
    writer: commit.Writer, snapshot: view.Snapshot, node: model.NodeId, who: str, until_ns: int = 0
) -> Left | commit.Missing:
    """An operator removes the node (safety S12): first its session and life end and it is marked removed; then, in as
    many transactions as needed (the loop finishes what a crash left), its instances go to Error and its claims become
    destroy orders."""
    raise NotImplementedError


async def configure(
    writer: commit.Writer,
    snapshot: view.Snapshot,
    node: model.NodeId,
    changes: Mapping[str, object],
    who: str,
    until_ns: int = 0,
) -> commit.Done[model.Node] | commit.Missing:
    """Set fields of the node (by their model names: name, host, max_vms, capacity_mode, drain, …)."""
    raise NotImplementedError


async def say(
    writer: commit.Writer, snapshot: view.Snapshot, node: model.NodeId, session: int, word: model.Word
) -> commit.Done[model.Word] | commit.Lost:
    """The node's last word. VMs that it names and the ledger lacks enter the ledger as claims (safety S11)."""
    raise NotImplementedError


async def order(
    writer: commit.Writer,
    snapshot: view.Snapshot,
    node: model.NodeId,
    instance: model.InstanceId,
    epoch: int,
    decision: model.Decision,
) -> commit.Done[model.Order] | commit.Lost:
    """Order a VM's destruction, guarded on the instance key as seen: its revision, or its absence (safety S2)."""
    raise NotImplementedError
