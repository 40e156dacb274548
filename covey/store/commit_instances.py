"""What happens to instances by decision: place, withdraw, launch, terminate, fail, update, forget."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from covey import model
from covey.store import codec, commit, view

Outcome = commit.Done[model.Instance] | commit.Missing


class Granted(NamedTuple):
    """This session may run guest code for this epoch (now, or already since the same nonce was granted)."""

    instance: codec.Kept[model.Instance]


class Denied(NamedTuple):
    why: str
    stale_session: bool = False  # answer 409


async def place(
    writer: commit.Writer, snapshot: view.Snapshot, node: model.NodeId, instances: Sequence[model.InstanceId]
) -> int | commit.Lost:
    """Give waiting instances to one node, all or none; the epoch of each rises (safety S1, S11).

    Compares each instance, the node's ledger, its session and the life of its alive key. Answers with the revision.
    """
    raise NotImplementedError


async def withdraw(
    writer: commit.Writer,
    snapshot: view.Snapshot,
    instance: codec.Kept[model.Instance],
    decision: model.Decision,
    *,
    node_lost: bool = False,
) -> commit.Done[model.Instance] | commit.Lost:
    """Take an un-launched instance from its node so that it waits again; the claim stays, with an order to destroy
    what the node may have begun (safety S10, S11)."""
    raise NotImplementedError


async def launch(
    writer: commit.Writer,
    snapshot: view.Snapshot,
    node: model.NodeId,
    session: int,
    instance: model.InstanceId,
    epoch: int,
    nonce: str,
    until_ns: int = 0,
) -> Granted | Denied:
    """Leave to run guest code (safety S1): compares the instance and the node's session."""
    raise NotImplementedError


async def terminate(
    writer: commit.Writer,
    snapshot: view.Snapshot,
    instance: model.InstanceId,
    decision: model.Decision,
    until_ns: int = 0,
) -> Outcome:
    """Terminating, or Terminated at once when no node holds a claim (safety S13). Repeats are `changed=False`."""
    raise NotImplementedError


async def fail(
    writer: commit.Writer, snapshot: view.Snapshot, instance: codec.Kept[model.Instance], message: str
) -> commit.Done[model.Instance] | commit.Lost:
    """Error, decided by a controller: nothing could ever take it."""
    raise NotImplementedError


async def reap(
    writer: commit.Writer,
    snapshot: view.Snapshot,
    instance: codec.Kept[model.Instance],
    decision: model.Decision,
) -> commit.Done[model.Instance] | commit.Lost:
    """Terminate what has been in Error for long."""
    raise NotImplementedError


async def update(
    writer: commit.Writer,
    snapshot: view.Snapshot,
    instance: model.InstanceId,
    *,
    metadata: Mapping[str, str | int | bool] | None = None,
    external_id: str | None = None,
    name: str | None = None,
    until_ns: int = 0,
) -> Outcome:
    """PUT: metadata is merged key by key, the others replaced when given."""
    raise NotImplementedError


async def forget(
    writer: commit.Writer, snapshot: view.Snapshot, instance: codec.Kept[model.Instance]
) -> bool | commit.Lost:
    """Remove a Terminated instance, its outputs, and its script when no other instance of the request is left."""
    raise NotImplementedError
