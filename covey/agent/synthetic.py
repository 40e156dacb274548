"""The synthetic hypervisor: VMs that are records, on disk or in memory, with named knobs for time and trouble.

It lets hundreds of nodes run in one process, shows a whole cloud on a laptop, and stands in for a real hypervisor in
tests. On disk its VMs outlive the agent's kill -9, as real ones do:

    vms/<instance>.<epoch>/vm.json      what the VM is (`_Vm`)
    vms/journal.log                     what was done to guests: ``<instance> <epoch> start|stop|destroy <ns>``,
                                        by the clock that never jumps; a start is written before the guest runs, an end
                                        before it ends, so a crash in between leaves no guest out

A start script is not run: its lines ``echo TEXT [>&2]``, ``sleep SECONDS``, ``exit CODE`` and ``poweroff`` do what a
shell would have done with them; other lines do nothing.
"""

import asyncio
import hashlib
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import msgspec

import covey
from covey import durable, errors, failpoint, model, world
from covey.agent import hypervisor, images, tail

Phase = hypervisor.Phase
_FAIL_AT = ("prepare", "start", "boot", "stop")
_JOURNAL = "journal.log"


class Knobs(model.Noun, frozen=True, kw_only=True):
    """Times and troubles of the VMs of one node. Which VMs get the troubles follows from their ids: the same each time.

    A share is of all VMs, 0 to 1: so many fail (at the step `fail`: prepare, start, boot or stop), never answer, or end
    by themselves `vanish_s` after their start.
    """

    boot_s: float = 0.0
    pull_s: float = 0.0
    prepare_s: float = 0.0
    stop_s: float = 0.0
    fail: str = "start"
    fail_share: float = 0.0
    hang_share: float = 0.0
    vanish_share: float = 0.0
    vanish_s: float = 3.0
    slots: int = 10
    cpu_count: int = 16
    ram_mb: int = 65536
    arch: model.Arch = model.Arch.AMD64
    name: str = "synthetic"


class _Vm(model.Noun, frozen=True, kw_only=True):
    """One VM. `started_ns` and `script_ns` are of the clock that never jumps; 0: not yet."""

    instance: model.InstanceId
    epoch: int
    cloud: str
    name: str
    host_ip: str
    spec: model.Spec
    phase: Phase = Phase.PREPARED
    started_ns: int = 0
    script_ns: int = 0
    stdout: bytes = b""  # of its script, there from its start on
    stderr: bytes = b""
    powered_off: bool = False


def knobs(text: str) -> Knobs:
    """Knobs from ``boot_s=0.5,fail=start,hang=true``. Raises SettingError naming the one that is wrong."""
    pairs = [part.partition("=") for part in text.split(",") if part.strip()]
    given = {name.strip(): value.strip() for name, _, value in pairs}
    try:
        chosen = msgspec.convert(given, type=Knobs, strict=False)
    except msgspec.ValidationError as error:
        raise errors.SettingError(f"synthetic knobs {text!r}: {error}") from error
    unknown = given.keys() - set(Knobs.__struct_fields__)
    if unknown or chosen.fail not in _FAIL_AT:
        wrong = ", ".join(sorted(unknown)) or f"fail={chosen.fail}"
        raise errors.SettingError(f"synthetic knobs: unknown {wrong}; known are {', '.join(Knobs.__struct_fields__)}")
    return chosen


class Synthetic:
    """The hypervisor. `root` None: VMs live in memory and end with the process."""

    def __init__(
        self,
        clock: world.World,
        knobs: Knobs | None = None,
        *,
        root: Path | None = None,
        wake: hypervisor.Wake | None = None,
    ) -> None:
        self._clock = clock
        self.knobs = knobs or Knobs()
        self._root = root
        self._wake = wake or (lambda: None)
        self._vms: dict[tuple[model.InstanceId, int], _Vm] = {}
        self._shown: dict[tuple[model.InstanceId, int], hypervisor.Vm] = {}  # right until a VM ends by itself
        if root is not None:
            root.mkdir(parents=True, exist_ok=True)
            for path in root.glob("*/vm.json"):
                vm = durable.read(path, _Vm)
                if vm is not None:
                    self._keep(vm)

    async def facts(self) -> model.Facts:
        knobs = self.knobs
        return model.Facts(
            name=knobs.name,
            ip="127.0.0.1",
            arch=knobs.arch,
            hypervisor="synthetic",
            cpu_count=knobs.cpu_count,
            ram_mb=knobs.ram_mb,
            disk_bytes=1 << 40,
            slots=knobs.slots,
            agent_version=covey.__version__,
            hypervisor_version="1",
        )

    async def list(self) -> list[hypervisor.Vm]:
        if self.knobs.vanish_share > 0:
            return [self._show(vm) for vm in self._vms.values()]
        return [*self._shown.values()]

    async def prepare(self, plan: hypervisor.Plan) -> None:
        if (plan.instance, plan.epoch) in self._vms:
            return
        await self._take(plan.instance, self.knobs.prepare_s, "prepare")
        for key, vm in list(self._vms.items()):  # a stopped VM's disk becomes the new epoch's
            if vm.instance == plan.instance and vm.phase is Phase.STOPPED:
                self._remove(key)
        self._save(
            _Vm(
                instance=plan.instance,
                epoch=plan.epoch,
                cloud=plan.cloud,
                name=plan.name,
                host_ip=plan.host_ip,
                spec=plan.spec,
            )
        )

    async def start(self, instance: model.InstanceId, epoch: int) -> None:
        vm = self._vms.get((instance, epoch))
        if vm is None or vm.phase is not Phase.PREPARED:
            raise errors.HypervisorError(f"VM {instance} epoch {epoch} cannot start: {vm.phase if vm else 'absent'}")
        await self._take(instance, 0.0, "start")
        failpoint.reach("synthetic.forking")
        self._note(vm, "start")
        self._save(msgspec.structs.replace(vm, phase=Phase.RUNNING, started_ns=self._clock.boot_ns()))
        failpoint.reach("synthetic.forked")
        if _befalls("vanish", instance, self.knobs.vanish_share):
            asyncio.get_running_loop().call_later(self.knobs.vanish_s, self._wake)

    async def info(self, instance: model.InstanceId, epoch: int) -> model.VmInfo | None:
        vm = self._running(instance, epoch)
        await self._take(instance, 0.0, "boot")
        age_s = (self._clock.boot_ns() - vm.started_ns) / 1e9
        if _befalls("hang", instance, self.knobs.hang_share) or age_s < self.knobs.boot_s:
            return None
        forwards = tuple(
            msgspec.structs.replace(forward, host_port=forward.host_port or 20000 + index, host_ip=vm.host_ip)
            for index, forward in enumerate(vm.spec.forwards)
        )
        return model.VmInfo(
            uuid=vm.instance,
            name=vm.name,
            ip="10.0.2.15",
            host_ip=vm.host_ip,
            cpu_cores=vm.spec.vcpu or model.DEFAULT_VCPU,
            ram_mb=vm.spec.vram_mb or model.DEFAULT_RAM_MB,
            forwards=forwards,
            started_ns=self._clock.wall_ns(),
        )

    async def run(self, instance: model.InstanceId, epoch: int, job: hypervisor.Job) -> hypervisor.JobResult:
        vm = self._running(instance, epoch)
        story = _tell(job.text)
        if not vm.script_ns:
            vm = msgspec.structs.replace(vm, script_ns=self._clock.boot_ns(), stdout=story.stdout, stderr=story.stderr)
            self._save(vm)
        out, err = story.stdout[-tail.SENT_BYTES :], story.stderr[-tail.SENT_BYTES :]
        if story.seconds > job.timeout_s:
            await self._until(vm, job.timeout_s)
            return hypervisor.JobResult(return_code=-1, did_timeout=True, stdout=out, stderr=err)
        await self._until(vm, story.seconds)
        if story.powers_off:
            self._save(msgspec.structs.replace(self._running(instance, epoch), powered_off=True))
            self._wake()
            raise errors.HypervisorError("the guest powered itself off")
        return hypervisor.JobResult(return_code=story.code, stdout=out, stderr=err)

    async def output(
        self, instance: model.InstanceId, epoch: int, stream: str, offset: int, limit: int
    ) -> model.Output:
        vm = self._vms.get((instance, epoch))
        if vm is None:
            raise errors.HypervisorError("there is no such VM")
        written = vm.stderr if stream == "stderr" else vm.stdout
        size = len(written)
        start = min(max(0, offset if offset >= 0 else size + offset), size)
        return model.Output(data=written[start : start + limit], offset=start, size=size)

    async def stop(self, instance: model.InstanceId, epoch: int) -> None:
        vm = self._vms.get((instance, epoch))
        if vm is None or vm.phase is not Phase.RUNNING:
            return
        await self._take(instance, self.knobs.stop_s, "stop")
        self._note(vm, "stop")
        self._save(msgspec.structs.replace(vm, phase=Phase.STOPPED))

    async def destroy(self, instance: model.InstanceId, epoch: int) -> None:
        failpoint.reach("synthetic.destroy")
        vm = self._vms.get((instance, epoch))
        if vm is not None and vm.phase is not Phase.PREPARED:
            self._note(vm, "destroy")
        self._remove((instance, epoch))

    # ---- how a VM stands -------------------------------------------------------------------------------------------

    def _show(self, vm: _Vm) -> hypervisor.Vm:
        why = self._why(vm)
        phase = Phase.ENDED if why and vm.phase is Phase.RUNNING else vm.phase
        return hypervisor.Vm(instance=vm.instance, epoch=vm.epoch, phase=phase, cloud=vm.cloud, why=why)

    def _why(self, vm: _Vm) -> str:
        if vm.powered_off:
            return "the guest powered itself off"
        age_s = (self._clock.boot_ns() - vm.started_ns) / 1e9
        vanished = vm.phase is Phase.RUNNING and age_s >= self.knobs.vanish_s
        vanished = vanished and _befalls("vanish", vm.instance, self.knobs.vanish_share)
        return "the VM's process vanished" if vanished else ""

    def _running(self, instance: model.InstanceId, epoch: int) -> _Vm:
        vm = self._vms.get((instance, epoch))
        shown = None if vm is None else self._show(vm)
        if vm is None or shown is None or shown.phase is not Phase.RUNNING:
            state = "absent" if shown is None else shown.why or shown.phase
            raise errors.HypervisorError(f"the VM does not run: {state}")
        return vm

    async def _until(self, vm: _Vm, seconds: float) -> None:
        """Until so long after the script's start; looks now and then whether the VM is still there."""
        while (left_s := seconds - (self._clock.boot_ns() - vm.script_ns) / 1e9) > 0:
            await asyncio.sleep(min(left_s, 0.2))
            self._running(vm.instance, vm.epoch)

    async def _take(self, instance: model.InstanceId, seconds: float, step: str) -> None:
        if seconds:
            await asyncio.sleep(seconds)
        if self.knobs.fail == step and _befalls("fail", instance, self.knobs.fail_share):
            raise errors.HypervisorError(f"the VM cannot {step} (synthetic fail={step})")

    def _note(self, vm: _Vm, what: str) -> None:
        if self._root is not None:
            with (self._root / _JOURNAL).open("a") as journal:
                journal.write(f"{vm.instance} {vm.epoch} {what} {self._clock.boot_ns()}\n")

    def _save(self, vm: _Vm) -> None:
        self._keep(vm)
        if self._root is not None:
            directory = hypervisor.vm_dir(self._root, vm.instance, vm.epoch)
            directory.mkdir(exist_ok=True)
            durable.write(directory / "vm.json", vm, fsync=False)

    def _keep(self, vm: _Vm) -> None:
        self._vms[vm.instance, vm.epoch] = vm
        self._shown[vm.instance, vm.epoch] = self._show(vm)

    def _remove(self, key: tuple[model.InstanceId, int]) -> None:
        if self._root is not None:
            shutil.rmtree(hypervisor.vm_dir(self._root, *key), ignore_errors=True)
        self._vms.pop(key, None)
        self._shown.pop(key, None)


def _befalls(trouble: str, instance: model.InstanceId, share: float) -> bool:
    """Whether this VM is one of the share that the trouble befalls."""
    if share <= 0:
        return False
    return int.from_bytes(hashlib.sha256(f"{trouble} {instance}".encode()).digest()[:6]) < share * 2**48


class _Story(model.Noun, frozen=True, kw_only=True):
    """What a script comes to."""

    seconds: float = 0.0
    code: int = 0
    stdout: bytes = b""
    stderr: bytes = b""
    powers_off: bool = False


def _tell(text: str) -> _Story:
    seconds, code, powers_off = 0.0, 0, False
    out: list[str] = []
    err: list[str] = []
    for line in (part.strip() for whole in text.splitlines() for part in whole.split(";")):
        word, _, rest = line.partition(" ")
        if word == "echo":
            aside = rest.endswith(">&2")
            (err if aside else out).append(rest.removesuffix(">&2").strip().strip("'\""))
        elif word == "sleep":
            seconds += float(rest) if rest.replace(".", "", 1).isdigit() else math.inf
        elif word in ("exit", "poweroff"):
            code = int(rest) if rest.isdigit() else 0
            powers_off = word == "poweroff"
            break
    return _Story(seconds=seconds, code=code, stdout=_lines(out), stderr=_lines(err), powers_off=powers_off)


def _lines(lines: list[str]) -> bytes:
    return "".join(f"{line}\n" for line in lines).encode()


class Images:
    """A cache whose templates need no disk: each takes `pull_s` the first time, and is here from then on."""

    def __init__(self, pull_s: float = 0.0) -> None:
        self._pull_s = pull_s
        self._held: set[model.Digest] = set()
        self._pins: dict[str, model.Digest] = {}

    async def get(
        self, holder: str, template: model.TemplateId, digest: model.Digest, progress: Callable[[float], None]
    ) -> hypervisor.Image:
        self._pins[holder] = digest
        if digest not in self._held and self._pull_s:
            for part in range(10):
                progress(part / 10)
                await asyncio.sleep(self._pull_s / 10)
        self._held.add(digest)
        return hypervisor.Image(digest=digest, layers=())

    def pin(self, holder: str, digest: model.Digest) -> None:
        self._pins[holder] = digest
        self._held.add(digest)

    def release(self, holder: str) -> None:
        self._pins.pop(holder, None)

    def held(self) -> tuple[model.Digest, ...]:
        return tuple(sorted(self._held))

    def size_bytes(self) -> int:
        return 0

    def free_bytes(self) -> int:
        return 1 << 40

    def from_registries(self, urls: tuple[str, ...]) -> None:
        """Nothing is pulled from anywhere."""


_: type[images.Images] = Images  # the fake keeps its promise
