"""The power fails at each step of a push, of an entry, of a collection: a real file system on a loop device is shut
down with nothing flushed, and mounted again (tests/support/power.py).

What was acknowledged is there, what was under way is there or is not, everything that shows is whole, and the next push
and the next collection go on as if nothing had been.
"""

import asyncio
import sys
from pathlib import Path

import msgspec
import pytest

from tests.support import power, power_stories

LIMIT_S = 400.0
pytestmark = pytest.mark.timeout(500)
STRIDES = {"xfs": 1, "ext4": 3}  # every step on one, to be quick
STEPS = {
    "push": {
        *("registry.part.write", "registry.part.written", "registry.part.entered", "registry.upload.joined"),
        *("registry.blob.linked", "registry.blob.granted", "registry.put.written", "registry.manifest.stored"),
        *("registry.entry.written", "registry.entry.linked", "registry.name.claimed", "answered"),
    },
    "collect": {
        *("registry.care.moved", "registry.care.restored", "registry.care.destroyed", "registry.care.expired"),
        *("registry.entry.written", "registry.entry.linked", "answered"),
    },
}


async def play_all(folder: Path, kind: str, story: str, *, fsync: bool) -> power_stories.Outcome:
    child = await asyncio.create_subprocess_exec(
        *(*power.within(), sys.executable, "-m", "tests.support.power_stories"),
        *(kind, story, str(STRIDES[kind]), "fsync" if fsync else "unsafe", str(folder)),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        told, errors = await asyncio.wait_for(child.communicate(), LIMIT_S)
    finally:
        if child.returncode is None:
            child.kill()  # and its namespace with it: mounts, device, children
            await child.communicate()
    assert child.returncode == 0, errors.decode()
    return msgspec.json.decode(told, type=power_stories.Outcome)


@pytest.mark.parametrize("story", sorted(STEPS))
@pytest.mark.parametrize("kind", power.KINDS)
async def test_what_was_accepted_is_there_whenever_the_power_fails(tmp_path: Path, kind: str, story: str) -> None:
    outcome = await play_all(tmp_path, kind, story, fsync=True)
    assert outcome.wrong == []
    assert STEPS[story] <= set(outcome.steps)


@pytest.mark.parametrize("kind", power.KINDS)
async def test_without_fsync_a_loss_is_found(tmp_path: Path, kind: str) -> None:
    """The test can fail: the same story on a registry that flushes nothing."""
    outcome = await play_all(tmp_path, kind, "push", fsync=False)
    assert any("is None, not sha256:" in wrong for wrong in outcome.wrong)
