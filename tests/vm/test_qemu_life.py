"""A VM's life: started once, killed, frozen, outliving the agent, leaving nothing (safety S4, S5, S6, S12).

Most tests need a running QEMU only, not a guest that is up.
"""

import asyncio
import hashlib
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from covey import errors
from covey.agent import hypervisor, qemu_disk, qemu_process
from tests.support import guest

Phase = hypervisor.Phase
NFT = {"PATH": os.environ["PATH"] + ":/usr/sbin:/sbin"}


@pytest.fixture
def host() -> Iterator[guest.Host]:
    with guest.host() as made:
        yield made


def place(host: guest.Host, plan: hypervisor.Plan) -> qemu_disk.Place:
    return qemu_disk.Place(host.root, plan.instance, plan.epoch)


async def test_prepared_runs_nothing_and_start_happens_once(host: guest.Host) -> None:
    plan = host.plan()
    async with host.hypervisor() as driver:
        await driver.prepare(plan)
        await driver.prepare(plan)
        assert await guest.phase(driver, plan) is Phase.PREPARED
        assert host.processes() == []
        await driver.start(plan.instance, 1)
        assert await guest.phase(driver, plan) is Phase.RUNNING
        with pytest.raises(errors.HypervisorError, match="never started twice"):
            await driver.start(plan.instance, 1)
        assert len(host.processes()) == 1


async def test_kill_9_of_qemu_is_noticed_and_told(host: guest.Host) -> None:
    plan = host.plan()
    async with host.hypervisor() as driver:
        await driver.prepare(plan)
        await driver.start(plan.instance, 1)
        host.woken.clear()
        os.kill(host.processes()[0], signal.SIGKILL)
        async with asyncio.timeout(60):
            await host.woken.wait()
        (vm,) = await driver.list()
        assert (vm.phase, vm.why) == (Phase.ENDED, "QEMU was killed")
        with pytest.raises(errors.HypervisorError, match="QEMU was killed"):
            await driver.info(plan.instance, 1)
        with pytest.raises(errors.HypervisorError, match="QEMU was killed"):
            await driver.run(plan.instance, 1, hypervisor.Job(text="true", timeout_s=5))
        with pytest.raises(errors.HypervisorError, match="never started twice"):
            await driver.start(plan.instance, 1)


async def test_a_frozen_qemu_hangs_no_verb(host: guest.Host) -> None:
    plan = host.plan()
    async with host.hypervisor(stop_s=1) as driver:
        await driver.prepare(plan)
        await driver.start(plan.instance, 1)
        os.kill(host.processes()[0], signal.SIGSTOP)
        begun = time.monotonic()
        assert await driver.info(plan.instance, 1) is None
        assert await guest.phase(driver, plan) is Phase.RUNNING
        await driver.stop(plan.instance, 1)
        assert await guest.phase(driver, plan) is Phase.STOPPED
        await driver.destroy(plan.instance, 1)
        assert time.monotonic() - begun < 100
        assert host.processes() == []


async def test_a_frozen_qemu_can_be_destroyed(host: guest.Host) -> None:
    plan = host.plan()
    async with host.hypervisor() as driver:
        await driver.prepare(plan)
        await driver.start(plan.instance, 1)
        os.kill(host.processes()[0], signal.SIGSTOP)
        await driver.destroy(plan.instance, 1)
        await driver.destroy(plan.instance, 1)
        assert host.processes() == []
        assert await driver.list() == []


@pytest.mark.parametrize(
    ("failpoint", "phase"), [("qemu.forking=kill", Phase.ENDED), ("qemu.forked=kill", Phase.RUNNING)]
)
async def test_agent_killed_around_the_fork(host: guest.Host, failpoint: str, phase: Phase) -> None:
    """Marker without holder: it ended, and may have run. Lock held: it runs, and is adopted (safety S5)."""
    plan = host.plan()
    assert await asyncio.to_thread(guest.agent(host, plan, failpoints=failpoint).wait, 200) == -signal.SIGKILL
    async with host.hypervisor() as driver:
        assert await guest.phase(driver, plan) is phase
        with pytest.raises(errors.HypervisorError, match="never started twice"):
            await driver.start(plan.instance, 1)
        await driver.destroy(plan.instance, 1)
        assert host.processes() == []


async def test_vm_and_script_outlive_the_agent(host: guest.Host) -> None:
    """kill -9 of the agent while the script runs: the next agent finds VM, ports and job, and follows it to its end."""
    plan = host.plan()
    script = "echo begun >>/root/begun; while [ ! -e /tmp/go ]; do sleep 0.1; done; cat /root/begun; exit 5"
    first = guest.agent(host, plan, script)
    try:

        async def launched() -> bool:
            assert first.poll() is None, "the agent ended by itself"
            return place(host, plan).job_out.exists()

        await guest.until("the script was launched", launched)
    finally:
        first.kill()
        first.wait()
    (pid,) = host.processes()
    async with host.hypervisor() as driver:
        assert await guest.phase(driver, plan) is Phase.RUNNING
        info = await driver.info(plan.instance, 1)
        assert info is not None
        assert (await asyncio.to_thread(guest.page, info))["instance"] == plan.instance
        job = hypervisor.Job(text=script, timeout_s=60)
        following = asyncio.ensure_future(driver.run(plan.instance, 1, job))
        await driver._lives.of(place(host, plan)).guest.shell("touch /tmp/go", "go")
        result = await following
        assert (result.return_code, result.stdout) == (5, b"begun\n")
        assert host.processes() == [pid]
        # A guest that can shuts down politely; the process of an adopted VM is no child, its end is seen all the same.
        host.woken.clear()
        await driver.stop(plan.instance, 1)
        assert await guest.phase(driver, plan) is Phase.STOPPED
        assert not place(host, plan).monitor.exists(), "QEMU was killed, not shut down"


@pytest.mark.parametrize("failpoint", ["qemu.job=kill", "qemu.launched=kill"])
async def test_agent_killed_around_the_launch_of_the_script(host: guest.Host, failpoint: str) -> None:
    """The script runs exactly once, whether or not the killed agent had launched it (safety S5)."""
    plan = host.plan()
    script = "echo once >>/root/ran; cat /root/ran; exit 6"
    assert await asyncio.to_thread(guest.agent(host, plan, script, failpoint).wait, 110) == -signal.SIGKILL
    async with host.hypervisor() as driver:
        result = await driver.run(plan.instance, 1, hypervisor.Job(text=script, timeout_s=60))
        assert (result.return_code, result.stdout) == (6, b"once\n")


async def test_a_cancelled_prepare_goes_on_behind_nobody(host: guest.Host) -> None:
    plan = host.plan()
    async with host.hypervisor() as driver:
        making = asyncio.ensure_future(driver.prepare(plan))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        making.cancel()
        with pytest.raises(asyncio.CancelledError):
            await making
        await driver.destroy(plan.instance, 1)
        assert list(host.root.iterdir()) == []


async def test_destroy_leaves_nothing(host: guest.Host) -> None:
    plans = [host.plan(), host.plan()]
    async with host.hypervisor() as driver:
        for plan in plans:
            await driver.prepare(plan)
            await driver.start(plan.instance, 1)
        assert len(host.processes()) == 2
        await asyncio.gather(*(driver.destroy(plan.instance, 1) for plan in plans))
        assert host.processes() == []
        assert list(host.root.iterdir()) == []
    tables = await asyncio.to_thread(subprocess.check_output, ["nft", "list", "tables"], text=True)
    assert driver._fence is None or driver._fence._table not in tables


async def test_a_process_without_directory_is_listed_and_destroyed(host: guest.Host) -> None:
    plan = host.plan()
    async with host.hypervisor() as driver:
        await driver.prepare(plan)
        await driver.start(plan.instance, 1)
        place(host, plan).remove()
        (vm,) = await driver.list()
        assert (vm.instance, vm.epoch, vm.phase, vm.cloud) == (plan.instance, 1, Phase.RUNNING, plan.cloud)
        await driver.destroy(plan.instance, 1)
        assert host.processes() == []


async def test_vms_of_another_directory_are_not_ours(host: guest.Host) -> None:
    plan = host.plan()
    with guest.host() as other:
        async with host.hypervisor() as driver, other.hypervisor() as neighbour:
            await driver.prepare(plan)
            await driver.start(plan.instance, 1)
            assert await neighbour.list() == []
            await neighbour.destroy(plan.instance, 1)
            assert await guest.phase(driver, plan) is Phase.RUNNING


async def test_what_a_crash_left_half_made_is_no_vm_and_is_swept(host: guest.Host) -> None:
    for name in (".new-x.1", ".gone-y.2"):
        (host.root / name / "run").mkdir(parents=True)
    async with host.hypervisor() as driver:
        assert await driver.list() == []
    assert list(host.root.iterdir()) == []


async def test_a_full_disk_is_said_before_anything_is_made(host: guest.Host) -> None:
    async with host.hypervisor(reserve_bytes=1 << 60) as driver:
        with pytest.raises(errors.HypervisorError, match="free some space"):
            await driver.prepare(host.plan())
    assert list(host.root.iterdir()) == []


@pytest.mark.parametrize("tool", ["binary", "qemu_img"])
async def test_qemu_missing(host: guest.Host, tool: str) -> None:
    async with host.hypervisor(**{tool: "no-such-program"}) as driver:
        with pytest.raises(errors.HypervisorError, match="no-such-program is not installed: apt-get install"):
            await driver.facts()


async def test_facts(host: guest.Host) -> None:
    async with host.hypervisor(slots=7, accel="auto") as driver:
        facts = await driver.facts()
    assert (facts.hypervisor, facts.slots, facts.ip) == ("qemu", 7, "127.0.0.1")
    assert facts.hypervisor_version.startswith(("7.", "8.", "9.", "10."))
    real = any(flag in Path("/proc/cpuinfo").read_text().split() for flag in ("vmx", "svm"))
    assert ("(kvm)" in facts.hypervisor_version) <= real, "KVM without virtualisation in the processor"


def test_a_recycled_process_id_is_somebody_else(host: guest.Host) -> None:
    """Only the command line makes a process ours."""
    impostor = subprocess.Popen(["sleep", "60"])
    try:
        assert impostor.pid not in [found.pid for found in qemu_process.find()]
        assert qemu_process.open_process(host.root / "x.1", {os.geteuid()}) is None
    finally:
        impostor.kill()
        impostor.wait()


def claiming(data: object, **options: Any) -> "subprocess.Popen[bytes]":
    """A QEMU of somebody else's, whose command line says what it likes."""
    mark = json.dumps({"qom-type": "secret", "id": "covey-vm", "data": data})
    words = ["qemu-system-x86_64", "-name", "covey-x", "-machine", "none", "-nodefaults", "-display", "none", "-S"]
    return subprocess.Popen([*words, "-object", mark], stdin=subprocess.DEVNULL, cwd="/", **options)


@pytest.mark.skipif(os.geteuid() != 0, reason="another user is needed")
async def test_a_command_line_is_believed_of_the_vms_own_user_only(host: guest.Host) -> None:
    """Any user of the host, and any QEMU that its guest took over, can write another VM's mark on its command line."""
    plan = host.plan()
    async with host.hypervisor() as driver:
        impostors = [
            claiming(f"cloud-of-tests {host.root}/{plan.instance}.1", user=65534),
            claiming(f"cloud-of-tests {host.root}/another.2", user=65534),
            claiming(f"cloud-of-tests {host.root}/name.of-nothing", user=65534),
        ]
        try:
            await driver.prepare(plan)
            await driver.start(plan.instance, 1)
            (ours,) = set(host.processes()) - {impostor.pid for impostor in impostors}
            assert [vm.instance for vm in await driver.list()] == [plan.instance]
            await driver.destroy(plan.instance, 1)
            assert not Path(f"/proc/{ours}").exists()
            assert [impostor.poll() for impostor in impostors] == [None, None, None]
            assert await driver.list() == []
        finally:
            for impostor in impostors:
                impostor.kill()
                impostor.wait()


async def test_a_moved_data_directory_still_finds_its_vms(host: guest.Host) -> None:
    """Their command lines name the old place; but they hold their locks."""
    plan, moved = host.plan(), host.root / "moved"
    async with host.hypervisor() as driver:
        await driver.prepare(plan)
        await driver.start(plan.instance, 1)
    (pid,) = host.processes()
    moved.mkdir()
    (host.root / f"{plan.instance}.1").rename(moved / f"{plan.instance}.1")
    async with host.hypervisor(root=moved) as driver:
        assert await guest.phase(driver, plan) is Phase.RUNNING
        await driver.destroy(plan.instance, 1)
        assert not Path(f"/proc/{pid}").exists()
        assert await driver.list() == []


@pytest.mark.skipif(os.geteuid() != 0, reason="only root has a fence")
async def test_a_fence_that_was_taken_away_is_put_back(host: guest.Host) -> None:
    """``nft flush ruleset``, which every reload of a host's firewall begins with, must not open the host's loopback."""

    def take_away() -> None:
        subprocess.run(["nft", "delete", "table", "inet", table()], env=NFT, check=True)

    def table() -> str:
        done = subprocess.run(["nft", "list", "tables"], env=NFT, capture_output=True, text=True, check=True)
        name = "covey_" + hashlib.sha256(str(host.root).encode()).hexdigest()[:12]
        return name if name in done.stdout else ""

    plan = host.plan()
    async with host.hypervisor() as driver:
        await driver.facts()
        assert not table(), "no VM, no fence"
        await driver.prepare(plan)
        await driver.start(plan.instance, 1)
        take_away()
        assert not table()
        await driver.facts()  # as the agent does every minute
        assert table()
        await driver.destroy(plan.instance, 1)
        assert not table()
        await driver.prepare(plan)
        await driver.start(plan.instance, 1)
        assert table()
        os.kill(host.processes()[0], signal.SIGKILL)
        shutil.rmtree(host.root / f"{plan.instance}.1")  # as far as a removal came when its agent died
        await driver.facts()
        assert not table(), "nothing is left of it"


async def test_a_bad_plan_is_refused_before_launch(host: guest.Host) -> None:
    async with host.hypervisor() as driver:
        for plan, said in ((host.plan(vcpu=1000), "vcpu"), (host.plan(vram_mb=1), "ram_mb")):
            with pytest.raises(errors.HypervisorError, match=said):
                await driver.prepare(plan)
        ports = "ssh:" + "2" * 5000
        for bad, said in ((guest.image(cmdline="a\0"), "zero byte"), (guest.image(forwards=ports), "is not name:")):
            with pytest.raises(errors.HypervisorError, match=said):
                await driver.prepare(host.plan(image_=bad))
        image = msgspec.structs.replace(guest.image(), files={})
        with pytest.raises(errors.HypervisorError, match="kernel 'vmlinuz' is not among its files"):
            await driver.prepare(host.plan(image_=image))
    assert list(host.root.iterdir()) == []
