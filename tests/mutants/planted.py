"""Planted bugs: patches that each take one rule out of the product, to see that the simulation misses it.

A patch is applied to a copy of the tree; nothing in the product can be switched. Its head says what it takes out, which
rule that breaks, and within how many seeds (from 1 on) the simulation must find it:

    Takes out: the claims guard: a placement no longer compares the node's ledger
    Breaks: S11
    Seeds: 24
    --- a/covey/store/commit.py
    ...
"""

import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDER = Path(__file__).resolve().parent
_COPIED = ("covey", "tests/__init__.py", "tests/sim", "tests/support")


@dataclass(frozen=True)
class Planted:
    name: str
    patch: Path
    takes_out: str
    breaks: str
    seeds: int


def all_planted() -> list[Planted]:
    """By name."""
    return [_read(path) for path in sorted(FOLDER.glob("*.patch"))]


def _read(path: Path) -> Planted:
    head: dict[str, str] = {}
    for line in path.read_text().splitlines():
        if line.startswith("--- "):
            break
        name, _, value = line.partition(": ")
        head[name] = value
    return Planted(path.stem, path, head["Takes out"], head["Breaks"], int(head["Seeds"]))


def plant(bug: Planted, where: Path) -> None:
    """Make a copy of the tree with the bug in it. Raises AssertionError when the patch no longer applies."""
    for name in _COPIED:
        source, target = ROOT / name, where / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, target)
    applied = subprocess.run(
        ["patch", "-p1", "--batch", "--forward", "--fuzz=1", f"--input={bug.patch}"],
        cwd=where,
        capture_output=True,
        text=True,
        check=False,
    )
    assert applied.returncode == 0, f"{bug.patch.name} must be made anew: {applied.stdout}{applied.stderr}"


def look_for(where: Path, seeds: int) -> str:
    """What the simulation says of the tree at `where`, its verdict last."""
    ended = subprocess.run(
        [sys.executable, "-m", "tests.sim", "--seeds", str(seeds), "--first", "1"],
        cwd=where,
        capture_output=True,
        text=True,
        check=False,
    )
    return ended.stdout + ended.stderr
