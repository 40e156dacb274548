"""Start scripts in a real guest: exit codes, time-outs, stray children, much output, dying guest agents (S5, S26).

One VM serves all tests of this module; each test finds it as a restarted agent would. `Qemu.run` runs one script per
VM, so the tests that need more of them use the same jobs one floor below.
"""

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from covey import model
from covey.agent import guest as guest_agent
from covey.agent import hypervisor, qemu_disk, tail
from tests.support import guest


@dataclass
class Machine:
    """A VM that is up, and a folder on the host."""

    host: guest.Host
    plan: hypervisor.Plan
    folder: Path

    @contextlib.contextmanager
    def talk(self) -> Iterator[guest_agent.Guest]:
        """The guest agent takes one client at a time."""
        place = qemu_disk.Place(self.host.root, self.plan.instance, self.plan.epoch)
        inside = guest_agent.Guest(place.guest, place.user)
        try:
            yield inside
        finally:
            inside.close()

    def out(self, name: str) -> bytes:
        return (self.folder / f"{name}.out").read_bytes()

    def follow(self, inside: guest_agent.Guest, directory: str, timeout_s: float = 60) -> Awaitable[int | None]:
        name = directory.rpartition("covey-")[2]
        files = (self.folder / f"{name}.out", self.folder / f"{name}.err")
        return guest_agent.Follower(inside, directory, *files).wait(timeout_s)

    async def run(self, name: str, text: str, timeout_s: float = 60) -> int | None:
        with self.talk() as inside:
            return await self.follow(inside, await guest_agent.launch(inside, name, text), timeout_s)


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    with guest.host() as host:
        plan = host.plan()

        async def boot() -> None:
            async with host.hypervisor() as driver:
                await guest.boot(driver, plan)

        asyncio.run(boot())
        yield Machine(host, plan, tmp_path_factory.mktemp("jobs"))


async def test_exit_code_and_both_streams_and_once_only(machine: Machine) -> None:
    job = hypervisor.Job(text="echo ran >>/root/ran; cat /root/ran; echo trouble >&2; exit 3", timeout_s=60)
    once = hypervisor.JobResult(return_code=3, stdout=b"ran\n", stderr=b"trouble\n")
    async with machine.host.hypervisor() as driver:
        assert await driver.run(machine.plan.instance, 1, job) == once
    async with machine.host.hypervisor() as restarted:
        assert await restarted.run(machine.plan.instance, 1, job) == once  # followed again, not run again


async def test_a_hanging_script_is_killed_with_its_whole_group(machine: Machine) -> None:
    text = (
        "trap '' TERM; sleep 4321 & sh -c 'trap \"\" TERM; sleep 4321; sleep 4321' & echo begun; wait; wait; sleep 4321"
    )
    assert await machine.run("hang", text, timeout_s=5) is None
    assert machine.out("hang") == b"begun\n"
    with machine.talk() as inside:
        left = await inside.shell("ps | grep -c '[s]leep 4321'", "look")
    assert left.code == 1, "processes of the script are left in the guest"


async def test_a_background_child_that_keeps_stdout_open_does_not_hold_the_script(machine: Machine) -> None:
    begun = time.monotonic()
    assert await machine.run("background", "sleep 300 & echo done; exit 4") == 4
    assert machine.out("background") == b"done\n"
    assert time.monotonic() - begun < 200


async def test_twenty_megabytes_of_output_keep_the_last_sixteen(machine: Machine) -> None:
    line = "x" * 99
    text = f"yes {line} | head -n 200000; echo the end"
    assert await machine.run("much", text, timeout_s=250) == 0
    kept = machine.out("much")
    assert len(kept) == tail.KEPT_BYTES
    assert kept.endswith(f"{line}\n{line}\nthe end\n".encode())
    assert len(tail.last(machine.folder / "much.out")) == tail.SENT_BYTES
    await machine.run("tidy", "rm -rf /var/tmp/covey-much")


async def test_the_guest_agent_dies_in_the_middle(machine: Machine) -> None:
    text = "for i in 1 2 3 4 5 6; do echo $i; [ $i = 2 ] && killall -9 qemu-ga; sleep 0.5; done; exit 5"
    assert await machine.run("orphan", text) == 5
    assert machine.out("orphan") == b"1\n2\n3\n4\n5\n6\n"


async def test_output_arrives_while_the_script_runs(machine: Machine) -> None:
    text = "echo early; while [ ! -e /tmp/go ]; do sleep 0.1; done; echo late"

    async def early() -> bool:
        return machine.out("slow") == b"early\n"

    with machine.talk() as inside:
        following = asyncio.ensure_future(machine.follow(inside, await guest_agent.launch(inside, "slow", text)))
        await guest.until("the first line is on the host", early)
        await inside.shell("touch /tmp/go", "go")
        assert await following == 0
    assert machine.out("slow") == b"early\nlate\n"


async def test_a_killed_shell_is_an_interruption_not_a_time_out(machine: Machine) -> None:
    with machine.talk() as inside:
        directory = await guest_agent.launch(inside, "victim", "sleep 4322")
        following = asyncio.ensure_future(machine.follow(inside, directory))
        await inside.shell('while [ ! -e "$0/pid" ]; do :; done; kill -9 -$(cat "$0/pid")', directory)
        with pytest.raises(guest_agent.Interrupted, match="interrupted"):
            await following


async def test_the_first_line_chooses_the_interpreter(machine: Machine) -> None:
    assert await machine.run("awk", '#!/bin/awk -f\nBEGIN { print "awk says", 6 * 7; exit 9 }\n') == 9
    assert machine.out("awk") == b"awk says 42\n"
    assert await machine.run("none", "#!/bin/nothing\n") == 127


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("echo hi", ["/bin/sh"]),
        ("#!/bin/bash -e -u\n", ["/bin/bash", "-e -u"]),
        ("#! /usr/bin/env python3\n", ["/usr/bin/env", "python3"]),
        ("#!\n", ["/bin/sh"]),
    ],
)
def test_interpreter(text: str, words: list[str]) -> None:
    assert guest_agent.interpreter(text) == words


async def test_info_tells_all_and_the_guest_knows_itself(machine: Machine) -> None:
    async with machine.host.hypervisor() as driver:
        info = await driver.info(machine.plan.instance, 1)
    assert isinstance(info, model.VmInfo)
    assert (info.uuid, info.name, info.ip, info.host_ip) == (machine.plan.instance, "test-vm", "10.0.2.15", "127.0.0.1")
    assert (info.cpu_cores, info.ram_mb) == (1, 128)
    assert info.vnc_port >= 5900
    assert info.started_ns > 0
    seen = await asyncio.to_thread(guest.page, info)
    assert seen["instance"] == machine.plan.instance
    assert seen["hostname"] == "test-vm"
