"""Real QEMU guests for tests: the demo template built once, and hosts that leave nothing behind.

    with guest.host() as host:                      # a data directory, watched over
        async with host.hypervisor() as qemu:       # as a fresh agent would: it finds what runs
            vm = host.plan()
            await qemu.prepare(vm)
            ...

The template is built once per content into <repository>/.cache/guest and shared by all test workers. VMs outlive the
process that started them, so a guardian process kills a host's VMs when the test runner ends, however it ends.
``python -m tests.support.guest ROOT INSTANCE SCRIPT`` is an agent that can be killed: it prepares and starts a VM, and
runs a script in it.
"""

import asyncio
import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from covey import errors, failpoint, model, world
from covey.agent import cpio, demo_guest, hypervisor, qemu, qemu_process

_T = TypeVar("_T")
REPOSITORY = Path(__file__).resolve().parents[2]
CACHE = REPOSITORY / ".cache"
BOOT_S = 180.0  # emulated, on a machine with other work
LAYER_TEXT = "the layer on top"

_GUARDIAN = """
import os, sys
sys.stdin.read()
from covey.agent import qemu_process
for found in qemu_process.find():
    if found.directory.startswith(sys.argv[1] + "/"):
        os.kill(found.pid, 9)
"""


def template() -> Path:
    """The demo template with a second layer ``extra.qcow2``, built when its source has changed."""
    sources = b"".join(Path(module.__file__ or "").read_bytes() for module in (demo_guest, cpio))
    directory = CACHE / "guest" / hashlib.sha256(sources).hexdigest()[:16]
    CACHE.joinpath("guest").mkdir(parents=True, exist_ok=True)
    with (CACHE / "guest" / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (directory / "extra.qcow2").exists():
            demo_guest.build(directory, cache=CACHE / "packages")
            demo_guest.build_layer(directory, "extra.qcow2", {"/srv/layers/extra": LAYER_TEXT.encode() + b"\n"})
    return directory


def image(*, layers: tuple[str, ...] = ("base.qcow2",), **config: str | int | bool) -> hypervisor.Image:
    """The template as an agent's cache would hand it over. A layer is a name in the template's directory or a path."""
    directory = template()
    return hypervisor.Image(
        digest=model.Digest("sha256:" + "0" * 64),
        layers=tuple(str(directory / layer) for layer in layers),
        config={**json.loads((directory / "config.json").read_text()), **config},
        files={"kernel": str(directory / "vmlinuz"), "initrd": str(directory / "initrd")},
    )


class Host:
    """A node's directory of VMs."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.woken = asyncio.Event()

    def plan(self, *, image_: hypervisor.Image | None = None, epoch: int = 1, **spec: Any) -> hypervisor.Plan:
        chosen = image_ or image()
        return hypervisor.Plan(
            instance=model.InstanceId(str(uuid.uuid4())),
            epoch=epoch,
            cloud="cloud-of-tests",
            name="test-vm",
            host_ip="127.0.0.1",
            image=chosen,
            spec=model.Spec(
                template=model.TemplateId("t"),
                template_name="demo",
                tag="v1",
                version=0,
                digest=chosen.digest,
                arch=model.Arch.AMD64,
                **spec,
            ),
        )

    def config(self, **changed: Any) -> qemu.Config:
        config = qemu.Config(root=self.root, accel="tcg", stop_s=20, host_ip="127.0.0.1")
        return msgspec.structs.replace(config, **changed)

    @contextlib.asynccontextmanager
    async def hypervisor(self, **config: Any) -> AsyncIterator[qemu.Qemu]:
        """A fresh hypervisor on this directory, as after a restart of the agent."""
        made = qemu.Qemu(self.config(**config), world.System(), self.woken.set)
        try:
            yield made
        finally:
            made.close()

    def processes(self) -> list[int]:
        found = qemu_process.find()
        return [process.pid for process in found if process.directory.startswith(f"{self.root}/")]


@contextlib.contextmanager
def host() -> Iterator[Host]:
    """A directory of VMs; whatever still runs there at the end, or at the end of the test runner, is killed."""
    root = Path(tempfile.mkdtemp(prefix="covey-vms-")).resolve()
    guardian = subprocess.Popen(
        [sys.executable, "-c", _GUARDIAN, str(root)], stdin=subprocess.PIPE, cwd=REPOSITORY, start_new_session=True
    )
    try:
        yield Host(root)
    finally:
        assert guardian.stdin is not None
        guardian.stdin.close()
        guardian.wait(30)
        _wait_until_empty(Host(root))
        roots = [root, *root.rglob("vms")]  # an agent as a program keeps its VMs deeper
        shutil.rmtree(root, ignore_errors=True)
        for gone in roots:
            qemu.Qemu(Host(gone).config(), world.System()).lower_fence()


def _wait_until_empty(host: Host) -> None:
    end = time.monotonic() + 20
    while host.processes():
        assert time.monotonic() < end, "the guardian left a VM behind"
        time.sleep(0.05)


async def until(what: str, look: Callable[[], Awaitable[_T | None]], timeout_s: float = BOOT_S) -> _T:
    """Wait for `look` to answer with something true."""
    end = time.monotonic() + timeout_s
    while not (seen := await look()):
        if time.monotonic() > end:
            raise AssertionError(f"after {timeout_s:.0f} s it is still not so that {what}")
        await asyncio.sleep(0.05)
    return seen


async def boot(driver: hypervisor.Hypervisor, plan: hypervisor.Plan) -> model.VmInfo:
    """Prepare, start, and wait until the guest answers and has an address."""
    await driver.prepare(plan)
    await driver.start(plan.instance, plan.epoch)

    async def answered() -> model.VmInfo | None:
        info = await driver.info(plan.instance, plan.epoch)
        return info if info and info.ip else None

    return await until("the guest answers", answered)


async def phase(driver: hypervisor.Hypervisor, plan: hypervisor.Plan) -> hypervisor.Phase | None:
    """How the VM stands; None when there is none."""
    found = [vm for vm in await driver.list() if (vm.instance, vm.epoch) == (plan.instance, plan.epoch)]
    return found[0].phase if found else None


def page(info: model.VmInfo) -> dict[str, str]:
    """What the guest's page on port 80 says, asked from the host through the forwarded port."""
    (forward,) = (rule for rule in info.forwards if rule.guest_port == 80)
    with urllib.request.urlopen(f"http://{forward.host_ip}:{forward.host_port}/", timeout=60) as answer:
        lines = answer.read().decode().splitlines()
    return dict(line.split(": ", 1) for line in lines)


# ---- an agent that can be killed -------------------------------------------------------------------------------


def agent(host: Host, plan: hypervisor.Plan, script: str = "", failpoints: str = "") -> subprocess.Popen[bytes]:
    """Start it; it ends by itself when the script has ended, or right after the start without one."""
    (host.root / f"{plan.instance}.plan").write_bytes(msgspec.json.encode(plan))
    words = [
        sys.executable,
        "-m",
        "tests.support.guest",
        str(host.root),
        str(host.root / f"{plan.instance}.plan"),
        script,
    ]
    environment = {**os.environ, "COVEY_FAILPOINTS": failpoints, "PYTHONPATH": str(REPOSITORY)}
    return subprocess.Popen(words, cwd=REPOSITORY, env=environment)


async def _agent(root: Path, plan_file: Path, script: str) -> None:
    plan = msgspec.json.decode(plan_file.read_bytes(), type=hypervisor.Plan)
    async with Host(root).hypervisor() as driver:
        if not script:
            await driver.prepare(plan)
            await driver.start(plan.instance, plan.epoch)
            return
        await boot(driver, plan)
        with contextlib.suppress(errors.HypervisorError):
            await driver.run(plan.instance, plan.epoch, hypervisor.Job(text=script, timeout_s=60))


if __name__ == "__main__":
    failpoint.arm(os.environ.get("COVEY_FAILPOINTS", ""))
    asyncio.run(_agent(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]))
