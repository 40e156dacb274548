"""bench/registry with tiny files: each way of moving them runs on nginx and on Covey, and its numbers add up."""

import json

import pytest

from bench import registry

WAYS = ["pull", "pull, TLS", "push, fsync off", "push, fsync on"]


@pytest.mark.timeout(500)
def test_every_way_runs_and_its_numbers_add_up(capsys: pytest.CaptureFixture[str]) -> None:
    tiny = ["--size", "2", "--rounds", "1", "--processes", "2", "--templates", "20", "--tags", "3", "--json"]
    assert registry.main([*tiny, "--only", "pull", "tls", "push", "names"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [(row["what"], row["at_once"]) for row in found["rows"]] == [(way, many) for way in WAYS for many in (1, 4)]
    for row in found["rows"]:
        assert len(row["nginx"]) == len(row["covey"]) == 1
        assert row["nginx"][0] > 0 and row["covey"][0] > 0, row
    assert set(found["peak_mb"]) == set(WAYS)
    assert all(20 < peak < 150 for peak in found["peak_mb"].values()), found["peak_mb"]
    names = found["names"]
    assert (names["templates"], names["tags"]) == (20, 60)
    assert names["start_s"] > 0 and names["list_ms"] > 0
