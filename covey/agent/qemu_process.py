"""QEMU as processes of this host: the command line, the fork, finding them again, and ending them.

A VM's process is nobody's child: it must outlive the agent. It is known by its command line alone, which carries
``-name covey-<instance id>`` for people and an inert object with cloud and directory for us, so that a VM is found
also when its directory is gone. A process id is only ever used through a pidfd whose command line was read *after* it
was opened: a recycled id is somebody else.

QEMU gets no paths but open files (``/proc/self/fd/N``) and its own directory as working directory, so no other
directory must be open to its user; and no way to gain rights, start programs or use old system calls.
"""

import asyncio
import contextlib
import hashlib
import json
import os
import select
import signal
import subprocess
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path

from covey import errors, model

MARK = "covey-vm"
_SANDBOX = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"
# Without these Linux probes and calibrates for seconds what emulation makes meaningless.
_EMULATED = (
    "nokaslr mitigations=off no_timer_check tsc=reliable lpj=4000000 cryptomgr.notests random.trust_cpu=on "
    "8250.nr_uarts=1 i8042.noaux i8042.nomux i8042.nopnp audit=0 nowatchdog rcupdate.rcu_expedited=1"
)


class Machine(model.Noun, frozen=True, kw_only=True):
    """Everything that a command line says, decided."""

    binary: str
    machine: str
    kvm: bool
    instance: model.InstanceId
    directory: str  # the VM's directory, absolute
    cloud: str
    name: str
    vcpu: int
    ram_mb: int
    netdev: str
    disk: str  # the overlay, below the working directory
    layers: tuple[str, ...]  # base first, as open files
    kernel: str = ""
    initrd: str = ""
    cmdline: str = ""
    vnc: str = ""  # the address to listen on; "": no screen
    vnc_secret: str = ""


class Found(model.Noun, frozen=True, kw_only=True):
    """A QEMU process of ours."""

    pid: int
    cloud: str
    directory: str


def command(machine: Machine) -> list[str]:
    """The command line. Every layer is spelled out, so that no header decides what is opened."""
    words = [machine.binary, "-name", f"covey-{machine.instance}", "-nodefaults", "-no-user-config", "-display", "none"]
    words += ["-object", _json({"qom-type": "secret", "id": MARK, "data": f"{machine.cloud} {machine.directory}"})]
    words += ["-sandbox", _SANDBOX, "-machine", machine.machine, "-rtc", "base=utc,driftfix=none"]
    words += ["-accel", "kvm" if machine.kvm else "tcg,thread=multi,tb-size=64"]
    words += ["-cpu", "host" if machine.kvm else "max", "-smp", str(machine.vcpu), "-m", str(machine.ram_mb)]
    words += ["-uuid", str(_uuid(machine.instance)), "-smbios", _smbios(machine)]
    words += ["-chardev", "socket,id=qmp,path=qmp.sock,server=on,wait=off", "-mon", "chardev=qmp,mode=control"]
    words += ["-chardev", "ringbuf,id=console,size=65536", "-serial", "chardev:console"]
    words += ["-blockdev", _json(_disk(machine)), "-device", "virtio-blk-pci,drive=disk,bootindex=1"]
    words += ["-device", "virtio-serial-pci", "-chardev", "socket,id=guest,path=guest.sock,server=on,wait=off"]
    words += ["-device", "virtserialport,chardev=guest,name=org.qemu.guest_agent.0"]
    words += ["-netdev", machine.netdev, "-device", f"virtio-net-pci,netdev=net0,romfile=,mac={_mac(machine.instance)}"]
    words += ["-object", "rng-builtin,id=rng", "-device", "virtio-rng-pci,rng=rng"]
    if machine.kernel:
        cmdline = machine.cmdline if machine.kvm else f"{machine.cmdline} {_EMULATED}"
        words += ["-kernel", machine.kernel, "-append", cmdline.strip()]
        words += ["-initrd", machine.initrd] if machine.initrd else []
    if machine.vnc:
        words += ["-object", f"secret,id=vnc,file={machine.vnc_secret}", "-device", "VGA"]
        words += ["-vnc", f"{machine.vnc}:0,to=9999,password-secret=vnc"]
    return words


def _disk(machine: Machine) -> dict[str, object]:
    node: dict[str, object] | None = None
    for layer in machine.layers:
        file = {"driver": "file", "filename": layer}
        node = {"driver": "qcow2", "read-only": True, "file": file, "backing": node}
    return {
        "driver": "qcow2",
        "node-name": "disk",
        "discard": "unmap",
        "file": {"driver": "file", "filename": machine.disk, "discard": "unmap"},
        "backing": node,
    }


def _smbios(machine: Machine) -> str:
    """The firmware's tables tell the guest who it is. A comma in a value is written twice."""
    name = machine.name.replace(",", ",,")
    return f"type=1,manufacturer=Covey,product={name},serial={machine.instance}"


def _mac(instance: model.InstanceId) -> str:
    return "52:54:00:" + hashlib.sha256(instance.encode()).digest()[:3].hex(":")


def _uuid(instance: model.InstanceId) -> uuid.UUID:
    try:
        return uuid.UUID(instance)
    except ValueError:
        return uuid.uuid5(uuid.NAMESPACE_URL, f"covey:{instance}")


def _json(value: object) -> str:
    return json.dumps(value)


def fork(
    words: Sequence[str], *, directory: Path, log: Path, keep: Sequence[int], user: int | None, groups: Sequence[int]
) -> int:
    """Start QEMU in `directory` as `user` (None: ourselves) with the open files `keep`. Its pidfd."""
    try:
        with log.open("ab") as output:
            process = subprocess.Popen(
                words,
                cwd=directory,
                user=user,
                group=user,
                extra_groups=None if user is None else list(groups),
                pass_fds=keep,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
                env={"PATH": os.environ.get("PATH", ""), "LC_ALL": "C"},
            )
    except OSError as fault:
        raise errors.HypervisorError(f"QEMU could not be started: {fault}") from fault
    pidfd = os.pidfd_open(process.pid)
    process.returncode = 0  # it outlives us, which Popen would complain of; its end is read from the pidfd
    return pidfd


def find() -> Iterator[Found]:
    """Every QEMU process on this host that Covey started, whoever's it is."""
    for entry in os.listdir("/proc"):
        if entry.isdecimal() and (found := _look(int(entry))) is not None:
            yield found


def _look(pid: int) -> Found | None:
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return None
    if len(words) < 3 or words[1] != b"-name" or not words[2].startswith(b"covey-"):
        return None
    for word in words:
        if word.startswith(b'{"qom-type": "secret", "id": "%s"' % MARK.encode()):
            cloud, _, directory = str(json.loads(word)["data"]).partition(" ")
            return Found(pid=pid, cloud=cloud, directory=directory)
    return None


def open_process(directory: Path) -> int | None:
    """A pidfd of the VM of `directory`, None when it does not run. To be closed."""
    for found in find():
        if found.directory != str(directory):
            continue
        try:
            pidfd = os.pidfd_open(found.pid)
        except ProcessLookupError:
            continue
        if _look(found.pid) == found and not ended(pidfd):
            return pidfd
        os.close(pidfd)
    return None


def ended(pidfd: int) -> bool:
    """Whether the process has ended; if it was our child it is reaped."""
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    if not poll.poll(0):
        return False
    with contextlib.suppress(ChildProcessError):
        os.waitid(os.P_PIDFD, pidfd, os.WEXITED | os.WNOHANG)
    return True


async def wait_until_ended(pidfd: int, timeout_s: float | None) -> bool:
    """Wait for the end of any process, child or not. False when it did not come in time (None: any)."""
    loop = asyncio.get_running_loop()
    own = os.dup(pidfd)  # the loop watches a descriptor once, and others may watch the same process
    gone = asyncio.Event()
    loop.add_reader(own, gone.set)
    try:
        async with asyncio.timeout(timeout_s):
            await gone.wait()
    except TimeoutError:
        return ended(pidfd)
    finally:
        loop.remove_reader(own)
        os.close(own)
    return ended(pidfd)


async def kill(pidfd: int, timeout_s: float) -> None:
    """SIGKILL, also for a stopped process, and wait for the end."""
    with contextlib.suppress(ProcessLookupError):
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
    if not await wait_until_ended(pidfd, timeout_s):
        raise errors.HypervisorError(
            f"QEMU did not end within {timeout_s:.0f} s of SIGKILL; the host's storage may hang"
        )
