"""The leak check of tests/conftest.py finds what it should, and only that."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from tests.tidy import repo

LEAKY = """
import asyncio
import subprocess

import pytest

kept = []


async def test_leaves_a_task():
    kept.append(asyncio.create_task(asyncio.sleep(60)))


async def test_task_that_ends_soon():
    kept.append(asyncio.create_task(asyncio.sleep(0.1)))


def test_leaves_a_process():
    kept.append(subprocess.Popen(["sleep", "7"]))


def test_leaves_a_detached_process():
    subprocess.run("setsid sleep 7 </dev/null >/dev/null 2>&1 &", shell=True, check=True)


def test_leaves_files():
    kept.append([open("/dev/null") for _ in range(40)])


@pytest.fixture(scope="module")
def server():
    with subprocess.Popen(["sleep", "60"]) as process:
        yield process
        process.kill()


def test_uses_what_lives_longer(server):
    assert server.poll() is None


def test_leaves_nothing():
    pass
"""


def test_leaks_are_found(tmp_path: Path) -> None:
    shutil.copy(repo.ROOT / "tests" / "conftest.py", tmp_path)
    (tmp_path / "test_leaky.py").write_text(LEAKY)
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            "-p",
            "no:xdist",
            "-o",
            "asyncio_mode=auto",
            ".",
        ],
        cwd=tmp_path,
        env={**os.environ, "COVEY_TEST_GRACE_S": "0.5"},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    blamed = re.findall(r"^ERROR \S+::(\w+) - Failed: (\w+)", done.stdout, flags=re.MULTILINE)
    assert blamed == [
        ("test_leaves_a_task", "tasks"),
        ("test_leaves_a_process", "processes"),
        ("test_leaves_a_detached_process", "processes"),
        ("test_leaves_files", "40"),
    ], done.stdout + done.stderr
    assert "7 passed" in done.stdout
