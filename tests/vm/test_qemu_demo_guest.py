"""Building the demo template: what it needs, what it keeps, and a layer that holds only the difference.

That the result boots, tells who it is and shows its layers is proved by every other test on a real guest.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from covey import errors
from covey.agent import demo_guest, qcow2
from tests.support import guest

BUILD = """
import pathlib, sys
from covey.agent import demo_guest
demo_guest.build(pathlib.Path(sys.argv[1]), cache=pathlib.Path(sys.argv[2]))
"""


def build(directory: Path, cache: Path, path: str) -> subprocess.CompletedProcess[str]:
    """Build in a process of its own, which sees the tools of `path`."""
    environment = {**os.environ, "PATH": path, "PYTHONPATH": str(guest.REPOSITORY)}
    words = [sys.executable, "-c", BUILD, str(directory), str(cache)]
    return subprocess.run(words, env=environment, capture_output=True, text=True, timeout=250, check=False)


def test_a_host_without_apt_is_told_what_is_missing(tmp_path: Path) -> None:
    done = build(tmp_path / "out", tmp_path / "cache", "/nonexistent")
    assert done.returncode != 0
    assert "apt-get is missing: the demo template is made of Debian packages" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_second_build_downloads_nothing(tmp_path: Path) -> None:
    guest.template()
    (tmp_path / "bin").mkdir()
    for tool in ("apt-get", "apt-cache"):
        (tmp_path / "bin" / tool).write_text("#!/bin/sh\nexit 1\n")
        (tmp_path / "bin" / tool).chmod(0o755)
    path = f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}"
    done = build(tmp_path / "out", guest.CACHE / "packages", path)
    assert done.returncode == 0, done.stderr
    built = {file.name for file in (tmp_path / "out").iterdir()}
    assert built == {"base.qcow2", "vmlinuz", "initrd", "config.json"}
    failed = build(tmp_path / "out2", tmp_path / "empty", path)
    assert failed.returncode != 0
    assert "HypervisorError" in failed.stderr


def test_a_layer_holds_only_the_difference(tmp_path: Path) -> None:
    (tmp_path / "base.qcow2").symlink_to(guest.template() / "base.qcow2")
    layer = demo_guest.build_layer(tmp_path, "top.qcow2", {"srv/new/deep/file": b"x" * 1000})
    assert layer == tmp_path / "top.qcow2"
    assert layer.stat().st_size < (guest.template() / "base.qcow2").stat().st_size / 5
    header = qcow2.check_chain([tmp_path / "base.qcow2", layer], ["base.qcow2", "top.qcow2"])
    assert header.backing == "base.qcow2"
    assert {file.name for file in tmp_path.iterdir()} == {"base.qcow2", "top.qcow2"}


def test_a_file_that_does_not_fit_is_not_passed_over(tmp_path: Path) -> None:
    (tmp_path / "base.qcow2").symlink_to(guest.template() / "base.qcow2")
    with pytest.raises(errors.HypervisorError, match=r"could not write /etc/passwd/below"):
        demo_guest.build_layer(tmp_path, "top.qcow2", {"etc/passwd/below": b"a file is no directory"})
    assert {file.name for file in tmp_path.iterdir()} == {"base.qcow2"}
