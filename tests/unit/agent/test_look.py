"""What a new worker may take from the last look, and what it must look at itself."""

import asyncio

import pytest

from covey import errors, model
from covey.agent import hypervisor, look

VM = model.InstanceId("vm")
OTHER = model.InstanceId("other")
RUNS = hypervisor.Vm(instance=VM, epoch=2, phase=hypervisor.Phase.RUNNING)


class Driver:
    """Lists what it is told to."""

    def __init__(self) -> None:
        self.vms = [RUNS]
        self.may_answer = asyncio.Event()
        self.may_answer.set()
        self.is_well = True

    async def list(self) -> list[hypervisor.Vm]:
        found = list(self.vms)
        await self.may_answer.wait()
        if not self.is_well:
            raise errors.HypervisorError("no hypervisor")
        return found


def made(driver: Driver) -> look.Look:
    return look.Look(driver)  # type: ignore[arg-type]


async def begun(one: look.Look, driver: Driver) -> "asyncio.Task[look.Found]":
    """A look that is under way until the driver may answer."""
    driver.may_answer.clear()
    slow = asyncio.create_task(one.fresh())
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    return slow


async def test_nothing_is_known_before_the_first_look() -> None:
    one = made(Driver())
    assert one.last(VM) is None
    await one.fresh()
    assert one.last(VM) == {2: RUNS}
    assert one.last(OTHER) == {}


async def test_what_a_worker_left_is_looked_at_again() -> None:
    """It may have made and removed VMs since the list was begun."""
    driver = Driver()
    one = made(driver)
    await one.fresh()
    driver.vms = []
    one.left(VM)
    assert one.last(VM) is None
    assert one.last(OTHER) == {}
    await one.fresh()
    assert one.last(VM) == {}


async def test_a_list_that_was_under_way_when_a_worker_left_does_not_count() -> None:
    driver = Driver()
    one = made(driver)
    slow = await begun(one, driver)
    driver.vms = []
    one.left(VM)
    driver.may_answer.set()
    assert await slow == {(VM, 2): RUNS}
    assert one.last(VM) is None


async def test_a_list_that_failed_leaves_nothing_known_and_shown_what_the_one_before_did() -> None:
    driver = Driver()
    one = made(driver)
    await one.fresh()
    driver.is_well = False
    with pytest.raises(errors.HypervisorError):
        await one.fresh()
    assert one.last(VM) is None
    assert one.shown == {(VM, 2): RUNS}


async def test_what_was_removed_is_not_shown_any_more() -> None:
    driver = Driver()
    one = made(driver)
    await one.fresh()
    assert one.shown == {(VM, 2): RUNS}
    one.removed((VM, 2))
    assert one.shown == {}
    await one.fresh()
    assert one.shown == {(VM, 2): RUNS}, "made anew since"


async def test_what_was_removed_while_it_was_listed_is_not_shown() -> None:
    driver = Driver()
    one = made(driver)
    await one.fresh()
    slow = await begun(one, driver)
    one.removed((VM, 2))
    driver.may_answer.set()
    assert await slow == {}
    assert one.shown == {}
