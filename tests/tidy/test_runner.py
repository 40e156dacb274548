"""The runner counts honestly: what did not run, or was skipped, has failed."""

import sys
from pathlib import Path

import pytest

from scripts import test as runner

REPORT = """
<testsuites><testsuite tests="{tests}" failures="{failures}" errors="{errors}" skipped="{skipped}"/></testsuites>
"""


@pytest.mark.parametrize(
    ("numbers", "status", "passed", "failed"),
    [
        ((5, 0, 0, 0), 0, 5, 0),
        ((5, 1, 0, 0), 1, 4, 1),
        ((5, 0, 1, 0), 1, 4, 1),
        ((5, 0, 0, 2), 0, 3, 2),  # a skipped test proves nothing
        ((0, 0, 0, 0), 5, 0, 1),  # no test was found
        ((5, 0, 0, 0), 3, 5, 1),  # pytest itself broke
    ],
)
def test_count(numbers: tuple[int, int, int, int], status: int, passed: int, failed: int, tmp_path: Path) -> None:
    report = tmp_path / "report.xml"
    names = ("tests", "failures", "errors", "skipped")
    report.write_text(REPORT.format(**dict(zip(names, numbers, strict=True))))
    result = runner.Result()
    runner.count(report, status, result)
    assert (result.passed, result.failed) == (passed, failed)


async def test_a_command_that_takes_too_long_is_ended_with_all_it_started(tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert await runner.run(["sh", "-c", "sleep 60 & sleep 60"], log, limit_s=0.3) == 124
    assert "ended after" in log.read_text()


async def test_a_missing_tool_has_failed(tmp_path: Path) -> None:
    result = runner.Result()
    await runner.run_checks(runner.Part("x", 1, 5, checks=(("no-such-tool",),)), tmp_path / "log", result)
    assert result.failed == 1


def test_every_test_folder_belongs_to_a_part() -> None:
    root = Path(__file__).resolve().parent.parent
    folders = {f"tests/{path.parent.relative_to(root).parts[0]}" for path in root.glob("*/**/test_*.py")}
    assert folders == {folder for part in runner.PARTS for folder in part.tests}


def test_one_product_has_one_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COVEY_TEST_SEED", raising=False)
    assert runner.seed_of_this_product() == runner.seed_of_this_product() < 2**31
    monkeypatch.setenv("COVEY_TEST_SEED", "7")
    assert runner.seed_of_this_product() == 7


async def test_what_was_compiled_once_is_kept_for_all_programs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    (tmp_path / "once.py").write_text("")
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import once"]
    assert await runner.run(command, tmp_path / "log", limit_s=60) == 0
    kept = Path(runner.environment()["PYTHONPYCACHEPREFIX"] + str(tmp_path))
    (compiled,) = kept.glob("once.*.pyc")
    compiled.unlink()
