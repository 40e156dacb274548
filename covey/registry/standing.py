"""How a replica stands: what one process of a server finds out and all of them tell, in /readyz, metrics and status.

The process that follows writes it into a note of the storage; the others, and the supervisor, read that. So it is told
without asking anybody, and a reader sees by its age when nobody follows any more.
"""

import msgspec

from covey import model
from covey.registry import blobs

NOTE = "replica"
OLD_S = 15.0  # a note older than this was left by a server that does not run


class Standing(model.Noun, frozen=True, kw_only=True, omit_defaults=False):
    """One server of a set of replicas, as it was `at_s` (the storage's clock, as the note's)."""

    url: str = ""
    term: int = 0
    holder: str = ""  # the push registry, as far as this server knows; "": it knows of none
    mine: bool = False  # it is this one
    reached: bool = True  # whether the holder answers
    unreached: str = ""  # why not
    alone_s: float = 0.0  # the holder: since when no other server was heard of; 0: that was a moment ago
    lag_s: float = 0.0  # since when something of the holder's is lacking, or not known; 0: everything is here
    lag_bytes: int = 0  # of the blobs that are wanted and not here, as far as their sizes are known
    missing_blobs: int = 0
    missing_entries: int = 0  # of logs that could not be copied yet
    nowhere: tuple[model.Digest, ...] = ()  # some of the blobs that are wanted and that no server has
    nowhere_blobs: int = 0
    aside: dict[str, int] = {}  # log → how many entries were set aside
    rejected_blobs: int = 0  # whose bytes were not what their digest says, since the start
    accepted_entries: int = 0  # on the holder: that etcd keeps for servers which lack them
    accepted_bytes: int = 0
    accepted_for: tuple[str, ...] = ()  # those servers
    accepted_dropped: int = 0  # that etcd could not keep for them
    trouble: str = ""

    def troubles(self) -> list[str]:
        """What somebody should do something about, one sentence each."""
        found = [self.trouble] if self.trouble else []
        if not self.holder:
            found.append("no push registry is known: pushes are refused")
        elif not self.reached:
            why = f" ({self.unreached})" if self.unreached else ""
            found.append(f"the push registry {self.holder} does not answer{why}: pushes wait for it, pulls go on")
        if self.alone_s:
            found.append(
                f"no other server of the set has been heard of for {self.alone_s:.0f} s: without etcd, what is pushed"
                " here is set aside later if one of them was promoted by force meanwhile"
            )
        if self.nowhere_blobs:
            found.append(f"{self.nowhere_blobs} blobs are in no registry of the set: push their templates again")
        if self.accepted_dropped and self.accepted_for:
            found.append(
                f"{', '.join(self.accepted_for)} lacks more accepted entries than etcd keeps:"
                " it must follow for a while before it can take pushes"
            )
        if self.aside:
            count = sum(self.aside.values())
            found.append(f"{count} entries of {len(self.aside)} repositories were set aside: see covey registry status")
        return found


async def read(care: blobs.Care) -> Standing | None:
    """What the process that follows told last; None: nothing of late."""
    note = (await care.notes(NOTE)).get(NOTE)
    if note is None or await care.clock_s() - note.at_s > OLD_S:
        return None
    try:
        return msgspec.json.decode(note.content, type=Standing)
    except (msgspec.MsgspecError, UnicodeDecodeError):
        return None
