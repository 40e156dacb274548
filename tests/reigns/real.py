"""Random histories of real registries and a real etcd, each on a host of its own, from a seed.

    python -m tests.reigns.real --histories 20                    # as root: hosts are namespaces of the kernel
    python -m tests.reigns.real --loopback --histories 20         # without them; servers are cut off by proxies

Three servers, and clients that push, delete, take back and read throughout (`clients`). Meanwhile servers are killed
and frozen at any moment (past the end of their lease, until another one has taken over, in the middle of a push), hosts
lose their power, networks are cut, also in one direction only, packets get lost, and somebody promotes. The verdict
(`verdict`): old tag or new tag, nothing acknowledged lost, no number twice, what was deleted stays so, never a wrong
byte; and in the end all logs are alike, and everything can be read through each server.
"""

import argparse
import asyncio
import contextlib
import random
import shutil
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path
from typing import Any

import aiohttp

from tests.reigns import clients, verdict
from tests.support import etcd, fleet, lab_fleet

STORM_S = 20.0
CALM_S = 200.0
_TAKEOVER_S = 30.0
_POINTS = (
    "",
    "registry.entry.accepted=kill",
    "registry.entry.unaccepted=stop",
    "registry.entry.linked=kill",
    "registry.fetch.whole=kill",
    "registry.role.taken=kill",
)

Say = Callable[[str], None]


def quiet(_: str) -> None:
    return


class History:
    """Of servers that run. `stage`: their hosts; None: there are none, all are on loopback."""

    def __init__(
        self,
        seed: int,
        members: list[fleet.Member],
        stage: lab_fleet.Fleet | None,
        say: Say = quiet,
        *,
        storm_s: float = STORM_S,
    ) -> None:
        self.chance = random.Random(seed)
        self.members = members
        self.stage = stage
        self.say = say
        self.storm_s = storm_s
        self.armed: set[int] = set()  # servers of which some process will be killed, or stopped, at some point
        self.clients = clients.Clients(members, self.chance, say)

    async def run(self) -> None:
        await fleet.holder(self.members)
        await self.clients.begin()
        try:
            await asyncio.gather(*(self.storm(kind) for kind in self.troubles()))
            self.say("calm")
            await self.all_is_well()
            await self.clients.end()
            await self.settled()
        finally:
            await self.clients.stop()
        for member in self.members:
            await member.terminate()
        self.judge()

    # ---- what goes wrong -------------------------------------------------------------------------------------------

    def troubles(self) -> list[list[Callable[[], Coroutine[Any, Any, None]]]]:
        """Kinds of it that happen at once, and what may happen of each."""
        of_processes = [self.kill, self.kill, self.freeze, self.freeze_past_a_takeover, self.promote]
        if self.stage is None:
            return [[*of_processes, self.cut_off]]
        return [[*of_processes, self.lose_power], [self.cut_off, self.cut_one, self.lose_packets]]

    async def storm(self, kinds: list[Callable[[], Coroutine[Any, Any, None]]]) -> None:
        end_s = time.monotonic() + self.storm_s
        while time.monotonic() < end_s:
            await asyncio.sleep(self.chance.uniform(0.5, 3.0))
            await self.chance.choice(kinds)()
            self.clients.check()

    async def victim(self) -> fleet.Member:
        """The holder more often than others."""
        if self.chance.random() < 0.7:
            for member in self.members:
                if await member.holds():
                    return member
        return self.chance.choice(self.members)

    def while_s(self) -> float:
        """How long something lasts: a moment, some seconds, or longer than a lease."""
        return self.chance.choice((1.0, 4.0, 13.0))

    async def kill(self) -> None:
        member = await self.victim()
        self.say(f"kill {member.number}")
        await member.kill()
        await asyncio.sleep(self.chance.choice((0.0, 3.0, 12.0)))
        await self.start(member, self.chance.choice(_POINTS))

    async def start(self, member: fleet.Member, point: str) -> None:
        self.say(f"start {member.number} {point}")
        self.armed.discard(member.number)
        if point:
            self.armed.add(member.number)
        await member.launch(failpoints=point)

    async def freeze(self) -> None:
        member = await self.victim()
        self.say(f"freeze {member.number}")
        member.freeze()
        await asyncio.sleep(self.while_s())
        self.say(f"thaw {member.number}")
        member.thaw()

    async def freeze_past_a_takeover(self) -> None:
        member = await self.victim()
        self.say(f"freeze {member.number} until another one has taken over")
        member.freeze()
        end_s = time.monotonic() + _TAKEOVER_S
        others = [one for one in self.members if one is not member]
        while time.monotonic() < end_s and not any([await one.holds() for one in others]):
            await asyncio.sleep(0.1)
        await asyncio.sleep(self.chance.uniform(0.0, 2.0))
        self.say(f"thaw {member.number}")
        member.thaw()

    async def promote(self) -> None:
        member = self.chance.choice(self.members)
        self.say(f"promote {member.number}")
        try:
            async with asyncio.timeout(10):
                self.say(f"promoted: {await member.promote()}")
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            self.say(f"promoted: {error!r}")

    async def lose_power(self) -> None:
        assert self.stage is not None
        member = await self.victim()
        self.say(f"power off {member.number}")
        await self.stage.crash(member)
        await asyncio.sleep(self.while_s())
        self.stage.boot(member)
        await self.start(member, "")

    async def cut_off(self) -> None:
        """From everybody."""
        member = await self.victim()
        self.say(f"cut {member.number} off")
        await member.cut()
        await asyncio.sleep(self.while_s())
        self.say("heal")
        await member.heal()

    async def cut_one(self) -> None:
        """From one other host, perhaps in one direction only."""
        assert self.stage is not None
        hosts = [lab_fleet.host_of(await self.victim())]
        hosts.append(self.chance.choice([name for name in self.stage.lab.hosts if name not in (*hosts, "load")]))
        self.chance.shuffle(hosts)
        one_way = self.chance.random() < 0.6
        self.say(f"cut {hosts[0]} {'→' if one_way else '↔'} {hosts[1]}")
        self.stage.lab.cut(*hosts, one_way=one_way)
        await asyncio.sleep(self.while_s())
        self.say("heal")
        self.stage.lab.heal()

    async def lose_packets(self) -> None:
        assert self.stage is not None
        host = lab_fleet.host_of(await self.victim())
        percent = self.chance.choice((10, 40))
        self.say(f"{percent} % of the packets of {host} are lost")
        for other in self.stage.lab.hosts:
            if other not in (host, "load"):
                self.stage.lab.loss(host, other, percent)
        await asyncio.sleep(self.while_s())
        self.say("heal")
        self.stage.lab.heal()

    # ---- the end ---------------------------------------------------------------------------------------------------

    async def all_is_well(self) -> None:
        for member in self.members:
            await member.heal()
            if self.stage is not None:
                self.stage.boot(member)
            member.thaw()
            if member.number in self.armed:
                await member.kill()
            if not member.running:
                await member.start()

    async def settled(self) -> None:
        """Until all have the same, and all of it, once something more was pushed."""
        end_s = time.monotonic() + CALM_S
        ended = False
        while time.monotonic() < end_s:
            if not ended:
                wish = verdict.Done(clients.ONE, "the-end", "the end")
                ended = await self.clients.attempt(wish, self.chance.choice(self.members))
            if ended and self.alike() and await self.clients.all_can_be_read(self.logs(clients.ONE)[0]):
                return
            await asyncio.sleep(0.3)
        counts = {name: [len(log) for log in self.logs(name)] for name in (clients.ONE, clients.TWO)}
        views = [await member.says() for member in self.members]
        raise verdict.Wrong(f"it does not settle: {counts} {views}")

    def logs(self, name: str) -> list[list[bytes]]:
        return [member.entries(name) for member in self.members]

    def alike(self) -> bool:
        return all(log == self.logs(name)[0] for name in (clients.ONE, clients.TWO) for log in self.logs(name))

    def judge(self) -> None:
        aside = {
            member.known_as: {str(path): [b""] for path in member.base.rglob("_aside.*")} for member in self.members
        }
        final = {name: self.logs(name)[0] for name in (clients.ONE, clients.TWO)}
        done = [one for one in self.clients.done if one.repository == clients.ONE]
        verdict.judge(final, aside, done, with_etcd=True, forced=False)
        verdict.in_order(final[clients.TWO], self.clients.steps)

    @property
    def figures(self) -> str:
        acknowledged = len(self.clients.done) + len(self.clients.steps)
        return f"{self.clients.tried} pushed, {acknowledged} changes acknowledged, {self.clients.reads} tags read"


@contextlib.asynccontextmanager
async def staged(
    seed: int, folder: Path, say: Say = quiet, *, storm_s: float = STORM_S, loopback: bool = False
) -> AsyncIterator[History]:
    """A history whose servers are there. Half of the sets have etcd on their own hosts, others on one of its own."""
    chance = random.Random(f"stage {seed}")
    workers = chance.choice(("1", "1", "2"))
    if loopback:
        with etcd.running() as cluster:
            async with fleet.running(folder, 3, cluster.endpoints, REGISTRY_WORKERS=workers) as members:
                yield History(seed, members, None, say, storm_s=storm_s)
        return
    etcd_hosts = chance.choice((("e1",), ("r0", "r1", "r2")))
    say(f"etcd on {etcd_hosts}, {workers} processes a server")
    async with lab_fleet.running(folder, 3, etcd_hosts=etcd_hosts, REGISTRY_WORKERS=workers) as stage:
        yield History(seed, stage.members, stage, say, storm_s=storm_s)


async def play(seed: int, folder: Path, say: Say = quiet, *, storm_s: float = STORM_S, loopback: bool = False) -> str:
    """What happened, in figures. Raises Wrong."""
    async with staged(seed, folder, say, storm_s=storm_s, loopback=loopback) as history:
        await history.run()
        return history.figures


def _say(text: str) -> None:
    sys.stdout.write(f"{time.strftime('%H:%M:%S')} {text}\n")
    sys.stdout.flush()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--histories", type=int, default=20)
    parser.add_argument("--first", type=int, default=1, help="the first seed")
    parser.add_argument("--storm-s", type=float, default=STORM_S, help="how long things go wrong")
    parser.add_argument("--loopback", action="store_true", help="without namespaces")
    parser.add_argument("-v", action="store_true", help="tell what happens")
    options = parser.parse_args()
    wrong = 0
    for seed in range(options.first, options.first + options.histories):
        folder = Path(tempfile.mkdtemp(prefix="covey-reigns-", dir="/var/tmp"))
        say = _say if options.v else quiet
        work = play(seed, folder, say, storm_s=options.storm_s, loopback=options.loopback)
        try:
            _say(f"seed {seed}: {asyncio.run(work)}")
        except verdict.Wrong as error:
            wrong += 1
            _say(f"seed {seed} ({folder} is kept): {error}")
            continue
        shutil.rmtree(folder)
    _say(f"{options.histories} histories from seed {options.first}: {wrong} wrong")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
