"""Creating instances: one transaction, all or none (safety S16, S17), and closing the door on a lost one (S15)."""

from collections.abc import Sequence
from typing import NamedTuple

from covey import model
from covey.store import codec, commit, view


class Start(NamedTuple):
    """A start request, accepted: `count` instances of one spec. `body` is the SHA-256 of the request's body.

    `key` is the Idempotency-Key's text ("" when there was none). The twin record of spec.external_id + spec.name is
    kept when both are given. `script_text` is the start script in base64, stored once under spec.script.key.
    """

    spec: model.Spec
    ids: tuple[model.InstanceId, ...]  # fresh UUIDs, 1 to 100
    who: str
    body: str = ""
    key: str = ""
    script_text: str = ""
    metadata: dict[str, str | int | bool] = {}


class Created(NamedTuple):
    """Done in this call."""

    ids: tuple[model.InstanceId, ...]
    revision: int


class Repeated(NamedTuple):
    """The same request was done before: these are its instances."""

    ids: tuple[model.InstanceId, ...]


class KeyReused(NamedTuple):
    """The Idempotency-Key belongs to a request with another body."""


async def create(
    writer: commit.Writer,
    snapshot: view.Snapshot,
    start: Start,
    homes: Sequence[model.NodeId] = (),
    until_ns: int = 0,
) -> Created | Repeated | KeyReused:
    """Create all instances of `start`, or none.

    `homes`: a node for each instance (from placement.home_for_new), to create and place in one transaction; when a
    node has changed meanwhile, the instances are created waiting and the loop places them.
    Raises Unavailable (nothing was done) or Unsure (answer 503). After Unsure the door is being closed in the
    background: what turns up nevertheless is terminated, unless the request had an Idempotency-Key, whose repeat
    finds it.
    """
    raise NotImplementedError
