"""Released versions to test against: wheels kept in tests/upgrade/wheels, each run in an environment of its own."""

import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
WHEELS = ROOT / "tests" / "upgrade" / "wheels"


def kept() -> list[Path]:
    return sorted(WHEELS.glob("*.whl"))


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
