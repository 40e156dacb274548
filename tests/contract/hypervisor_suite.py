"""What every hypervisor promises (`covey.agent.hypervisor`), as tests over a `Place`: a node's VMs, seen by one driver
after another. Imported by test_hypervisor (synthetic) and by tests/vm/test_qemu_contract (a real guest)."""

import asyncio
import contextlib
import time
from typing import Any, Protocol

import msgspec
import pytest

from covey import errors, model
from covey.agent import hypervisor

Phase = hypervisor.Phase


class Place(Protocol):
    """A node's directory of VMs. `lasting`: a VM outlives the driver that started it."""

    lasting: bool

    def driver(self) -> contextlib.AbstractAsyncContextManager[hypervisor.Hypervisor]:
        """A fresh driver, as after a restart of the agent."""
        ...

    def plan(self, **spec: Any) -> hypervisor.Plan: ...


async def phase(driver: hypervisor.Hypervisor, plan: hypervisor.Plan) -> Phase | None:
    found = {(vm.instance, vm.epoch): vm for vm in await driver.list()}
    vm = found.get((plan.instance, plan.epoch))
    assert vm is None or vm.cloud == plan.cloud
    return None if vm is None else vm.phase


async def booted(driver: hypervisor.Hypervisor, plan: hypervisor.Plan, limit_s: float = 90.0) -> model.VmInfo:
    deadline = time.monotonic() + limit_s
    while True:
        info = await driver.info(plan.instance, plan.epoch)
        if info is not None:
            return info
        assert time.monotonic() < deadline, "the guest does not answer"
        await asyncio.sleep(0.05)


def job(text: str, timeout_s: float = 30.0) -> hypervisor.Job:
    return hypervisor.Job(text=text, timeout_s=timeout_s, after_network=False)


class Contract:
    """Subclasses give a fixture `place`."""

    async def test_facts_are_of_a_host_that_can_run_vms(self, place: Place) -> None:
        async with place.driver() as driver:
            facts = await driver.facts()
        assert facts.name and facts.ip and facts.hypervisor
        assert min(facts.cpu_count, facts.ram_mb, facts.disk_bytes, facts.slots) > 0

    async def test_prepare_runs_nothing_and_may_be_repeated(self, place: Place) -> None:
        plan = place.plan()
        async with place.driver() as driver:
            assert await driver.list() == []
            await driver.prepare(plan)
            await driver.prepare(plan)
            assert await phase(driver, plan) is Phase.PREPARED
            await driver.destroy(plan.instance, plan.epoch)
            assert await driver.list() == []

    async def test_only_a_prepared_vm_starts_and_only_once(self, place: Place) -> None:
        """Safety S5."""
        plan = place.plan()
        async with place.driver() as driver:
            with pytest.raises(errors.HypervisorError):
                await driver.start(plan.instance, plan.epoch)
            await driver.prepare(plan)
            await driver.start(plan.instance, plan.epoch)
            assert await phase(driver, plan) is Phase.RUNNING
            with pytest.raises(errors.HypervisorError):
                await driver.start(plan.instance, plan.epoch)
            assert await phase(driver, plan) is Phase.RUNNING
            await driver.destroy(plan.instance, plan.epoch)

    async def test_destroy_leaves_nothing_and_may_be_repeated(self, place: Place) -> None:
        plan = place.plan()
        async with place.driver() as driver:
            await driver.destroy(plan.instance, plan.epoch)
            await driver.prepare(plan)
            await driver.start(plan.instance, plan.epoch)
            await driver.destroy(plan.instance, plan.epoch)
            await driver.destroy(plan.instance, plan.epoch)
            assert await driver.list() == []
            with pytest.raises(errors.HypervisorError):
                await driver.info(plan.instance, plan.epoch)

    async def test_vms_of_one_host_do_not_disturb_each_other(self, place: Place) -> None:
        one, two = place.plan(), place.plan()
        async with place.driver() as driver:
            await asyncio.gather(driver.prepare(one), driver.prepare(two))
            await driver.start(one.instance, one.epoch)
            await driver.destroy(two.instance, two.epoch)
            assert await phase(driver, one) is Phase.RUNNING
            await driver.destroy(one.instance, one.epoch)

    async def test_a_life_with_vminfo_and_scripts(self, place: Place) -> None:
        """One guest for what needs one that is up: booting is slow where it is real."""
        plan = place.plan(forwards=(model.Forward(name="ssh", guest_port=22),))
        async with place.driver() as driver:
            await driver.prepare(plan)
            await driver.start(plan.instance, plan.epoch)
            info = await booted(driver, plan)
            assert info.uuid and info.name and info.host_ip and info.status == "running"
            (forward,) = info.forwards
            assert (forward.name, forward.guest_port) == ("ssh", 22) and forward.host_port > 0
            first = await driver.run(plan.instance, plan.epoch, job("echo out\necho err >&2\nexit 3"))
            assert (first.return_code, first.stdout, first.stderr) == (3, b"out\n", b"err\n")
            again = await driver.run(plan.instance, plan.epoch, job("echo out\necho err >&2\nexit 3"))
            assert again == first, "a repeat follows the first run; the script runs once"
            await self._read_back(driver, plan)
            await driver.stop(plan.instance, plan.epoch)
            await driver.stop(plan.instance, plan.epoch)
            assert await phase(driver, plan) is Phase.STOPPED
            with pytest.raises(errors.HypervisorError):
                await driver.start(plan.instance, plan.epoch)
            next_ = msgspec.structs.replace(plan, epoch=plan.epoch + 1)
            await driver.prepare(next_)
            await driver.start(next_.instance, next_.epoch)
            assert await phase(driver, next_) is Phase.RUNNING
            await driver.destroy(next_.instance, next_.epoch)
            await driver.destroy(plan.instance, plan.epoch)
            assert await driver.list() == []

    async def _read_back(self, driver: hypervisor.Hypervisor, plan: hypervisor.Plan) -> None:
        """What the script wrote can be read in parts, from both ends, as often as one likes (safety S26)."""
        for stream, text in (("stdout", b"out\n"), ("stderr", b"err\n")):
            for offset, limit, first in ((0, 100, 0), (0, 2, 0), (1, 2, 1), (-2, 100, 2), (-99, 100, 0), (99, 100, 4)):
                part = await driver.output(plan.instance, plan.epoch, stream, offset, limit)
                assert part == model.Output(data=text[first : first + limit], offset=first, size=4)
        with pytest.raises(errors.HypervisorError):
            await driver.output(plan.instance, plan.epoch + 1, "stdout", 0, 100)

    async def test_a_script_that_hangs_ends_with_minus_one(self, place: Place) -> None:
        plan = place.plan()
        async with place.driver() as driver:
            await driver.prepare(plan)
            await driver.start(plan.instance, plan.epoch)
            await booted(driver, plan)
            result = await driver.run(plan.instance, plan.epoch, job("echo before\nsleep 1000", 1.0))
            assert (result.return_code, result.did_timeout, result.stdout) == (-1, True, b"before\n")
            await driver.destroy(plan.instance, plan.epoch)

    async def test_a_vm_outlives_its_driver_and_the_next_one_finds_it(self, place: Place) -> None:
        plan = place.plan()
        async with place.driver() as first:
            await first.prepare(plan)
            await first.start(plan.instance, plan.epoch)
        async with place.driver() as second:
            assert await phase(second, plan) is (Phase.RUNNING if place.lasting else None)
            await second.destroy(plan.instance, plan.epoch)
            assert await second.list() == []
