"""The collector's rules, each with its reason."""

import pytest

from covey import model
from covey.decide import garbage

DIGEST = model.Digest("sha256:" + "a" * 64)
HOUR = 3600.0
PERIODS = garbage.Periods(grace_s=24 * HOUR, trash_s=12 * HOUR)
NOW = 1000 * HOUR
NEEDED = {DIGEST: "a:v1 needs it"}


def blob(*, hours: float, touched: float | None = None) -> garbage.Blob:
    touched_s = 0.0 if touched is None else NOW - touched * HOUR
    return garbage.Blob(digest=DIGEST, size_bytes=1, since_s=NOW - hours * HOUR, touched_s=touched_s)


@pytest.mark.parametrize(
    ("found", "needs", "fate", "reason"),
    [
        (blob(hours=999), NEEDED, garbage.Fate.STAY, "a:v1 needs it"),
        (blob(hours=23), {}, garbage.Fate.STAY, "stored 23 h ago"),
        (blob(hours=999, touched=0.5), {}, garbage.Fate.STAY, "asked for 30 min ago"),
        (blob(hours=25), {}, garbage.Fate.TRASH, "nothing needs it, and nobody asked for it for 25 h"),
        (blob(hours=99, touched=72), {}, garbage.Fate.TRASH, "nothing needs it, and nobody asked for it for 3 days"),
    ],
)
def test_on_the_shelf(found: garbage.Blob, needs: garbage.Needs, fate: garbage.Fate, reason: str) -> None:
    ruling = garbage.on_shelf(found, needs, NOW, PERIODS)
    assert (ruling.fate, ruling.reason) == (fate, reason)


@pytest.mark.parametrize(
    ("found", "needs", "fate", "reason"),
    [
        (blob(hours=99), NEEDED, garbage.Fate.RESTORE, "a:v1 needs it"),
        (blob(hours=99, touched=2), {}, garbage.Fate.RESTORE, "asked for 2 h ago"),
        (blob(hours=11), {}, garbage.Fate.STAY, "in the trash for 11 h of 12 h"),
        (blob(hours=13), {}, garbage.Fate.DELETE, "in the trash for 13 h, and nothing needs it"),
    ],
)
def test_in_the_trash(found: garbage.Blob, needs: garbage.Needs, fate: garbage.Fate, reason: str) -> None:
    ruling = garbage.in_trash(found, needs, NOW, PERIODS)
    assert (ruling.fate, ruling.reason) == (fate, reason)


@pytest.mark.parametrize(
    ("found", "needs", "healed", "fate"),
    [
        (blob(hours=1), NEEDED, True, garbage.Fate.DELETE),
        (blob(hours=999), NEEDED, False, garbage.Fate.STAY),
        (blob(hours=1), {}, False, garbage.Fate.STAY),
        (blob(hours=25), {}, False, garbage.Fate.DELETE),
    ],
)
def test_in_quarantine(found: garbage.Blob, needs: garbage.Needs, healed: bool, fate: garbage.Fate) -> None:
    assert garbage.in_quarantine(found, needs, healed=healed, now_s=NOW, periods=PERIODS).fate is fate


def test_a_right_to_read_stays_while_it_is_needed_or_used() -> None:
    assert garbage.grant_stays(DIGEST, 0.0, NEEDED, NOW, PERIODS)
    assert garbage.grant_stays(DIGEST, NOW - 23 * HOUR, {}, NOW, PERIODS)
    assert not garbage.grant_stays(DIGEST, NOW - 25 * HOUR, {}, NOW, PERIODS)
