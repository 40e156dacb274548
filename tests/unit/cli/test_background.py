"""The agent's saved settings, its lock, and the mark of an operator's join."""

import fcntl
import os
import stat
import threading
from pathlib import Path

import pytest

from covey import errors
from covey.cli import background


def test_settings_come_back_as_they_were(tmp_path: Path) -> None:
    variables = {
        "COVEY_NODE_NAME": 'a "quoted" \\ name with $HOME and # sign',
        "COVEY_CONTROLLER": "http://a:1,http://b:2",
    }
    file = background.save(tmp_path, variables)
    assert background.saved(tmp_path) == variables
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    background.save(tmp_path, {"COVEY_NODE_NAME": "b"})
    assert background.saved(tmp_path) == {"COVEY_NODE_NAME": "b"}


def test_nothing_saved(tmp_path: Path) -> None:
    assert background.saved(tmp_path) == {}


def test_a_line_break_cannot_be_saved(tmp_path: Path) -> None:
    with pytest.raises(errors.SettingError, match="line break"):
        background.save(tmp_path, {"COVEY_NODE_NAME": "a\nCOVEY_HYPERVISOR=x"})
    assert background.saved(tmp_path) == {}


def test_one_agent_per_data_directory(tmp_path: Path) -> None:
    assert background.running_pid(tmp_path) == 0
    with background.running_agent(tmp_path):
        assert background.running_pid(tmp_path) == os.getpid()
        with (
            pytest.raises(errors.SettingError, match=f"runs on .* already .process {os.getpid()}."),
            background.running_agent(tmp_path),
        ):
            pass
    assert background.running_pid(tmp_path) == 0  # what is written in the file counts only while the lock is held


def test_an_operators_wish_counts_once(tmp_path: Path) -> None:
    """(safety S7)"""
    background.save(tmp_path, {})
    assert not background.take_explicit(tmp_path)
    background.mark_explicit(tmp_path)
    assert background.take_explicit(tmp_path)
    assert not background.take_explicit(tmp_path)


def test_stopping_what_does_not_run(tmp_path: Path) -> None:
    assert not background.stop(tmp_path)


def test_who_only_asks_whether_an_agent_runs_keeps_none_from_starting(tmp_path: Path) -> None:
    """`covey leave` and `covey join` ask by the lock itself, for a moment."""
    with background.running_agent(tmp_path):
        pass
    asking = os.open(tmp_path / "agent" / "agent.lock", os.O_RDWR)
    fcntl.flock(asking, fcntl.LOCK_SH)
    assert background.running_pid(tmp_path) == 0, "two who ask do not take each other for the agent"
    threading.Timer(0.2, os.close, (asking,)).start()
    with background.running_agent(tmp_path):
        assert background.running_pid(tmp_path) == os.getpid()


def test_the_unit_of_another_data_directory_is_not_ours() -> None:
    """Its agent would be stopped, and its unit removed."""
    unit = "[Service]\nEnvironmentFile=/disk/srv/covey/agent/agent.env\nRestart=always\n"
    assert background.is_unit_of(Path("/disk/srv/covey"), unit)
    for other in ("/srv/covey", "/disk/srv/covey/agent", "/disk/srv"):
        assert not background.is_unit_of(Path(other), unit)
