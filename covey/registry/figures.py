"""What a registry says of its storage: in the body of /readyz, in its metrics, and on the command line.

The same noun for whatever the storage is; a server reads it every few seconds and answers from what it read last, so
that a probe costs nothing and is answered when the storage hangs.
"""

from covey import model
from covey.registry import standing


class Figures(model.Noun, frozen=True, kw_only=True):
    """A storage as it was at the last look. Times are Unix seconds by the storage's clock, 0 for never."""

    total_bytes: int = 0
    free_bytes: int = 0  # what uploads may still take: the reserve is taken off
    quarantined: tuple[model.Digest, ...] = ()  # blobs whose bytes went bad and that nobody has pushed again
    trash_blobs: int = 0
    trash_bytes: int = 0
    collected_s: int = 0  # when a collection last ended
    collected_bytes: int = 0  # what that one freed
    scrubbed_s: int = 0  # when the whole storage had last been read and compared
    pushes: bool = True  # whether there is room for a push
    replica: standing.Standing | None = None  # of one of several with disks of their own, as it told of late

    def troubles(self) -> list[str]:
        """What somebody should do something about, one sentence each; empty when all is well."""
        found = []
        if not self.pushes:
            found.append("the disk is full: pushes are refused, pulls go on")
        if self.quarantined:
            found.append(f"{len(self.quarantined)} damaged blobs in quarantine: push them again")
        return found + (self.replica.troubles() if self.replica is not None else [])
