"""Bugs can still be planted where `planted` says."""

import shutil
from pathlib import Path

import pytest

from tests.storm import planted
from tests.support import lab_cloud


@pytest.mark.parametrize("name", planted.BUGS)
def test_a_bug_can_be_planted(name: str, tmp_path: Path) -> None:
    bug = planted.BUGS[name]
    for file, _, _ in bug.edits:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(lab_cloud.ROOT / file, tmp_path / file)
    planted.plant(bug, tmp_path)
    for file, old, _ in bug.edits:
        changed = (tmp_path / file).read_text()
        assert old not in changed
        compile(changed, file, "exec")
