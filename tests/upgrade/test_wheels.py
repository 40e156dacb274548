"""Wheels of released versions are kept in wheels/, so that an upgrade can be tested from each of them.

`make wheel ARGS=vX.Y.Z` puts them there after tagging. Each must still install beside today's dependencies and run:
otherwise no upgrade test could start from it. The wheel of the present tree is held to the same.
"""

import re
import sys
from pathlib import Path

import covey
from tests.support import wheels

LIMIT_BYTES = 1 << 20  # they stay in the repository for ever


def assert_runs(wheel: Path, place: Path) -> None:
    program = wheels.covey_of(wheel, place)
    assert wheels.version_of(wheel) in wheels.run(program, "--version", cwd=place)
    found = wheels.run(place / "bin" / "python", "-c", "import covey; print(covey.__file__)", cwd=place).strip()
    assert Path(found).is_relative_to(place), f"{wheel.name} is hidden by {found}"


def test_the_wheel_of_this_tree_runs(tmp_path: Path) -> None:
    build = ("build", "-q", "--wheel", "--offline", "--no-build-isolation", "--python", sys.executable)
    wheels.run(sys.executable, "-m", "uv", *build, "--out-dir", tmp_path / "dist", wheels.ROOT)
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    assert wheels.version_of(wheel) == covey.__version__
    assert wheel.stat().st_size < LIMIT_BYTES
    assert_runs(wheel, tmp_path / "env")


def test_kept_wheels_still_run(tmp_path: Path) -> None:
    for wheel in wheels.kept():
        assert wheel.stat().st_size < LIMIT_BYTES
        assert_runs(wheel, tmp_path / wheels.version_of(wheel))


def test_every_release_is_kept() -> None:
    """Every version tag but one that stands at this very commit: its wheel can only be committed afterwards."""
    tags = set(wheels.run("git", "tag", "--merged", "HEAD", "--list", "v*").split())
    here = set(wheels.run("git", "tag", "--points-at", "HEAD").split())
    released = {tag.removeprefix("v") for tag in tags - here if re.fullmatch(r"v\d+\.\d+\.\d+", tag)}
    assert released <= {wheels.version_of(wheel) for wheel in wheels.kept()}
