"""QEMU as the hypervisor: the verbs of `hypervisor.Hypervisor` on directories, processes and the guest agent.

    qemu_disk      what lies on disk, durable marks, the lock
    qemu_machine   the command line
    qemu_process   fork, finding, killing
    qemu_net       forwarded ports, the fence around the host's loopback
    qemu_script    the start script
    qmp, guest     talking to QEMU and to the guest

What holds: the lock in the VM's directory is inherited by QEMU, so "it runs" is a fact of the kernel's. This object
holds nothing that another one, made after a crash, could not find again; what it keeps per VM are open connections
and a watch on the process's end. A QEMU that is stopped or hangs costs a deadline, never a verb.
"""

import asyncio
import contextlib
import functools
import hashlib
import os
import platform
import re
import shutil
from collections.abc import Awaitable, Callable, Container, Sequence
from pathlib import Path
from typing import Literal, TypeVar

import covey
from covey import errors, failpoint, model, observe, world
from covey.agent import (
    hypervisor,
    qemu_disk,
    qemu_host,
    qemu_live,
    qemu_machine,
    qemu_net,
    qemu_process,
    qemu_script,
    qmp,
    tail,
)

_T = TypeVar("_T")
_log = observe.log("qemu")

_UP_S = 30.0  # from the fork to QEMU's first answer
_KILL_S = 10.0
_EPOCH = re.compile(r"[0-9]{1,18}")


class Config(model.Noun, frozen=True, kw_only=True):
    """How VMs are run on this node."""

    root: Path  # the VMs' directories
    host_ip: str = ""  # this node's address for users; "": as the controller sees it
    node_name: str = ""  # "": the host's name
    slots: int = 0  # 0: one VM per processor, but at least two
    accel: Literal["auto", "kvm", "tcg"] = "auto"
    binary: str = "qemu-system-x86_64"
    qemu_img: str = "qemu-img"
    nft: str = "nft"
    vcpu: int = model.DEFAULT_VCPU  # of templates that do not say; placement counts the same
    ram_mb: int = model.DEFAULT_RAM_MB
    vnc: bool = True
    first_user: int = 0  # as root, the first of the VMs' user ids; 0: a range of this root directory's own
    users: int = 256
    stop_s: float = 30.0  # how long a guest may take to shut down
    reserve_bytes: int = 256 << 20  # free disk space below which no VM is made


class Qemu:
    """See `hypervisor.Hypervisor`. `wake` is called when a VM's process ends by itself."""

    def __init__(self, config: Config, world: world.World, wake: hypervisor.Wake = lambda: None) -> None:
        self._config = config
        self._root = config.root.resolve()
        self._world = world
        self._lives = qemu_live.Lives(wake)
        self._busy = 0  # directories being made or removed
        self._promised: set[int] = set()
        self._users = qemu_host.users(self._root, config.first_user, config.users)
        self._trusted: Container[int] = self._users or (os.geteuid(),)  # whom a VM's process may run as
        first = self._users.start if self._users else 0
        table = "covey_" + hashlib.sha256(str(self._root).encode()).hexdigest()[:12]
        self._fence = qemu_net.Fence(table, first, first + len(self._users) - 1, config.nft) if self._users else None
        self._fence_told = self._fence_up = False

    # ---- the host --------------------------------------------------------------------------------------------

    async def facts(self) -> model.Facts:
        version = await asyncio.to_thread(qemu_host.version, self._config.binary, self._config.qemu_img)
        self._root.mkdir(parents=True, exist_ok=True)
        disk = os.statvfs(self._root)
        cpus = os.cpu_count() or 1
        kvm = await asyncio.to_thread(self._kvm)
        await self._keep_fence()
        return model.Facts(
            name=self._config.node_name or platform.node(),
            ip=self._config.host_ip,
            arch=model.Arch.AMD64,
            hypervisor="qemu",
            cpu_count=cpus,
            ram_mb=os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") >> 20,
            disk_bytes=disk.f_blocks * disk.f_frsize,
            slots=self._config.slots or max(2, cpus),
            agent_version=covey.__version__,
            hypervisor_version=f"{version} ({'kvm' if kvm else 'tcg'})",
        )

    async def list(self) -> list[hypervisor.Vm]:
        if not self._busy:
            qemu_disk.sweep(self._root)
        vms = [self._seen(instance, epoch, place) for instance, epoch, place in qemu_disk.places(self._root)]
        known = {str(hypervisor.vm_dir(self._root, vm.instance, vm.epoch)) for vm in vms}
        for process in qemu_process.find():
            directory = Path(process.directory)
            instance, _, epoch = directory.name.rpartition(".")
            ours = directory.parent == self._root and process.user in self._trusted and _EPOCH.fullmatch(epoch)
            if ours and process.directory not in known:
                vms.append(
                    hypervisor.Vm(
                        instance=model.InstanceId(instance),
                        epoch=int(epoch),
                        phase=hypervisor.Phase.RUNNING,
                        cloud=process.cloud,
                        why="its directory is gone",
                    )
                )
        return vms

    def _seen(self, instance: model.InstanceId, epoch: int, place: qemu_disk.Place) -> hypervisor.Vm:
        record = place.record()
        cloud, why = record.plan.cloud if record else "", ""
        if place.locked():
            phase = hypervisor.Phase.RUNNING
            self._lives.watch(place)
        elif not place.forked:
            phase = hypervisor.Phase.PREPARED
        elif place.stopping:
            phase = hypervisor.Phase.STOPPED
        else:
            phase, why = hypervisor.Phase.ENDED, _why_ended(place)
        return hypervisor.Vm(instance=instance, epoch=epoch, phase=phase, cloud=cloud, why=why)

    # ---- one VM ----------------------------------------------------------------------------------------------

    async def prepare(self, plan: hypervisor.Plan) -> None:
        place = self._place(plan.instance, plan.epoch)
        if place.record() is not None:
            return
        qemu_host.check_installed(self._config.binary, self._config.qemu_img)  # before launch: another node may have it
        self._root.mkdir(parents=True, exist_ok=True)
        self._root.chmod(0o711)
        self._check_room()
        machine = self._machine(plan, place, qemu_machine.files(plan.image), restrict=False)
        qemu_machine.command(machine)  # says now what would be wrong later
        user = self._promise_user()
        record = qemu_disk.Record(
            plan=plan,
            user=user,
            vnc_password=(plan.spec.vnc_password or self._world.token())[:8],  # VNC compares eight characters
            made_ns=self._world.wall_ns(),
        )
        self._busy += 1
        try:
            await _finish(functools.partial(place.make, record, self._config.qemu_img))
        finally:
            self._busy -= 1
            self._promised.discard(user or 0)

    async def start(self, instance: model.InstanceId, epoch: int) -> None:
        place = self._place(instance, epoch)
        record = _recorded(place)
        if place.forked:
            raise errors.HypervisorError("this VM was started before, and a VM is never started twice")
        fenced = await _finish(self._raise_fence)
        # From here to the fork nothing waits, so that a cancelled start never forks afterwards (safety S6).
        pidfd = self._fork(record, place, restrict=not fenced)
        try:
            self._lives.watch(place)
            await self._wait_until_up(pidfd, place, record)
        finally:
            os.close(pidfd)

    async def info(self, instance: model.InstanceId, epoch: int) -> model.VmInfo | None:
        place = self._place(instance, epoch)
        record = _recorded(place)
        if not place.locked():
            raise errors.HypervisorError(_why_ended(place) if place.forked else "this VM was not started")
        live = self._lives.of(place)
        try:
            async with live.monitor, qmp.Monitor(place.monitor, place.user) as monitor:
                if not await _guest_is_up(monitor):
                    return None
                usernet = await monitor.human("info usernet")
                screens = await monitor.ask("query-vnc-servers") if self._config.vnc else []
            address = await live.guest.address()
        except qmp.NoAnswer:
            return None  # it boots, is busy or is stopped: not ended, by the lock
        return self._vm_info(record, place, address, usernet, screens)

    async def run(self, instance: model.InstanceId, epoch: int, job: hypervisor.Job) -> hypervisor.JobResult:
        place = self._place(instance, epoch)
        _recorded(place)
        pidfd = self._open(place)
        if pidfd is None:
            raise errors.HypervisorError(_why_ended(place))
        try:
            live = self._lives.of(place)
            return await _unless_ended(pidfd, place, qemu_script.run(place, live.guest, job, self._world))
        finally:
            os.close(pidfd)

    async def output(
        self, instance: model.InstanceId, epoch: int, stream: str, offset: int, limit: int
    ) -> model.Output:
        place = self._place(instance, epoch)
        _recorded(place)
        return tail.part(place.job_err if stream == "stderr" else place.job_out, offset, limit)

    async def stop(self, instance: model.InstanceId, epoch: int) -> None:
        place = self._place(instance, epoch)
        pidfd = self._open(place)
        if pidfd is None:
            return
        try:
            if place.path.exists():
                place.mark_stopping()
            await self._ask_to_shut_down(place)
            if not await qemu_process.wait_until_ended(pidfd, self._config.stop_s):
                await self._quit(place)
                await qemu_process.kill(pidfd, _KILL_S)
        finally:
            os.close(pidfd)
            self._lives.forget(place)

    async def destroy(self, instance: model.InstanceId, epoch: int) -> None:
        place = self._place(instance, epoch)
        pidfd = self._open(place)
        if pidfd is not None:
            try:
                await qemu_process.kill(pidfd, _KILL_S)
            finally:
                os.close(pidfd)
        elif place.locked():
            raise errors.HypervisorError("a process that cannot be found holds this VM's lock")
        self._lives.forget(place)
        self._busy += 1
        try:
            await _finish(place.remove)
        finally:
            self._busy -= 1
        self.lower_fence()

    async def _keep_fence(self) -> None:
        """A firewall that is loaded anew takes the fence with it, under the feet of VMs that count on it; and an agent
        that died just after the last VM was removed has left it standing."""
        if self._fence is None:
            return
        stands = await asyncio.to_thread(self._fence.stands)
        if next(qemu_disk.places(self._root), None) is None:
            if stands:
                self.lower_fence()
        elif not stands:
            known = self._fence_up
            back = await _finish(self._raise_fence)
            if known or back:
                said = "they are back" if back else "they cannot be put back: guests may reach this host's loopback"
                _log.warning("the firewall rules that keep guests off this host's loopback were gone", now=said)

    def lower_fence(self) -> None:
        """Leave nothing in the host's firewall when no VM is left that needs it."""
        if self._fence is not None and not self._busy and next(qemu_disk.places(self._root), None) is None:
            self._fence.remove()

    async def console(self, instance: model.InstanceId, epoch: int) -> bytes:
        """The last 64 KiB of the serial console, for those who wonder why a guest does not come up."""
        place = self._place(instance, epoch)
        async with self._lives.of(place).monitor, qmp.Monitor(place.monitor, place.user) as monitor:
            text = await monitor.ask("ringbuf-read", device="console", size=64 << 10)
        return str(text).encode()

    def close(self) -> None:
        """Let go of everything; the VMs run on."""
        self._lives.close()

    # ---- steps -----------------------------------------------------------------------------------------------

    def _fork(self, record: qemu_disk.Record, place: qemu_disk.Place, *, restrict: bool) -> int:
        opened = [place.lock()]
        try:
            image = record.plan.image
            opened += [qemu_disk.open_layer(path) for path in qemu_machine.files(image)]
            names = [f"/proc/self/fd/{number}" for number in opened[1:]]
            machine = self._machine(record.plan, place, names, restrict=restrict)
            place.mark_forking()
            failpoint.reach("qemu.forking")
            pidfd = qemu_process.fork(
                qemu_machine.command(machine),
                directory=place.run,
                log=place.log,
                keep=opened,
                user=record.user,
                groups=[os.stat("/dev/kvm").st_gid] if machine.kvm else [],
            )
            failpoint.reach("qemu.forked")
            return pidfd
        finally:
            for number in opened:
                os.close(number)

    def _machine(
        self, plan: hypervisor.Plan, place: qemu_disk.Place, files: Sequence[str], *, restrict: bool
    ) -> qemu_machine.Machine:
        """All that the command line says. `files`: the layers, then kernel and initrd, as QEMU shall open them."""
        count = len(plan.image.layers)
        boot = files[count:]
        return qemu_machine.Machine(
            binary=shutil.which(self._config.binary) or self._config.binary,
            kvm=self._kvm(),
            instance=plan.instance,
            directory=str(place.path),
            cloud=plan.cloud,
            name=plan.name,
            vcpu=qemu_machine.vcpu(plan, self._config.vcpu),
            ram_mb=qemu_machine.ram_mb(plan, self._config.ram_mb),
            netdev=qemu_net.option(qemu_machine.forwards(plan), restrict=restrict),
            disk=qemu_disk.OVERLAY,
            layers=tuple(files[:count]),
            kernel=boot[0] if boot else "",
            initrd=boot[1] if len(boot) > 1 else "",
            cmdline=str(plan.image.config.get("cmdline", "")),
            vnc=plan.host_ip if self._config.vnc else "",
            vnc_secret=qemu_disk.VNC_SECRET,
        )

    async def _wait_until_up(self, pidfd: int, place: qemu_disk.Place, record: qemu_disk.Record) -> None:
        end = asyncio.get_running_loop().time() + _UP_S
        while not qemu_process.ended(pidfd):
            try:
                async with self._lives.of(place).monitor, qmp.Monitor(place.monitor, place.user):
                    return
            except qmp.NoAnswer as fault:
                if asyncio.get_running_loop().time() > end:
                    raise errors.HypervisorError(f"QEMU did not come up within {_UP_S:.0f} s") from fault
            await asyncio.sleep(0.02)
        said = tail.last(place.log, 2000).decode("utf-8", "replace").strip()
        forwards = qemu_machine.forwards(record.plan)
        raise errors.HypervisorError(qemu_net.refused(said, forwards) or f"QEMU refused to start: {said}")

    def _vm_info(
        self,
        record: qemu_disk.Record,
        place: qemu_disk.Place,
        address: str,
        usernet: str,
        screens: Sequence[dict[str, object]],
    ) -> model.VmInfo:
        plan = record.plan
        return model.VmInfo(
            uuid=plan.instance,
            name=plan.name,
            ip=address,
            host_ip=plan.host_ip,
            cpu_cores=qemu_machine.vcpu(plan, self._config.vcpu),
            ram_mb=qemu_machine.ram_mb(plan, self._config.ram_mb),
            forwards=qemu_net.found(qemu_machine.forwards(plan), usernet),
            vnc_port=_vnc_port(screens),
            vnc_password=record.vnc_password if screens else "",
            started_ns=(place.path / "forking").stat().st_mtime_ns,
        )

    async def _ask_to_shut_down(self, place: qemu_disk.Place) -> None:
        live = self._lives.of(place)
        with contextlib.suppress(errors.HypervisorError):  # then it is ended by force
            async with live.monitor, qmp.Monitor(place.monitor, place.user) as monitor:
                if not await _guest_is_up(monitor):
                    await monitor.ask("system_powerdown")
                    return
            await live.guest.tell("guest-shutdown")

    async def _quit(self, place: qemu_disk.Place) -> None:
        """Let QEMU write out what the guest had written."""
        with contextlib.suppress(errors.HypervisorError):
            async with self._lives.of(place).monitor, qmp.Monitor(place.monitor, place.user) as monitor:
                await monitor.ask("quit")

    def _open(self, place: qemu_disk.Place) -> int | None:
        """The VM's process: of one with a directory the recorded user's, else one of ours."""
        return qemu_process.open_process(place.path, {place.user} if place.path.exists() else self._trusted)

    def _place(self, instance: model.InstanceId, epoch: int) -> qemu_disk.Place:
        return qemu_disk.Place(self._root, instance, epoch)

    # ---- decisions about the host ----------------------------------------------------------------------------

    def _raise_fence(self) -> bool:
        fenced = self._fence_up = self._fence is not None and self._fence.raise_()
        if not self._fence_told:
            self._fence_told = True
            if fenced:
                _log.info("guests are kept off this host's loopback by nftables")
            else:
                _log.warning("guests get no way out, only forwarded ports: nftables does not work here without root")
        return fenced

    def _kvm(self) -> bool:
        return self._config.accel == "kvm" or (self._config.accel == "auto" and qemu_host.kvm_works())

    def _check_room(self) -> None:
        disk = os.statvfs(self._root)
        free = disk.f_bavail * disk.f_frsize
        if free < self._config.reserve_bytes:
            raise errors.HypervisorError(
                f"the disk of {self._root} has only {free >> 20} MiB left, {self._config.reserve_bytes >> 20} MiB are "
                f"kept free: free some space on this node"
            )

    def _promise_user(self) -> int | None:
        if not self._users:
            return None
        user = qemu_disk.free_user(self._root, self._users.start, len(self._users), self._promised)
        self._promised.add(user)
        return user


def _recorded(place: qemu_disk.Place) -> qemu_disk.Record:
    record = place.record()
    if record is None:
        raise errors.HypervisorError(f"VM {place.path.name} was not prepared on this node")
    return record


def _why_ended(place: qemu_disk.Place) -> str:
    if not place.forked:
        return "this VM was not started"
    said = tail.last(place.log, 500).decode("utf-8", "replace").strip().splitlines()
    last = [line for line in said if "VNC server running" not in line][-1:]
    if last:
        return f"QEMU ended: {last[0]}"
    # QEMU removes its sockets when it ends by itself.
    return "QEMU was killed" if place.monitor.exists() else "the guest powered itself off"


def _vnc_port(screens: Sequence[dict[str, object]]) -> int:
    for screen in screens:
        servers = screen.get("server")
        for server in servers if isinstance(servers, list) else []:
            return int(server["service"])
    return 0


async def _guest_is_up(monitor: qmp.Monitor) -> bool:
    """Whether the guest has opened the guest agent's port."""
    devices = await monitor.ask("query-chardev")
    return any(device["label"] == "guest" and device["frontend-open"] for device in devices)


async def _unless_ended(pidfd: int, place: qemu_disk.Place, work: Awaitable[_T]) -> _T:
    """Do `work` unless the VM's process ends before."""
    doing = asyncio.ensure_future(work)
    ending = asyncio.ensure_future(qemu_process.wait_until_ended(pidfd, None))
    try:
        await asyncio.wait({doing, ending}, return_when=asyncio.FIRST_COMPLETED)
        if doing.done():
            return doing.result()
        raise errors.HypervisorError(_why_ended(place))
    finally:
        for task in (doing, ending):
            task.cancel()
        await asyncio.gather(doing, ending, return_exceptions=True)


async def _finish(work: Callable[[], _T]) -> _T:
    """Run `work` in a thread to its end, also when cancelled meanwhile: nothing goes on behind the caller's back."""
    task = asyncio.ensure_future(asyncio.to_thread(work))
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait({task})
        raise
