"""When enough time has passed: pure.

No wall clock is compared with another one, and no time in the store is read (safety S9). A controller *observes*: it
notes at which revision it first saw a thing stand as it does, and when by its own clock. The thing is ripe when the
same revision has stood for the whole span of its kind, and this controller was ready all the while: whoever was not
starts over (`Observed()`), so a frozen, cut-off or restarted controller is late, never early.
"""

from collections.abc import Iterable, Mapping
from enum import StrEnum
from typing import NamedTuple

from covey import wire
from covey.decide import heartbeat

_S = 1_000_000_000


class Kind(StrEnum):
    """What is waited for, and what follows when it does not come."""

    UNACKNOWLEDGED = "unacknowledged"  # a placement that its node has not named: withdraw it (S10)
    STALLED = "stalled"  # a placement that its node named, and shows no progress with: withdraw it (S10)
    SILENT = "silent"  # a node whose messages stand still although its lease lives: it is lost (S8)
    LOST = "lost"  # a launched instance whose node is away: Error, in the end
    TERMINATED = "terminated"  # an instance that is over: forget it
    ERROR = "error"  # an instance that failed: reap it
    UNWANTED = "unwanted"  # a claim that no instance wants: order its VM destroyed
    BREAK = "break"  # a restore of the store: what waits for nodes' words may begin once all have told (S19)
    WAITING = "waiting"  # an instance without a node: its turn comes nearer


class Spans(NamedTuple):
    """How long each kind may stand, in nanoseconds."""

    unacknowledged_ns: int = int(wire.ACKNOWLEDGE_S * _S)
    stalled_ns: int = 15 * 60 * _S  # a percent of the largest template over the slowest line
    silent_ns: int = int(heartbeat.silent_after_s(wire.HEARTBEAT_S) * _S)
    lost_ns: int = 24 * 3600 * _S
    terminated_ns: int = 60 * _S
    error_ns: int = 24 * 3600 * _S
    unwanted_ns: int = 150 * _S
    break_ns: int = 20 * _S  # in which nodes come forward that the store has forgotten
    waiting_ns: int = 10 * 60 * _S

    def of(self, kind: Kind) -> int:
        return int(getattr(self, f"{kind}_ns"))


class Thing(NamedTuple):
    """Something under observation: an instance, a node, or a claim (node, instance, epoch)."""

    kind: Kind
    id: str
    node: str = ""
    epoch: int = 0


class Since(NamedTuple):
    revision: int
    first_ns: int


Observed = dict[Thing, Since]


def observe(before: Mapping[Thing, Since], present: Iterable[tuple[Thing, int]], now_ns: int) -> Observed:
    """What stands now, each with when this revision of it was first seen. What is not there any more drops out."""
    after: Observed = {}
    for thing, revision in present:
        since = before.get(thing)
        after[thing] = since if since is not None and since.revision == revision else Since(revision, now_ns)
    return after


def ripe(observed: Mapping[Thing, Since], spans: Spans, now_ns: int, patience_ns: int = 0) -> list[Thing]:
    """Whose span is over, in a stable order. `patience_ns` is added by replicas that leave the first turn to another:
    for thrift, not for correctness."""
    over = (thing for thing, since in observed.items() if now_ns - since.first_ns >= spans.of(thing.kind) + patience_ns)
    return sorted(over)
