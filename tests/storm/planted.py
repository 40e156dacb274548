"""Bugs planted into a copy of the tree, to see that the storm finds them.

    python -m tests.storm.planted stale-read [--minutes 2] [--seed 7]

Each replaces a piece or two of the product's text; a test sees to it that they are still there. Exit status 0 means
that the storm over the copy ended with something wrong, as it should. docs/track-record.md tells what was found.
"""

import argparse
import dataclasses
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.support import lab_cloud, netlab


@dataclasses.dataclass(frozen=True, slots=True)
class Bug:
    """In each (file, old, new) `old` becomes `new`. `shows` names a word of the verdict that must come out wrong."""

    shows: str
    edits: tuple[tuple[str, str, str], ...]


BUGS = {
    # Reads are answered from the copy of the store as it is, without asking etcd how new it must be (promise I6).
    "stale-read": Bug(
        "answers that fit no order",
        (
            (
                "covey/store/mirror.py",
                'call (promise I6). Raises Unavailable."""\n        revision = await self._proof.read()',
                'call (promise I6). Raises Unavailable."""\n        revision = self._draft.revision',
            ),
        ),
    ),
    # A VM that an answer does not name is destroyed, as after each restart of its agent (safety S2).
    "absence-is-an-order": Bug(
        "killed by mistake",
        (
            (
                "covey/decide/convergence.py",
                '        return nothing(local.instance, local.epoch, "not named in the answer, which is no order")',
                '        decision = model.Decision(who="agent", why="not named in the answer")\n'
                "        return _step(Do.DESTROY, local, decision.why, decision=decision)",
            ),
        ),
    ),
    # A start whose answer got lost is done again when it is repeated: its key is not looked up (safety S17).
    "blind-retry": Bug(
        "doubled",
        (
            (
                "covey/controller/api_vm.py",
                "        if not key:\n            return ()",
                "        if True:\n            return ()",
            ),
            (
                "covey/store/commit_births.py",
                "remembered(schema.idempotency(start.key))\n        if record is not None:",
                "remembered(schema.idempotency(start.key))\n        if False:",
            ),
        ),
    ),
}


def plant(bug: Bug, root: Path) -> None:
    for file, old, new in bug.edits:
        text = (root / file).read_text()
        assert text.count(old) == 1, f"{file} has changed: plant the bug anew"
        (root / file).write_text(text.replace(old, new))


def copy_tree(root: Path) -> None:
    """All files that are or would be committed, and what the set-up unpacked."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=lab_cloud.ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    for name in filter(None, listed.split("\0")):
        if (lab_cloud.ROOT / name).is_file():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(lab_cloud.ROOT / name, root / name)
    (root / ".deps").symlink_to(lab_cloud.ROOT / ".deps")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.storm.planted")
    parser.add_argument("name", choices=BUGS)
    parser.add_argument("--minutes", default="2")
    parser.add_argument("--seed", default="7")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="covey-planted-", dir="/var/tmp") as folder:
        root = Path(folder)
        copy_tree(root)
        plant(BUGS[options.name], root)
        argv = [sys.executable, "-m", "tests.storm", "--minutes", options.minutes, "--seed", options.seed, "--discard"]
        environ = netlab.environment(PYTHONPATH=str(root))
        done = subprocess.run(argv, cwd=root, env=environ, stdout=subprocess.PIPE, text=True, check=False)
    print(done.stdout)  # noqa: T201
    shown = [line for line in done.stdout.splitlines() if line.startswith(BUGS[options.name].shows)]
    found = done.returncode == 1 and bool(shown) and not shown[0].endswith(" 0")
    print(f"{options.name}: {'found' if found else 'NOT found'} ({shown})")  # noqa: T201
    return 0 if found else 1


if __name__ == "__main__":
    sys.exit(main())
