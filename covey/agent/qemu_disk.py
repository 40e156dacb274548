"""A QEMU VM on disk. One directory per (instance, epoch), root's; QEMU's user owns only what is below ``run``.

    ROOT/INSTANCE.EPOCH/
        vm.json        the plan, the user id, the screen's password
        vm.lock        flocked by QEMU while it runs (inherited at the fork)
        forking        durable before QEMU is forked: guest code may have run (safety S5)
        stopping       durable before a shutdown on request: what ends now was stopped, not lost
        job.json       durable before the start script is launched; job.out, job.err: its last output (`tail`)
        qemu.log       what QEMU wrote
        run/           QEMU's working directory
            disk.qcow2     the overlay; its header names no other file
            qmp.sock guest.sock vnc.secret
    ROOT/.new-…        a directory being made; ROOT/.gone-… one being removed: neither is a VM

A directory appears and disappears whole, by rename. What a crash left aside is swept by the next look.
"""

import contextlib
import errno
import fcntl
import os
import shutil
import subprocess
from collections.abc import Collection, Iterator
from pathlib import Path

from covey import durable, errors, model
from covey.agent import hypervisor, qcow2

OVERLAY, VNC_SECRET = "disk.qcow2", "vnc.secret"  # below run
_NEW, _GONE = ".new-", ".gone-"
_READABLE = 0o444


class Record(model.Noun, frozen=True, kw_only=True):
    """What is remembered of a VM for as long as it exists."""

    plan: hypervisor.Plan
    user: int | None
    vnc_password: str
    made_ns: int


class Begun(model.Noun, frozen=True, kw_only=True):
    """A start script was or would be launched. `at_boot_ns`: by the host's clock; `guest_boot`: in that boot."""

    at_boot_ns: int
    guest_boot: str


class _Mark(model.Noun, frozen=True, kw_only=True):
    """A file that says something by being there."""


class Place:
    """The directory of one VM."""

    def __init__(self, root: Path, instance: model.InstanceId, epoch: int) -> None:
        self.path = hypervisor.vm_dir(root, instance, epoch)
        self.run = self.path / "run"
        self.monitor = self.run / "qmp.sock"
        self.guest = self.run / "guest.sock"
        self.log = self.path / "qemu.log"
        self.job_out = self.path / "job.out"
        self.job_err = self.path / "job.err"
        self._root = root

    def record(self) -> Record | None:
        return durable.read(self.path / "vm.json", Record)

    @property
    def user(self) -> int:
        """Whom its QEMU runs as."""
        record = self.record()
        return os.geteuid() if record is None or record.user is None else record.user

    def begun(self) -> Begun | None:
        return durable.read(self.path / "job.json", Begun)

    def begin(self, begun: Begun) -> None:
        durable.write(self.path / "job.json", begun)

    @property
    def forked(self) -> bool:
        return (self.path / "forking").exists()

    def mark_forking(self) -> None:
        durable.write(self.path / "forking", _Mark())

    @property
    def stopping(self) -> bool:
        return (self.path / "stopping").exists()

    def mark_stopping(self) -> None:
        durable.write(self.path / "stopping", _Mark())

    def lock(self) -> int:
        """Take the lock, to be inherited by QEMU. Raises when it is held: the VM runs."""
        held = os.open(self.path / "vm.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as fault:
            os.close(held)
            raise errors.HypervisorError("this VM runs already") from fault
        return held

    def locked(self) -> bool:
        try:
            probe = os.open(self.path / "vm.lock", os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            return False
        try:
            fcntl.flock(probe, fcntl.LOCK_SH | fcntl.LOCK_NB)
            fcntl.flock(probe, fcntl.LOCK_UN)  # closing is not enough: a child being forked meanwhile has a copy
        except BlockingIOError:
            return True
        finally:
            os.close(probe)
        return False

    def make(self, record: Record, qemu_img: str) -> None:
        """Make the directory with an empty overlay of the top layer's size; it appears when it is whole."""
        aside = self._root / f"{_NEW}{self.path.name}"
        shutil.rmtree(aside, ignore_errors=True)
        try:
            top = qcow2.check_chain([Path(layer) for layer in record.plan.image.layers])
            aside.mkdir(mode=0o711)
            self._fill(aside, record, top.virtual_bytes, qemu_img)
            aside.rename(self.path)
            durable.sync_dir(self._root)
        except (OSError, errors.CoveyError) as fault:
            shutil.rmtree(aside, ignore_errors=True)
            raise _shown(fault, self._root) from fault

    def _fill(self, aside: Path, record: Record, size_bytes: int, qemu_img: str) -> None:
        run = aside / "run"
        run.mkdir(mode=0o700)
        _call(qemu_img, "create", "-q", "-f", "qcow2", str(run / OVERLAY), str(size_bytes))
        (run / VNC_SECRET).write_text(record.vnc_password)
        (run / VNC_SECRET).chmod(0o400)
        if record.user is not None:
            for path in (run / OVERLAY, run / VNC_SECRET, run):
                os.chown(path, record.user, record.user)
        durable.write(aside / "vm.json", record)

    def remove(self) -> None:
        """Remove the directory: at once for whoever looks, its files after."""
        gone = self._root / f"{_GONE}{self.path.name}"
        shutil.rmtree(gone, ignore_errors=True)
        with contextlib.suppress(FileNotFoundError):
            self.path.rename(gone)
            durable.sync_dir(self._root)
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(gone)
        shutil.rmtree(self._root / f"{_NEW}{self.path.name}", ignore_errors=True)


def places(root: Path) -> Iterator[tuple[model.InstanceId, int, Place]]:
    """Every VM directory below `root`."""
    with contextlib.suppress(FileNotFoundError):
        for name in sorted(os.listdir(root)):
            instance, _, epoch = name.rpartition(".")
            if instance and epoch.isdecimal() and not name.startswith("."):
                yield model.InstanceId(instance), int(epoch), Place(root, model.InstanceId(instance), int(epoch))


def sweep(root: Path) -> None:
    """Remove what a crash left half made or half removed. Only while nothing is being made."""
    for leftover in (*root.glob(f"{_NEW}*"), *root.glob(f"{_GONE}*")):
        shutil.rmtree(leftover, ignore_errors=True)


def free_user(root: Path, first: int, count: int, promised: Collection[int]) -> int:
    """A user id of the range that no VM below `root` has, nor one being made."""
    taken = {record.user for _, _, place in places(root) if (record := place.record()) is not None} | set(promised)
    for user in range(first, first + count):
        if user not in taken:
            return user
    raise errors.HypervisorError(f"all {count} user ids for VMs are taken: remove VMs or widen the range")


def open_layer(path: str) -> int:
    """Open a file for QEMU to read through ``/proc/self/fd``, where its own mode counts and no directory's does."""
    try:
        opened = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as fault:
        raise errors.HypervisorError(f"{path} cannot be read: {fault.strerror}") from fault
    mode = os.fstat(opened).st_mode
    if mode & _READABLE != _READABLE:
        with contextlib.suppress(OSError):  # not ours to change: then QEMU says that it may not
            os.fchmod(opened, mode | _READABLE)
    return opened


def _call(*words: str) -> None:
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)
    except FileNotFoundError as fault:
        raise errors.HypervisorError(f"{words[0]} is not installed: apt-get install qemu-utils") from fault
    except subprocess.TimeoutExpired as fault:
        raise errors.HypervisorError(f"{words[0]} did not end within 60 s") from fault
    if done.returncode != 0:
        raise errors.HypervisorError(f"the VM's disk could not be made: {done.stderr.strip()}")


def _shown(fault: Exception, root: Path) -> errors.HypervisorError:
    if isinstance(fault, OSError) and fault.errno in (errno.ENOSPC, errno.EDQUOT):
        return errors.HypervisorError(f"the disk of {root} is full: free some space on this node")
    if isinstance(fault, OSError) and fault.errno in (errno.EPERM, errno.EINVAL):
        return errors.HypervisorError(
            f"the VM's files cannot be given to a user of its own: {fault}; set another range"
        )
    return errors.HypervisorError(str(fault))
