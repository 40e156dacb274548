"""Random histories with kills, from fixed seeds; more of them: `python -m tests.histories --histories 1000`."""

import os

import pytest

from tests.histories import planted, play

HISTORIES = int(os.environ.get("COVEY_HISTORIES", "150"))
SHARES = 5


@pytest.mark.parametrize("share", range(SHARES))
def test_nothing_is_lost_wrong_or_left(share: int) -> None:
    for seed in range(1 + share, HISTORIES + 1, SHARES):
        try:
            play.run(seed)
        except play.Wrong as error:
            pytest.fail(f"python -m tests.histories --first {seed} --histories 1 -v: {error}")


@pytest.mark.parametrize("bug", planted.FOUND_SOON)
def test_a_planted_bug_is_found(bug: str) -> None:
    for seed in range(1, 400):
        try:
            play.run(seed, planted.BUGS[bug])
        except play.Wrong:
            return
    pytest.fail(f"nothing shows that {bug}")
