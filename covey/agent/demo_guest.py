"""A small Linux template, made of Debian packages on any Debian host: the demo's guest and the tests' guest.

Nothing is installed, mounted or entered: packages are downloaded (`apt-get download`), unpacked (`dpkg -x`), laid out
as a directory and turned into a file system by `mke2fs -d`. The result is one directory:

    DIR/base.qcow2    the disk: busybox init, the QEMU guest agent, a web page on port 80
    DIR/vmlinuz       Debian's cloud kernel (ext4 built in, virtio as modules)
    DIR/initrd        busybox and the virtio modules
    DIR/config.json   the VM's configuration: processors, memory, kernel, ports to forward

The page on port 80 names the instance, the host name and the boot id, so that one look from outside tells whether
this is still the same VM. `build_layer` adds files on top as a second qcow2 layer that holds only the difference.
"""

import json
import lzma
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

from covey import errors
from covey.agent import cpio

Say = Callable[[str], None]

KERNEL_META = "linux-image-cloud-amd64"
PACKAGES = (  # of Debian 12; the libraries are those that qemu-ga is linked with
    "busybox-static",
    "qemu-guest-agent",
    "libc6",
    "libglib2.0-0",
    "libnuma1",
    "libpcre2-8-0",
    "libudev1",
    "liburing2",
)
_LIBRARIES = (
    "ld-linux-x86-64.so.2",
    "libc.so.6",
    "libglib-2.0.so.0",
    "libgmodule-2.0.so.0",
    "libm.so.6",
    "libnuma.so.1",
    "libpcre2-8.so.0",
    "libudev.so.1",
    "liburing.so.2",
)
# In the order of loading: virtio_ring comes before virtio.
_MODULES = (
    "drivers/virtio/virtio_ring",
    "drivers/virtio/virtio",
    "drivers/virtio/virtio_pci_legacy_dev",
    "drivers/virtio/virtio_pci_modern_dev",
    "drivers/virtio/virtio_pci",
    "drivers/block/virtio_blk",
    "net/core/failover",
    "drivers/net/net_failover",
    "drivers/net/virtio_net",
    "drivers/char/virtio_console",
)
_TOOLS = {"apt-get": "apt", "apt-cache": "apt", "dpkg": "dpkg", "mke2fs": "e2fsprogs", "qemu-img": "qemu-utils"}
_PATH = os.pathsep.join((os.environ.get("PATH", ""), "/usr/sbin", "/sbin"))  # mke2fs is not in a user's PATH
_DISK_MB = 256

CONFIG: dict[str, str | int | bool] = {
    "arch": "amd64",
    "vcpu": 1,
    "ram_mb": 128,
    "kernel": "vmlinuz",
    "initrd": "initrd",
    "cmdline": "console=ttyS0 quiet",
    "forwards": "http:80",
}

_INIT = """#!/bin/busybox sh
b=/bin/busybox
$b mount -t proc proc /proc; $b mount -t sysfs sysfs /sys; $b mount -t devtmpfs devtmpfs /dev
for m in /mod/*.ko; do $b insmod $m; done
i=0; while [ ! -b /dev/vda ] && [ $i -lt 500 ]; do $b usleep 10000; i=$((i+1)); done
$b mount -t ext4 -o rw,noatime /dev/vda /new || exec $b sh
for d in dev proc sys; do $b mount -o move /$d /new/$d; done
exec $b switch_root /new /sbin/init
"""

_GUEST_FILES = {
    "etc/passwd": "root::0:0:root:/root:/bin/sh\n",
    "etc/group": "root:x:0:\n",
    "etc/hosts": "127.0.0.1 localhost\n",
    "etc/hostname": "covey\n",
    "etc/os-release": 'ID=covey-demo\nNAME="Covey demo guest"\n',
    "etc/inittab": """::sysinit:/etc/init.d/rcS
::respawn:/sbin/run-guest-agent
::respawn:/bin/httpd -f -p 80 -h /srv
tty1::respawn:/bin/getty -n -l /bin/sh 38400 tty1 linux
::ctrlaltdel:/sbin/reboot
::shutdown:/bin/sync
::shutdown:/bin/umount -a -r
""",
    # The host tells VM and instance by the firmware's tables: product name and UUID.
    "etc/init.d/rcS": """#!/bin/sh
mkdir -p /dev/pts /dev/shm
mount -t devpts devpts /dev/pts; mount -t tmpfs tmpfs /run; mount -t tmpfs tmpfs /dev/shm
hostname -F /etc/hostname
dmi=/sys/class/dmi/id
[ "$(cat $dmi/sys_vendor)" = Covey ] && hostname "$(tr -c 'A-Za-z0-9\\n-' - <$dmi/product_name)"
ip link set lo up; ip link set eth0 up
udhcpc -i eth0 -b -S -t 20 -T 1 -A 2 -s /etc/udhcpc.sh >/dev/null 2>&1 &
""",
    "etc/udhcpc.sh": """#!/bin/sh
case "$1" in
  deconfig) ip addr flush dev $interface; ip link set $interface up;;
  bound|renew)
    ip addr flush dev $interface; ip addr add $ip/${mask:-24} dev $interface
    [ -n "$router" ] && ip route replace default via $router dev $interface
    : >/etc/resolv.conf; for d in $dns; do echo nameserver $d >>/etc/resolv.conf; done;;
esac
""",
    # There is no udev here, so the port is found by its name. `exec` lets init start the agent anew when it dies.
    "sbin/run-guest-agent": """#!/bin/sh
for d in /sys/class/virtio-ports/*; do
  [ "$(cat $d/name 2>/dev/null)" = org.qemu.guest_agent.0 ] &&
    exec /usr/sbin/qemu-ga -m virtio-serial -p /dev/${d##*/} -t /run
done
sleep 1
""",
    "sbin/shutdown": """#!/bin/sh
case "$*" in *-r*) exec /sbin/reboot;; *) exec /sbin/poweroff;; esac
""",
    "srv/cgi-bin/index.cgi": """#!/bin/sh
printf 'Content-Type: text/plain\\r\\n\\r\\n'
echo "hostname: $(hostname)"
echo "instance: $(cat /sys/class/dmi/id/product_uuid)"
echo "boot_id: $(cat /proc/sys/kernel/random/boot_id)"
for f in /srv/layers/*; do [ -f "$f" ] && echo "layer: $(cat "$f")"; done
exit 0
""",
}
_EXECUTABLE = ("etc/init.d/rcS", "etc/udhcpc.sh", "sbin/run-guest-agent", "sbin/shutdown", "srv/cgi-bin/index.cgi")
_DIRECTORIES = ("dev", "proc", "sys", "run", "tmp", "root", "mnt", "usr/bin", "usr/sbin", "srv/layers", "var/tmp")


def build(directory: Path, *, cache: Path, say: Say = lambda _text: None) -> None:
    """Make the template in `directory`. Packages are kept in `cache`: a second run downloads nothing."""
    _check_tools()
    directory.mkdir(parents=True, exist_ok=True)
    debs = _packages(cache, say)
    with tempfile.TemporaryDirectory(prefix=".build-", dir=directory) as name:
        work = Path(name)
        say("unpacking")
        for deb in debs:
            _call("dpkg", "-x", str(deb), str(work / "packages"))
        version = next((work / "packages/lib/modules").iterdir()).name
        shutil.copyfile(work / f"packages/boot/vmlinuz-{version}", work / "vmlinuz")
        say("making the initial RAM disk")
        (work / "initrd").write_bytes(_initrd(work / "packages", version, work / "early"))
        say("making the disk")
        _lay_out(work / "packages", work / "root")
        _disk(work / "root", work / "base.qcow2")
        (work / "config.json").write_text(json.dumps(CONFIG, indent=2) + "\n")
        for title in ("base.qcow2", "vmlinuz", "initrd", "config.json"):
            (work / title).replace(directory / title)
    say(f"template ready in {directory}")


def build_layer(directory: Path, name: str, files: Mapping[str, bytes], *, below: str = "base.qcow2") -> Path:
    """Make `directory`/`name`, a layer on `below` (also in `directory`) that adds `files` (path in the guest → bytes).

    The file system is written to offline by debugfs; rebasing the result onto `below` keeps only what differs.
    """
    with tempfile.TemporaryDirectory(prefix=".build-", dir=directory) as temporary:
        work = Path(temporary)
        raw, top = work / "disk.raw", work / "top.qcow2"
        _call("qemu-img", "convert", "-O", "raw", str(directory / below), str(raw))
        for number, (path, content) in enumerate(sorted(files.items())):
            (work / f"file{number}").write_bytes(content)
            _write_into(raw, work / f"file{number}", path)
        _call("qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", str(raw), str(top))
        (work / below).symlink_to(directory.absolute() / below)  # so that the header names it by its file name alone
        _call("qemu-img", "rebase", "-q", "-f", "qcow2", "-F", "qcow2", "-b", below, str(top))
        return top.replace(directory / name)


def _write_into(raw: Path, source: Path, path: str) -> None:
    """Write one file into the ext4 image. debugfs always exits 0, so the file is asked for afterwards."""
    inside = "/" + path.strip("/")
    parents = [str(parent) for parent in reversed(Path(inside).parents)][1:]
    commands = [f"mkdir {parent}" for parent in parents]  # an existing directory only gives a message
    commands += [f"write {source} {inside}"]
    script = source.with_suffix(".debugfs")
    script.write_text("\n".join(commands) + "\n")
    _call("debugfs", "-w", "-f", str(script), str(raw))
    if "Inode:" not in _call("debugfs", "-R", f"stat {inside}", str(raw)):
        raise errors.HypervisorError(f"could not write {inside} into the new layer")


def _check_tools() -> None:
    for tool, package in _TOOLS.items():
        if shutil.which(tool, path=_PATH) is None:
            raise errors.HypervisorError(
                f"{tool} is missing: the demo template is made of Debian packages; "
                f"run this on a Debian host with {package} installed"
            )


def _packages(cache: Path, say: Say) -> list[Path]:
    """The packages as files, from the cache or freshly downloaded, in one call (one call each is ten times slower)."""
    cache.mkdir(parents=True, exist_ok=True)
    if not any(cache.glob("linux-image-*-cloud-amd64_*.deb")) or not all(_cached(cache, name) for name in PACKAGES):
        say(f"downloading {len(PACKAGES) + 1} Debian packages (33 MB)")
        try:
            _download(cache)
        except errors.HypervisorError:
            say("refreshing the package lists")  # fresh machines have none, old lists name files that are gone
            _call("apt-get", "-q", "update", timeout_s=300)
            _download(cache)
    kernel = max(cache.glob("linux-image-*-cloud-amd64_*.deb"), key=lambda path: path.stat().st_mtime_ns)
    return [kernel, *(_cached(cache, name)[0] for name in PACKAGES)]


def _cached(cache: Path, name: str) -> list[Path]:
    return sorted(cache.glob(f"{name}_*.deb"))


def _download(cache: Path) -> None:
    depends = _call("apt-cache", "depends", "--important", KERNEL_META)
    kernel = next((line.split()[-1] for line in depends.splitlines() if "Depends: linux-image-" in line), None)
    if kernel is None:
        raise errors.HypervisorError(
            f"apt knows no package {KERNEL_META}: the demo template needs Debian 12's packages"
        )
    wanted = [name for name in PACKAGES if not _cached(cache, name)]
    with tempfile.TemporaryDirectory(prefix=".download-", dir=cache) as aside:
        # As root, apt would fetch as its own user, who may not write here.
        _call(
            "apt-get",
            "-q",
            "-o",
            "APT::Sandbox::User=root",
            "download",
            kernel,
            *wanted,
            cwd=Path(aside),
            timeout_s=600,
        )
        for deb in Path(aside).glob("*.deb"):
            deb.replace(cache / deb.name)


def _initrd(packages: Path, version: str, root: Path) -> bytes:
    for name in ("bin", "dev", "proc", "sys", "new", "mod"):
        (root / name).mkdir(parents=True)
    shutil.copy(packages / "bin/busybox", root / "bin/busybox")
    for number, module in enumerate(_MODULES, start=10):
        source = packages / "lib/modules" / version / "kernel" / f"{module}.ko"
        packed = source.with_name(source.name + ".xz")
        content = source.read_bytes() if source.exists() else lzma.decompress(packed.read_bytes())
        (root / "mod" / f"{number}-{source.name}").write_bytes(content)
    _write(root / "init", _INIT, executable=True)
    return cpio.pack(root)


def _lay_out(packages: Path, root: Path) -> None:
    """The guest's root file system as a directory."""
    for name in _DIRECTORIES:
        (root / name).mkdir(parents=True, exist_ok=True)
    (root / "tmp").chmod(0o1777)
    (root / "bin").mkdir()
    (root / "sbin").mkdir()
    shutil.copy(packages / "bin/busybox", root / "bin/busybox")
    for applet in _call(str(packages / "bin/busybox"), "--list").split():
        if applet != "busybox":
            (root / "bin" / applet).symlink_to("/bin/busybox")
    for applet in ("init", "hwclock", "poweroff", "reboot", "halt"):
        (root / "sbin" / applet).symlink_to("/bin/busybox")
    shutil.copy(packages / "usr/sbin/qemu-ga", root / "usr/sbin/qemu-ga")
    libraries = root / "lib/x86_64-linux-gnu"
    libraries.mkdir(parents=True)
    for name in _LIBRARIES:
        shutil.copy(next(packages.rglob(name)), libraries / name)
    (root / "lib64").mkdir()
    (root / "lib64/ld-linux-x86-64.so.2").symlink_to("/lib/x86_64-linux-gnu/ld-linux-x86-64.so.2")
    for name, text in _GUEST_FILES.items():
        _write(root / name, text, executable=name in _EXECUTABLE)


def _disk(root: Path, disk: Path) -> None:
    raw = disk.with_suffix(".raw")
    with raw.open("wb") as file:
        file.truncate(_DISK_MB << 20)
    options = "root_owner=0:0,lazy_itable_init=1,lazy_journal_init=1"
    _call("mke2fs", "-q", "-t", "ext4", "-d", str(root), "-E", options, "-O", "^metadata_csum", "-m", "0", str(raw))
    _call("qemu-img", "convert", "-O", "qcow2", str(raw), str(disk))


def _write(path: Path, text: str, *, executable: bool = False) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755 if executable else 0o644)


def _call(*command: str, cwd: Path | None = None, timeout_s: float = 120) -> str:
    environment = {**os.environ, "PATH": _PATH, "LC_ALL": "C", "DEBIAN_FRONTEND": "noninteractive"}
    try:
        done = subprocess.run(
            command, cwd=cwd, env=environment, timeout=timeout_s, capture_output=True, text=True, check=False
        )
    except FileNotFoundError as fault:
        raise errors.HypervisorError(f"{command[0]} is missing") from fault
    except subprocess.TimeoutExpired as fault:
        raise errors.HypervisorError(f"{' '.join(command)} did not end within {timeout_s:.0f} s") from fault
    if done.returncode != 0:
        raise errors.HypervisorError(f"{' '.join(command)} failed: {(done.stderr or done.stdout).strip()[-500:]}")
    return done.stdout
