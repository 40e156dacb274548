"""Bugs can still be planted where `planted` says."""

import shutil
from pathlib import Path

import pytest

from tests.storm import planted
from tests.support import lab_cloud


@pytest.mark.parametrize("name", planted.BUGS)
def test_a_bug_can_be_planted(name: str, tmp_path: Path) -> None:
    bug = planted.BUGS[name]
    (tmp_path / bug.file).parent.mkdir(parents=True)
    shutil.copy(lab_cloud.ROOT / bug.file, tmp_path / bug.file)
    planted.plant(bug, tmp_path)
    changed = (tmp_path / bug.file).read_text()
    assert changed != (lab_cloud.ROOT / bug.file).read_text()
    if bug.file.endswith(".py"):
        compile(changed, bug.file, "exec")
