"""One VM as QEMU's command line: what the template, the instance and the node decide between them.

QEMU gets no paths but open files (``/proc/self/fd/N``) and its own directory as working directory, so no other
directory must be open to its user; and no way to gain rights, start programs or use old system calls. Every disk layer
is spelled out, so that no header decides what is opened (`qcow2`).
"""

import hashlib
import json
import uuid

from covey import errors, model
from covey.agent import hypervisor, qemu_net

MARK = "covey-vm"
_MACHINE = "pc-q35-7.2"  # pinned: a guest sees the same hardware whatever QEMU is installed
_SANDBOX = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"
# Without these Linux probes and calibrates for seconds what emulation makes meaningless.
_EMULATED = (
    "nokaslr mitigations=off no_timer_check tsc=reliable lpj=4000000 cryptomgr.notests random.trust_cpu=on "
    "8250.nr_uarts=1 i8042.noaux i8042.nomux i8042.nopnp audit=0 nowatchdog rcupdate.rcu_expedited=1"
)


class Machine(model.Noun, frozen=True, kw_only=True):
    """Everything that a command line says, decided."""

    binary: str
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


def forwards(plan: hypervisor.Plan) -> tuple[model.Forward, ...]:
    """The ports to forward: the instance's own, else the template's."""
    return qemu_net.forwards(plan.spec, str(plan.image.config.get("forwards", "")), plan.host_ip)


def vcpu(plan: hypervisor.Plan, default: int) -> int:
    return _whole("vcpu", plan.spec.vcpu or plan.image.config.get("vcpu", default), 1, 256)


def ram_mb(plan: hypervisor.Plan, default: int) -> int:
    return _whole("ram_mb", plan.spec.vram_mb or plan.image.config.get("ram_mb", default), 64, 4 << 20)


def files(image: hypervisor.Image) -> list[str]:
    """What QEMU opens of a template: its layers, then kernel and initrd if it brings them."""
    return [*image.layers, *_boot_files(image)]


def _boot_files(image: hypervisor.Image) -> list[str]:
    """Kernel and initrd when the template brings its own kernel; none when it boots from its disk."""
    if "kernel" not in image.config and "kernel" not in image.files:
        return []
    found = []
    for role in ("kernel", "initrd"):
        title = str(image.config.get(role, role))
        path = image.files.get(title) or image.files.get(role)
        if path is not None:
            found.append(path)
        elif role in image.config:
            raise errors.HypervisorError(f"the template's {role} {title!r} is not among its files; push it again")
    return found


def _whole(name: str, value: str | int | bool, least: int, most: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        raise errors.HypervisorError(f"{name}: {value!r} is not a number from {least} to {most}")
    return value


def command(machine: Machine) -> list[str]:
    """The command line. Every layer is spelled out, so that no header decides what is opened."""
    for name, text in (("cmdline", machine.cmdline), ("name", machine.name)):
        if "\0" in text:
            raise errors.HypervisorError(f"{name}: {text!r} holds a zero byte")
    words = [machine.binary, "-name", f"covey-{machine.instance}", "-nodefaults", "-no-user-config", "-display", "none"]
    words += ["-object", _json({"qom-type": "secret", "id": MARK, "data": f"{machine.cloud} {machine.directory}"})]
    words += ["-sandbox", _SANDBOX, "-machine", _MACHINE, "-rtc", "base=utc,driftfix=none"]
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
