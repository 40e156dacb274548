"""Each planted bug is found by the simulation."""

from pathlib import Path

import pytest

from tests.mutants import planted

_BUGS = planted.all_planted()
_BY_NAME = {bug.name: bug for bug in _BUGS}


@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", sorted(_BY_NAME))
def test_the_simulation_finds_it(name: str, tmp_path: Path) -> None:
    bug = _BY_NAME[name]
    planted.plant(bug, tmp_path)
    verdict = planted.look_for(bug, tmp_path)
    assert planted.FOUND in verdict, f"{bug.takes_out} ({bug.breaks}) was not noticed:\n{verdict}"
    assert "Traceback" not in verdict or "unexpected fault" in verdict, f"it fails for another reason:\n{verdict}"


def test_the_page_lists_them_all() -> None:
    page = (planted.ROOT / "docs/simulation.md").read_text()
    for bug in _BUGS:
        assert f"| `{bug.name}` | {bug.takes_out} | {bug.breaks} | {bug.seeds} |" in page
