"""What may go because nothing needs it any more: pure.

Keys that live by a lease (births, remembered requests, events, nonces) go by themselves. What is left to decide: the
limit on remembered requests (safety S17), texts that no instance refers to (S26), and how far history may be compacted
(S28).
"""

from collections.abc import Iterable, Sequence

REMEMBERED_LIMIT = 200_000
HISTORY_NS = 15 * 60 * 1_000_000_000

Sample = tuple[int, int]  # (revision, when it was the newest, by this process's clock)


def beyond_limit(total: int, limit: int = REMEMBERED_LIMIT) -> int:
    """How many of the oldest remembered requests go."""
    return max(0, total - limit)


def unreferenced(users: int, mod_revision: int, seen_revision: int) -> bool:
    """Whether a text that is written together with the instances that refer to it has none left: only a view that is
    not older than the text can know."""
    return users == 0 and seen_revision >= mod_revision


def compact_to(samples: Sequence[Sample], now_ns: int, keep_ns: int = HISTORY_NS) -> int:
    """The newest revision that is older than `keep_ns`; 0 when there is none."""
    return max((revision for revision, at_ns in samples if now_ns - at_ns >= keep_ns), default=0)


def trimmed(samples: Sequence[Sample], now_ns: int, keep_ns: int = HISTORY_NS) -> list[Sample]:
    """The samples that are still of use."""
    newest = compact_to(samples, now_ns, keep_ns)
    return [sample for sample in samples if sample[0] >= newest]


_AGAIN_NS = 300 * 1_000_000_000  # after one that failed


def due(made_ns: int, tried_ns: int, now_ns: int, interval_ns: int) -> bool:
    """Whether the next scheduled backup or defragmentation is due: for thrift only, so clocks of several controllers
    may be compared. A time in the future (a clock was wrong) counts as none."""
    made_ago, tried_ago = now_ns - made_ns, now_ns - tried_ns
    if 0 <= made_ago < interval_ns:
        return False
    return not 0 <= tried_ago < min(interval_ns, _AGAIN_NS)


def expired(names: Iterable[str], keep: int) -> list[str]:
    """Those of the backups, whose names sort by age, that are beyond the newest `keep`."""
    return sorted(names)[: -max(1, keep)]


_WORTH_BYTES = 16 << 20
_WORTH_SHARE = 0.25


def defragment_pays(size_bytes: int, used_bytes: int) -> bool:
    """Whether a member's file holds so much room of no use that giving it back is worth the member's silence: a quarter
    of the file, and 16 MiB."""
    return size_bytes - used_bytes >= max(_WORTH_BYTES, _WORTH_SHARE * size_bytes)
