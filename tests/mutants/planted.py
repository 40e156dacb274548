"""Planted bugs: patches that each take one rule out of the product, to see that the simulation misses it.

A patch is applied to a copy of the tree; nothing in the product can be switched. Its head says what it takes out, which
rule that breaks, within how many seeds (from 1 on) the simulation finds it, and which of them is told first because it
has shown the bug before:

    Takes out: the claims guard: a placement no longer compares the node's ledger
    Breaks: S11
    Seeds: 24
    Shown: 5
    --- a/covey/store/commit.py
    ...

A change of the product that has nothing to do with the rule may move every story by some milliseconds, and another seed
shows the bug then. So when none of the stated ones does, further ones are told, many times as many; only when these do
not show it either, the simulation has grown blind.
"""

import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDER = Path(__file__).resolve().parent
FOUND = "FAILED at seed"
FURTHER = 10  # times as many seeds as a patch states
_COPIED = ("covey", "tests/__init__.py", "tests/sim", "tests/support")


@dataclass(frozen=True)
class Planted:
    name: str
    patch: Path
    takes_out: str
    breaks: str
    seeds: int
    shown: int


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
    return Planted(path.stem, path, head["Takes out"], head["Breaks"], int(head["Seeds"]), int(head["Shown"]))


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
        ["patch", "-p1", "--batch", "--forward", "--fuzz=2", f"--input={bug.patch}"],
        cwd=where,
        capture_output=True,
        text=True,
        check=False,
    )
    assert applied.returncode == 0, f"{bug.patch.name} must be made anew: {applied.stdout}{applied.stderr}"


def look_for(bug: Planted, where: Path) -> str:
    """What the simulation says of the tree at `where`, its verdict last: of the seed shown, else of all that the patch
    states, else of further ones."""
    assert 1 <= bug.shown <= bug.seeds
    verdict = ""
    for first, seeds in ((bug.shown, 1), (1, bug.seeds), (bug.seeds + 1, FURTHER * bug.seeds)):
        verdict = _tell(where, first, seeds)
        if FOUND in verdict:
            break
    return verdict


def _tell(where: Path, first: int, seeds: int) -> str:
    ended = subprocess.run(
        [sys.executable, "-m", "tests.sim", "--seeds", str(seeds), "--first", str(first)],
        cwd=where,
        capture_output=True,
        text=True,
        check=False,
    )
    return ended.stdout + ended.stderr
