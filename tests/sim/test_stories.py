"""A few fixed stories in every test run; `make sim` tells many, with fresh seeds. Each is a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

_ROOT = Path(__file__).resolve().parents[2]


def tell(*arguments: str) -> str:
    """What ``python -m tests.sim`` says, its verdict last; fails when that is bad."""
    ended = subprocess.run(
        [sys.executable, "-m", "tests.sim", *arguments],
        cwd=_ROOT,
        env={**os.environ, "PYTHONHASHSEED": "0"},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout[-20000:] + ended.stderr[-5000:]
    return ended.stdout


def test_no_promise_is_broken() -> None:
    assert tell("--seeds", "16", "--first", "1").splitlines()[-1].startswith("OK: 16 seeds from 1 on")


def test_the_same_seed_tells_the_same_story() -> None:
    """Else a failing seed would show nothing."""
    first, again = (tell("--seed", "3", "--storm", "30") for _ in range(2))
    assert first.count("guest code") > 0
    assert first == again
