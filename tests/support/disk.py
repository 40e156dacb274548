"""A small disk for one program: a tmpfs that only this program sees, and that the test makes larger or smaller.

    disk = disk.Small(folder, 64)                 # MiB
    program = Program("agent", …, within=disk.within())
    disk.resize(program.pid, 4096)                # space comes back
    disk.files(program.pid)                       # what lies there, by path

The mount lives in the program's own mount namespace, so it is gone when the program is, however that ends.
"""

import os
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path


class Small:
    """A disk of `size_mib` at `folder`."""

    def __init__(self, folder: Path, size_mib: int) -> None:
        self.folder = folder
        self._size_mib = size_mib
        self._root = os.geteuid() == 0
        folder.mkdir(parents=True, exist_ok=True)

    def within(self) -> Sequence[str]:
        """The words before a command that mount the disk and then become that command, with the same process id."""
        namespace = ("unshare", "--mount") if self._root else ("unshare", "--user", "--map-root-user", "--mount")
        script = f'mount -t tmpfs -o size={self._size_mib}m,mode=755 none "$0" && exec "$@"'
        return (*namespace, "--propagation", "private", "sh", "-c", script, str(self.folder))

    def resize(self, pid: int, size_mib: int) -> None:
        """Give space back, or take away what is free."""
        enter = ("--mount",) if self._root else ("--user", "--preserve-credentials", "--mount")
        words = ("mount", "-o", f"remount,size={size_mib}m", str(self.folder))
        subprocess.run(["nsenter", f"--target={pid}", *enter, *words], check=True, timeout=90)

    def files(self, pid: int, below: str = "") -> Mapping[str, int]:
        """Path below the disk → size in bytes."""
        root = Path(f"/proc/{pid}/root{self.folder}") / below
        return {
            str(Path(folder, name).relative_to(root)): Path(folder, name).stat().st_size
            for folder, _, names in os.walk(root)
            for name in names
        }
