"""bench/starts with tiny figures: each load shape runs, on real processes, and its numbers add up."""

import json
import pathlib
import re

import pytest

from bench import __main__ as program
from bench import chart, load, shapes, starts

SHAPES = ["isolated", "back to back", "steady", "burst", "flat out", "beside", "flat out again", "full fleet"]


@pytest.mark.timeout(500)
def test_every_shape_runs_and_its_numbers_add_up(tmp_path: pathlib.Path) -> None:
    figures, picture = tmp_path / "starts.json", tmp_path / "starts.svg"
    assert starts.main(["--quick", "--controllers", "1", "--json", str(figures), "--svg", str(picture)]) == 0
    (one,) = json.loads(figures.read_text())
    assert (one["controllers"], one["members"]) == (1, 1) and one["raw"] > 0
    assert [row["shape"].startswith(name) for row, name in zip(one["rows"], SHAPES, strict=True)] == [True] * 8
    for row in one["rows"]:
        assert row["lives"] > 0 and row["rate"] > 0 and row["failed"] == 0, row
        assert 0 < row["p50_ms"] <= row["p95_ms"] <= row["worst_ms"], row
        assert set(row["cpu_ms"]) == {"etcd", "controllers", "agents", "registry", "load"}, row
        assert sum(row["cpu_ms"].values()) > 0, row
    isolated, back_to_back, _, burst, *_, full = one["rows"]
    assert (isolated["lives"], back_to_back["lives"], burst["lives"], full["lives"]) == (3, 3, 8, 4)
    before, beside, after = one["rows"][4:7]
    assert one["beside"]["shape"] == beside["shape"]
    assert one["beside"]["rates"] == [pytest.approx(2 * beside["rate"] / (before["rate"] + after["rate"]))]
    assert picture.read_text().startswith("<svg") and picture.read_text().endswith("</svg>\n")


async def test_a_life_cycle_that_fails_is_counted_and_holds_up_nobody() -> None:
    class Refusing(load.Api):
        async def start(self) -> str:
            raise load.Refused("no")

    lives = shapes.Lives(Refusing(["http://127.0.0.1:1"], "t"), load.Watcher())
    row = await shapes.burst(lives, 3)
    assert (row.lives, row.failed, row.rate) == (0, 3, 0.0)


def test_bars_are_as_long_as_what_they_show() -> None:
    drawn = chart.draw("t", [chart.Panel("p", [("a", {"x": 1.0, "y": 3.0})], goal=8.0)])
    widths = [float(found) for found in re.findall(r'width="([0-9.]+)" height="15"', drawn)]
    assert [round(width / widths[0], 1) for width in widths] == [1.0, 3.0]


def test_each_measurement_has_its_name() -> None:
    for name in ("starts", "failover", "flood", "outages"):
        assert name in program.NAMES and f"    {name} " in str(program.__doc__)
