"""Random histories of replicas on disks, from fixed seeds (safety S33, S35, S36, S37); more of them:
`python -m tests.histories.following --histories 1000`."""

import os

import pytest

from tests.histories import following

HISTORIES = int(os.environ.get("COVEY_FOLLOWINGS", "24"))
SHARES = 4


@pytest.mark.parametrize("share", range(SHARES))
def test_all_disks_are_alike_in_the_end(share: int) -> None:
    for seed in range(1 + share, HISTORIES + 1, SHARES):
        try:
            following.run(seed)
        except following.Wrong as error:
            pytest.fail(f"python -m tests.histories.following --first {seed} --histories 1 -v: {error}")


@pytest.mark.parametrize("bug", sorted(following.BUGS))
def test_a_planted_bug_is_found(bug: str) -> None:
    for seed in range(1, 30):
        try:
            following.run(seed, following.BUGS[bug])
        except following.Wrong:
            return
    pytest.fail(f"nothing shows that {bug}")
