"""Log files: JSON lines that survive logrotate, and a disk that takes none."""

import contextlib
import io
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from covey import errors, observe, settings
from covey.cli import servers

LINE: dict[str, Any] = {"event": "the node joined", "level": "info", "node": "n-1"}


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def opened() -> Iterator[Callable[[Path], observe.File]]:
    files: list[observe.File] = []

    def open_(path: Path) -> observe.File:
        files.append(observe.File(path))
        return files[-1]

    yield open_
    for file in files:
        file.close()


def test_lines_are_appended_as_json_and_passed_on(tmp_path: Path, opened: Callable[[Path], observe.File]) -> None:
    path = tmp_path / "logs" / "covey-controller.log"
    for _ in range(2):  # the next life of the program goes on in the same file
        assert opened(path)(None, "info", dict(LINE)) == LINE
    assert lines(path) == [LINE, LINE]


@pytest.mark.parametrize("rotated", ["moved", "removed", "replaced"])
def test_a_file_that_was_taken_away_is_opened_again(
    rotated: str, tmp_path: Path, opened: Callable[[Path], observe.File]
) -> None:
    path = tmp_path / "covey-agent.log"
    file = opened(path)
    file(None, "info", dict(LINE))
    path.rename(tmp_path / "covey-agent.log.1") if rotated != "removed" else path.unlink()
    if rotated == "replaced":
        path.touch()
    file(None, "info", {**LINE, "node": "n-2"})
    assert lines(path) == [{**LINE, "node": "n-2"}]
    if rotated != "removed":
        assert lines(tmp_path / "covey-agent.log.1") == [LINE]


def test_a_file_that_cannot_be_written_costs_one_complaint(
    tmp_path: Path, opened: Callable[[Path], observe.File], capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "logs" / "covey-registry.log"
    file = opened(path)
    path.unlink()
    path.parent.rmdir()
    for _ in range(3):
        file(None, "info", dict(LINE))
    assert capsys.readouterr().err.count("cannot be written") == 1
    path.parent.mkdir()
    file(None, "info", dict(LINE))
    assert lines(path) == [LINE]


def test_a_full_disk_costs_lines_and_nothing_else(capsys: pytest.CaptureFixture[str]) -> None:
    file = observe.File(Path("/dev/full"))
    try:
        assert file(None, "info", dict(LINE)) == LINE
    finally:
        file.close()
    assert "No space left" in capsys.readouterr().err


def test_log_dir_is_a_setting_of_every_program(tmp_path: Path) -> None:
    environ = {"COVEY_CONFIG": "/dev/null", "ANKA_LOG_DIR": str(tmp_path), "COVEY_ALLOW_EMPTY_REGISTRY": "true"}
    for read in (settings.controller, settings.registry, settings.agent, settings.standalone):
        assert read(environ).log_dir == tmp_path


def test_a_log_dir_that_cannot_be_used_stops_the_start(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(errors.SettingError, match=r"LOG_DIR: .* cannot be written"):
        servers._log_file(tmp_path / "file" / "covey-agent.log")
    assert os.listdir(tmp_path) == ["file"]


def test_a_logger_that_is_kept_follows_standard_error() -> None:
    observe.configure(json=True)
    log = observe.log("test")
    first, second = io.StringIO(), io.StringIO()
    with contextlib.redirect_stderr(first):
        log.info("one")
    first_said = first.getvalue()
    first.close()
    with contextlib.redirect_stderr(second):
        log.info("two")
    assert "one" in first_said
    assert "two" in second.getvalue()
