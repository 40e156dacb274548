"""When the next backup of etcd is due, and which ones go."""

import pytest

from covey.decide import retention

HOUR = 3600 * 1_000_000_000
MINUTE = HOUR // 60


@pytest.mark.parametrize(
    ("made", "tried", "now", "due"),
    [
        (0, 0, 100 * HOUR, True),  # never
        (100 * HOUR, 100 * HOUR, 100 * HOUR + HOUR - 1, False),
        (100 * HOUR, 100 * HOUR, 101 * HOUR, True),
        (100 * HOUR, 101 * HOUR, 101 * HOUR + 4 * MINUTE, False),  # it failed just now
        (100 * HOUR, 101 * HOUR, 101 * HOUR + 5 * MINUTE, True),
        (200 * HOUR, 200 * HOUR, 100 * HOUR, True),  # a clock was wrong
    ],
)
def test_a_backup_is_due_after_the_interval_or_soon_after_a_failure(made: int, tried: int, now: int, due: bool) -> None:
    assert retention.due(made, tried, now, HOUR) is due


def test_the_oldest_backups_go() -> None:
    assert retention.expired(["c", "a", "b"], 2) == ["a"]
    assert retention.expired(["a"], 2) == []
    assert retention.expired(["b", "a"], 0) == ["a"], "one always stays"


@pytest.mark.parametrize(
    ("size", "used", "pays"),
    [
        (100, 70, True),
        (100, 80, False),
        (20, 5, False),
        (20, 4, True),
        (8000, 6100, False),
        (8000, 5900, True),
        (0, 0, False),
    ],
)
def test_a_member_is_defragmented_when_a_quarter_of_its_file_is_of_no_use(size: int, used: int, pays: bool) -> None:
    assert retention.defragment_pays(size << 20, used << 20) is pays
