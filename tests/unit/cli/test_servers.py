"""What the server programs ask of their host."""

import subprocess
import sys

import pytest

SHOWN = """
import os, threading
from covey.cli import servers
servers.go_first({priority})
found = []
later = threading.Thread(target=lambda: found.append(os.getpriority(os.PRIO_PROCESS, threading.get_native_id())))
later.start()
later.join()
print(os.getpriority(os.PRIO_PROCESS, 0), *found)
"""


def _run(*before: str, priority: int) -> str:
    command = [*before, sys.executable, "-c", SHOWN.format(priority=priority)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize(("priority", "shown"), [(10, "-10 -10"), (0, "0 0")])
def test_a_controller_goes_before_others_with_all_its_threads(priority: int, shown: str) -> None:
    assert shown in _run(priority=priority)


def test_where_that_is_not_permitted_it_runs_like_the_others() -> None:
    """Without the capability, and without a limit that would allow it."""
    assert "0 0" in _run("setpriv", "--bounding-set=-sys_nice", "--inh-caps=-sys_nice", priority=10)
