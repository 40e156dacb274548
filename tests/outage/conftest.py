"""The outage suite writes its figures to .cache/figures/outage.json and shows them as a table when all is over.

A file, because with pytest-xdist the tests run in other processes than the one that prints. Each figure is a file's
line of its own, appended whole, so that workers do not disturb each other.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
FIGURES = REPOSITORY / ".cache" / "figures"
COLUMNS = (
    "outage",
    "stall s",
    "recovery s",
    "answered",
    "unsure",
    "unavailable",
    "events",
    "lost",
    "doubled",
    "misreported",
)
_run_key = pytest.StashKey[str]()


def pytest_configure(config: pytest.Config) -> None:
    """Name this run; workers of pytest-xdist inherit the name."""
    config.stash[_run_key] = os.environ.setdefault("COVEY_OUTAGE_RUN", str(os.getpid()))


@pytest.fixture
def figure(request: pytest.FixtureRequest) -> Callable[[dict[str, object]], None]:
    """Record one line of the table."""

    def record(values: dict[str, object]) -> None:
        FIGURES.mkdir(parents=True, exist_ok=True)
        with _lines(request.config).open("a") as file:
            file.write(json.dumps(values) + "\n")

    return record


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    lines = _lines(config)
    if not lines.exists() or "PYTEST_XDIST_WORKER" in os.environ:
        return
    figures = [json.loads(line) for line in lines.read_text().splitlines()]
    lines.unlink()
    (FIGURES / "outage.json").write_text(json.dumps(figures, indent=2) + "\n")
    rows = [COLUMNS, *(tuple(str(figure.get(column, "")) for column in COLUMNS) for figure in figures)]
    widths = [max(len(row[place]) for row in rows) for place in range(len(COLUMNS))]
    terminalreporter.section("etcd outages: 3 members on disk")
    for row in rows:
        cells = (
            cell.ljust(width) if not place else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        terminalreporter.line("  ".join(cells))


def _lines(config: pytest.Config) -> Path:
    return FIGURES / f"outage-{config.stash[_run_key]}.jsonl"
