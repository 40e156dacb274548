"""bench/replica with a small tag and real processes, two of each server: a follower that is killed on the way goes on
where it stood (safety S37)."""

import json

import pytest

from bench import replica


@pytest.mark.timeout(500)
def test_killed_on_the_way_it_is_whole_in_the_end(capsys: pytest.CaptureFixture[str]) -> None:
    small = ["--only", "kills", "--size", "24", "--kills", "2", "--processes", "2"]
    assert replica.main(small) == 0
    found = json.loads(capsys.readouterr().out)["kills"]
    assert found["kills"] == 2
    assert found["twice_mib"] < 6 * found["kills"] + 2  # what lay in buffers, and the questions for news
