"""Every kind of trouble that `covey status` can show has its section on the page that operators are sent to."""

from pathlib import Path

from covey.decide import troubles

PAGE = Path(__file__).parents[2] / "docs" / "operate" / "health.md"


def test_each_kind_of_trouble_has_its_section() -> None:
    headings = [line.removeprefix("### ") for line in PAGE.read_text("utf-8").splitlines() if line.startswith("### ")]
    assert sorted(headings) == sorted(troubles.Kind)
