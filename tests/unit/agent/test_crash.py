"""The real program, killed with -9 at each step, frozen, and told to end: exactly one VM, adopted or failed."""

import asyncio
import signal

import pytest

from covey import wire
from tests.unit.agent import fake
from tests.unit.agent.conftest import MakeProgram

Said = wire.ReportEvent
RUN, KEEP, DESTROY = wire.Verb.RUN, wire.Verb.KEEP, wire.Verb.DESTROY
VM = "vm-1"

_BEFORE_LAUNCH = ("agent.accepted", "agent.pulled", "agent.prepared")
_LAUNCHED = ("agent.granted", "agent.launched", "synthetic.forking")
_FORKED = ("synthetic.forked", "agent.started", "agent.answered", "agent.booted")


async def destroyed(cloud: fake.Controller) -> None:
    cloud.want(DESTROY, VM)
    await fake.until(lambda: Said.GONE in cloud.said(VM), "gone")


@pytest.mark.parametrize("step", [*_BEFORE_LAUNCH, *_LAUNCHED, *_FORKED])
async def test_kill_9_at_each_step_of_a_start(cloud: fake.Controller, make_program: MakeProgram, step: str) -> None:
    """Safety S4, S5: before launch the start goes on; a launch not used is failed; what was forked is adopted."""
    first = make_program(f"{step}=kill")
    cloud.want(RUN, VM)
    assert await first.ended() == -signal.SIGKILL
    second = make_program()
    await fake.until(lambda: {Said.BOOTED, Said.FAILED} & set(cloud.said(VM)), "adopted or failed")
    booted = step not in _LAUNCHED
    assert (Said.BOOTED in cloud.said(VM)) == booted
    assert second.starts() == ([f"{VM} 1"] if booted else [])
    await destroyed(cloud)
    assert [path.name for path in (second.folder / "vms").iterdir()] in (["journal.log"], [])
    assert not list((second.folder / "records").iterdir())


@pytest.mark.parametrize("step", ["agent.destroying", "synthetic.destroy", "agent.destroyed"])
async def test_kill_9_at_each_step_of_a_removal(cloud: fake.Controller, make_program: MakeProgram, step: str) -> None:
    first = make_program(f"{step}=kill")
    cloud.want(RUN, VM)
    await fake.until(lambda: Said.BOOTED in cloud.said(VM), "booted")
    cloud.want(DESTROY, VM)
    assert await first.ended() == -signal.SIGKILL
    assert Said.GONE not in cloud.said(VM)
    second = make_program()
    await fake.until(lambda: Said.GONE in cloud.said(VM), "gone")
    assert second.starts() == [f"{VM} 1"]
    assert [path.name for path in (second.folder / "vms").iterdir()] == ["journal.log"]


async def test_sigterm_ends_the_agent_with_0_and_no_vm(cloud: fake.Controller, make_program: MakeProgram) -> None:
    first = make_program()
    cloud.want(RUN, VM)
    await fake.until(lambda: Said.BOOTED in cloud.said(VM), "booted")
    first.kill(signal.SIGTERM)
    assert await first.ended() == 0
    make_program()
    await fake.until(lambda: cloud.said(VM).count(Said.BOOTED) == 2, "adopted")
    await destroyed(cloud)


async def test_an_agent_frozen_with_a_launch_in_hand_does_not_use_it_after_its_lease(
    cloud: fake.Controller, make_program: MakeProgram
) -> None:
    """Safety S8: it wakes up, asks again, and the placement was given to another node meanwhile."""
    cloud.ttl_s = 6.0
    frozen = make_program("agent.granted=stop")
    cloud.want(RUN, VM)
    await fake.until(lambda: cloud.granted and frozen.stopped, "launch granted, and frozen with it in hand")
    await asyncio.sleep(1.5)  # the lease the agent believes in is one second long
    cloud.deny.add(VM)
    asked = len(cloud.launches)
    frozen.kill(signal.SIGCONT)
    await fake.until(lambda: len(cloud.launches) > asked, "it asked again")
    await destroyed(cloud)
    assert frozen.starts() == []
    assert Said.BOOTED not in cloud.said(VM)


async def test_an_agent_frozen_while_another_life_took_over_starts_nothing(
    cloud: fake.Controller, make_program: MakeProgram
) -> None:
    """Safety S7: its launch was of a session that is no more."""
    cloud.ttl_s = 6.0
    frozen = make_program("agent.granted=stop")
    cloud.want(RUN, VM)
    await fake.until(lambda: cloud.granted and frozen.stopped, "launch granted, and frozen with it in hand")
    await asyncio.sleep(1.5)
    cloud.counter, cloud.secret = cloud.counter + 1, "another life's"
    joins = len(cloud.joins)
    frozen.kill(signal.SIGCONT)
    await fake.until(lambda: len(cloud.joins) > joins, "it found its session stale")
    assert frozen.starts() == []
