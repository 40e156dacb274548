"""The synthetic hypervisor keeps what every hypervisor promises, in memory and on disk; and its knobs."""

import asyncio
import contextlib
import uuid
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from covey import errors, model, world
from covey.agent import hypervisor, synthetic
from tests.contract import hypervisor_suite
from tests.support import nouns


class Place:
    def __init__(self, root: Path | None, **knobs: Any) -> None:
        self.lasting = root is not None
        self._root = root
        self._knobs = synthetic.Knobs(**knobs)

    @contextlib.asynccontextmanager
    async def driver(self) -> AsyncIterator[synthetic.Synthetic]:
        yield synthetic.Synthetic(world.System(), self._knobs, root=self._root)

    def plan(self, **spec: Any) -> hypervisor.Plan:
        return hypervisor.Plan(
            instance=model.InstanceId(str(uuid.uuid4())),
            epoch=1,
            cloud="cloud",
            name="vm",
            spec=nouns.spec(**spec),
            image=hypervisor.Image(digest=nouns.spec().digest, layers=()),
            host_ip="127.0.0.1",
        )


class TestSynthetic(hypervisor_suite.Contract):
    @pytest.fixture(params=["memory", "disk"])
    def place(self, request: pytest.FixtureRequest, tmp_path: Path) -> Place:
        return Place(None if request.param == "memory" else tmp_path / "vms")


async def test_boot_time_and_hanging_are_knobs() -> None:
    for knobs, answers in (({"boot_s": 1.0}, True), ({"hang_share": 1.0}, False)):
        place = Place(None, **knobs)
        plan = place.plan()
        async with place.driver() as driver:
            await driver.prepare(plan)
            await driver.start(plan.instance, 1)
            assert await driver.info(plan.instance, 1) is None
            if answers:
                await hypervisor_suite.booted(driver, plan, 60.0)


@pytest.mark.parametrize("step", ["prepare", "start", "boot", "stop"])
async def test_each_step_can_fail(step: str) -> None:
    place = Place(None, fail=step, fail_share=1.0)
    plan = place.plan()
    async with place.driver() as driver:
        with pytest.raises(errors.HypervisorError, match=f"cannot {step}"):
            await driver.prepare(plan)
            await driver.start(plan.instance, 1)
            await driver.info(plan.instance, 1)
            await driver.stop(plan.instance, 1)


async def test_a_share_of_vms_has_trouble_and_always_the_same_ones() -> None:
    place = Place(None, fail="prepare", fail_share=0.3)
    plans = [place.plan() for _ in range(300)]
    failed: list[set[str]] = []
    for _ in range(2):
        async with place.driver() as driver:
            failed.append(set())
            for plan in plans:
                try:
                    await driver.prepare(plan)
                except errors.HypervisorError:
                    failed[-1].add(plan.instance)
    assert failed[0] == failed[1] and 50 < len(failed[0]) < 130


async def test_a_vm_that_vanishes_wakes_the_agent_and_says_why() -> None:
    woken: list[bool] = []
    driver = synthetic.Synthetic(
        world.System(), synthetic.Knobs(vanish_share=1.0, vanish_s=0.1), wake=lambda: woken.append(True)
    )
    plan = Place(None).plan()
    await driver.prepare(plan)
    await driver.start(plan.instance, 1)
    for _ in range(200):
        if woken:
            break
        await asyncio.sleep(0.01)
    (vm,) = await driver.list()
    assert (vm.phase, vm.why) == (hypervisor.Phase.ENDED, "the VM's process vanished")


def test_knobs_are_read_and_wrong_ones_named() -> None:
    assert synthetic.knobs("boot_s=0.5, fail=boot,slots=3") == synthetic.Knobs(boot_s=0.5, fail="boot", slots=3)
    for wrong in ("bot_s=1", "fail=sometimes", "slots=many"):
        with pytest.raises(errors.SettingError, match=r"bot_s|sometimes|slots"):
            synthetic.knobs(wrong)
