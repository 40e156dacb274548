"""Wheels of released versions are kept in wheels/, so that an upgrade can be tested from each of them.

`make wheel ARGS=vX.Y.Z` puts them there after tagging. Each must still install beside today's dependencies and run:
otherwise no upgrade test could start from it. The wheel of the present tree is held to the same.
"""

import re
import subprocess
import sys
import sysconfig
from pathlib import Path

import covey

ROOT = Path(__file__).resolve().parent.parent.parent
WHEELS = Path(__file__).parent / "wheels"
LIMIT_BYTES = 1 << 20  # they stay in the repository for ever


def version_of(wheel: Path) -> str:
    return wheel.name.split("-")[1]


def run(*command: str | Path, cwd: Path = ROOT) -> str:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=90, check=False)
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return done.stdout


def covey_of(wheel: Path, place: Path) -> Path:
    """The `covey` program of `wheel`, in an environment of its own that borrows this one's dependencies."""
    run(sys.executable, "-m", "venv", "--without-pip", place)
    python = place / "bin" / "python"
    run(sys.executable, "-m", "uv", "pip", "install", "--offline", "--no-deps", "--python", python, wheel)
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    # A path entry, after the wheel's own: the .pth files in there are not followed, so today's covey is not seen.
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return place / "bin" / "covey"


def assert_runs(wheel: Path, place: Path) -> None:
    program = covey_of(wheel, place)
    assert version_of(wheel) in run(program, "--version", cwd=place)
    found = run(place / "bin" / "python", "-c", "import covey; print(covey.__file__)", cwd=place).strip()
    assert Path(found).is_relative_to(place), f"{wheel.name} is hidden by {found}"


def test_the_wheel_of_this_tree_runs(tmp_path: Path) -> None:
    build = ("build", "-q", "--wheel", "--offline", "--no-build-isolation", "--python", sys.executable)
    run(sys.executable, "-m", "uv", *build, "--out-dir", tmp_path / "dist", ROOT)
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    assert version_of(wheel) == covey.__version__
    assert wheel.stat().st_size < LIMIT_BYTES
    assert_runs(wheel, tmp_path / "env")


def test_kept_wheels_still_run(tmp_path: Path) -> None:
    for wheel in sorted(WHEELS.glob("*.whl")):
        assert wheel.stat().st_size < LIMIT_BYTES
        assert_runs(wheel, tmp_path / version_of(wheel))


def test_every_release_is_kept() -> None:
    """Every version tag but one that stands at this very commit: its wheel can only be committed afterwards."""
    tags = set(run("git", "tag", "--merged", "HEAD", "--list", "v*").split())
    here = set(run("git", "tag", "--points-at", "HEAD").split())
    released = {tag.removeprefix("v") for tag in tags - here if re.fullmatch(r"v\d+\.\d+\.\d+", tag)}
    assert released <= {version_of(wheel) for wheel in WHEELS.glob("*.whl")}
