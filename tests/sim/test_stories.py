"""A few short stories in every test run; ``make sim`` tells many and longer ones."""

import pytest

from tests.sim import clockwork, story


@pytest.mark.parametrize("seed", [1, 2])
def test_no_promise_is_broken(seed: int) -> None:
    told = clockwork.run(seed, story.Story(storm_s=60.0))
    assert told.counts["boots"] > 0
    assert told.counts["terminations"] > 0


def test_the_same_seed_tells_the_same_story() -> None:
    """Else a failing seed would show nothing."""
    first, again = (clockwork.run(3, story.Story(storm_s=20.0)) for _ in range(2))
    assert first == again
