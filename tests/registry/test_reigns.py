"""Random histories of a set of registries in one process, from fixed seeds (safety S33, S34, S35); more of them:
`python -m tests.reigns --histories 1000`."""

import os

import pytest

from tests.reigns import planted, play

HISTORIES = int(os.environ.get("COVEY_REIGNS", "500"))
SHARES = 10


@pytest.mark.parametrize("share", range(SHARES))
def test_old_or_new_and_nothing_acknowledged_is_lost(share: int) -> None:
    for seed in range(1 + share, HISTORIES + 1, SHARES):
        try:
            play.run(seed)
        except play.Wrong as error:
            pytest.fail(f"python -m tests.reigns --first {seed} --histories 1 -v: {error}")


@pytest.mark.parametrize("bug", planted.FOUND_SOON)
def test_a_planted_bug_is_found(bug: str) -> None:
    for seed in range(1, 100):
        try:
            play.run(seed, planted.BUGS[bug])
        except play.Wrong:
            return
    pytest.fail(f"nothing shows that {bug}")


def test_what_was_given_up_by_force_displaces_nothing_that_came_after() -> None:
    """Its server comes back alone, with the longest log of all (safety S34)."""
    for seed in range(1, 61):
        try:
            play.run(seed, strands=True)
        except play.Wrong as error:
            pytest.fail(f"python -m tests.reigns --strands --first {seed} --histories 1 -v: {error}")


@pytest.mark.parametrize("bug", planted.FOUND_STRANDED)
def test_a_planted_bug_of_force_is_found(bug: str) -> None:
    for seed in range(1, 61):
        try:
            play.run(seed, planted.BUGS[bug], strands=True)
        except play.Wrong:
            return
    pytest.fail(f"nothing shows that {bug}")
