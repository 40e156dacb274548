"""A bell: rung before, rung meanwhile, not rung in time, and the waiter that was cancelled."""

import asyncio

import pytest

from covey.agent import bell


async def test_who_waits_is_woken_once_and_at_once() -> None:
    one = bell.Bell()
    waiting = asyncio.create_task(one.wait())
    await asyncio.sleep(0)
    assert not waiting.done()
    one.ring()
    one.ring()
    await waiting
    assert one.rung
    await one.wait()  # it was rung already
    one.clear()
    assert not one.rung


@pytest.mark.parametrize("limit_s", [-1.0, 0.0, 0.01])
async def test_a_limit_ends_the_wait_and_does_not_ring(limit_s: float) -> None:
    one = bell.Bell()
    await one.wait(limit_s)
    assert not one.rung


async def test_a_cancelled_wait_leaves_the_bell_in_order() -> None:
    one = bell.Bell()
    waiting = asyncio.create_task(one.wait(60))
    await asyncio.sleep(0)
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    one.ring()
    await one.wait()
