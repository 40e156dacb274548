"""What the host offers QEMU: the program, the processor's virtualisation, user ids."""

import hashlib
import os
import platform
import shutil
import subprocess
from pathlib import Path

from covey import errors

# User ids that systemd's table (UIDS-GIDS) calls unused: above its containers' range, below its home directories'.
_USERS_FIRST, _USERS_LAST = 1_879_100_000, 2_147_300_000


def kvm_works() -> bool:
    """Whether the processor virtualises and /dev/kvm opens. The device alone proves nothing: nested and emulated ones
    open as well, and then hang in the guest's firmware."""
    if platform.machine() != "x86_64":
        return False
    try:
        flags = Path("/proc/cpuinfo").read_text().split()
        os.close(os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC))
    except OSError:
        return False
    return "vmx" in flags or "svm" in flags


def users(root: Path, first: int, count: int) -> range:
    """The VMs' user ids: `count` from `first`, 0 for a range of this root directory's own; none unless we are root."""
    if os.geteuid() != 0:
        return range(0)
    if not first:
        choices = (_USERS_LAST - _USERS_FIRST) // count
        first = _USERS_FIRST + int.from_bytes(hashlib.sha256(str(root).encode()).digest()[:8], "big") % choices * count
    return range(first, first + count)


def check_installed(binary: str, qemu_img: str) -> None:
    """Raises HypervisorError with the remedy when a program is missing."""
    for tool, package in ((binary, "qemu-system-x86"), (qemu_img, "qemu-utils")):
        if shutil.which(tool) is None:
            raise errors.HypervisorError(f"{tool} is not installed: apt-get install {package}")


def version(binary: str, qemu_img: str) -> str:
    """QEMU's version. Raises with the remedy when it is missing."""
    check_installed(binary, qemu_img)
    try:
        said = subprocess.run([binary, "--version"], capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError) as fault:
        raise errors.HypervisorError(f"{binary} does not run: {fault}") from fault
    words = said.split()
    return words[3] if len(words) > 3 else said.strip()
