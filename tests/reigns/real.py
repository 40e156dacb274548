"""Random histories with real processes and a real etcd: `python -m tests.reigns.real --histories 20`.

Three servers, three clients. Holders and others are killed, frozen past the end of their lease and woken up, cut off
from peers and etcd and healed, promoted. The verdict is that of the histories in memory.
"""

import argparse
import asyncio
import random
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import aiohttp

from covey.client import oci
from tests.reigns import verdict
from tests.support import etcd, fleet, registry

TEMPLATE = "templates/7a3f5f5e-6d0c-4b87-9c15-3f1f2a3b4c5d"
CONFIG = registry.template_config()
STORM_S = 20.0
CALM_S = 200.0
CLIENTS = 3


class History:
    def __init__(
        self,
        seed: int,
        folder: Path,
        cluster: etcd.Cluster,
        say: Callable[[str], None] = lambda _: None,
        *,
        storm_s: float = STORM_S,
    ) -> None:
        self.chance = random.Random(seed)
        self.folder = folder
        self.cluster = cluster
        self.say = say
        self.storm_s = storm_s
        self.stormy = True
        self.done: list[verdict.Done] = []
        self.tried = 0

    async def run(self) -> None:
        workers = self.chance.choice(("1", "1", "2"))
        async with fleet.running(self.folder, 3, self.cluster.endpoints, REGISTRY_WORKERS=workers) as members:
            self.members = members
            await fleet.holder(members)
            kept = verdict.Done(TEMPLATE, "kept", "kept")
            while not await self.attempt(kept, self.chance.choice(members)):
                await asyncio.sleep(0.2)
            clients = [asyncio.create_task(self.client(number)) for number in range(CLIENTS)]
            try:
                await self.storm()
                self.say("calm")
            finally:
                self.stormy = False
            for member in members:
                member.thaw()
                await member.heal()
                if member.child is None or member.child.returncode is not None:
                    await member.start()
            await asyncio.gather(*clients)
            await self.settled()
            for member in members:
                await member.terminate()
            self.judge()

    # ---- what goes wrong -------------------------------------------------------------------------------------------

    async def storm(self) -> None:
        end_s = time.monotonic() + self.storm_s
        trouble = [self.kill, self.freeze, self.cut, self.promote]
        while time.monotonic() < end_s:
            await asyncio.sleep(self.chance.uniform(0.5, 3.0))
            await self.chance.choice(trouble)(await self.victim())

    async def victim(self) -> fleet.Member:
        """The holder more often than others."""
        if self.chance.random() < 0.7:
            for member in self.members:
                if await member.holds():
                    return member
        return self.chance.choice(self.members)

    async def kill(self, member: fleet.Member) -> None:
        self.say(f"kill {member.number}")
        await member.kill()
        await asyncio.sleep(self.chance.choice((0.0, 3.0, 12.0)))
        point = self.chance.choice(("", "", "registry.entry.accepted=kill", "registry.role.taken=kill"))
        await (member.launch(failpoints=point) if point else member.start())
        self.say(f"started {member.number} {point}")

    async def freeze(self, member: fleet.Member) -> None:
        self.say(f"freeze {member.number}")
        member.freeze()
        await asyncio.sleep(self.chance.choice((1.0, 4.0, 13.0)))
        self.say(f"thaw {member.number}")
        member.thaw()

    async def cut(self, member: fleet.Member) -> None:
        self.say(f"cut {member.number}")
        await member.cut()
        await asyncio.sleep(self.chance.choice((1.0, 4.0, 13.0)))
        self.say(f"heal {member.number}")
        await member.heal()

    async def promote(self, member: fleet.Member) -> None:
        member = self.chance.choice(self.members)
        self.say(f"promote {member.number}")
        try:
            async with asyncio.timeout(10):
                self.say(f"promoted: {await member.promote()}")
        except (aiohttp.ClientError, TimeoutError) as error:
            self.say(f"promoted: {error!r}")

    # ---- clients ---------------------------------------------------------------------------------------------------

    async def client(self, number: int) -> None:
        while self.stormy:
            await asyncio.sleep(self.chance.uniform(0.0, 0.8))
            self.tried += 1
            tag = f"c{number}-{self.chance.randrange(2)}"
            layer = "" if self.chance.random() < 0.2 else f"layer {number} {self.tried}"
            wish = verdict.Done(TEMPLATE, tag, layer)
            for _ in range(self.chance.choice((1, 2, 5))):
                if await self.attempt(wish, self.chance.choice(self.members)):
                    break
                await asyncio.sleep(self.chance.uniform(0.1, 1.0))

    async def attempt(self, wish: verdict.Done, member: fleet.Member) -> bool:
        """Whether it was acknowledged, or there is nothing to delete."""
        try:
            async with asyncio.timeout(20):
                if not wish.digest:
                    return await self.delete(wish, member)
                return await self.push(wish, member)
        except (aiohttp.ClientError, TimeoutError):
            return False

    async def push(self, wish: verdict.Done, member: fleet.Member) -> bool:
        layer = wish.digest.encode()
        manifest = registry.template_manifest(CONFIG, layer, name="one", tag=wish.tag)
        for content in (CONFIG, layer):
            path = f"/v2/{TEMPLATE}/blobs/uploads/?digest={oci.digest_of(content)}"
            status, _, answer = await member.call("POST", path, content)
            if status != 201:
                self.check(status, answer, (503,))
                return False
        more = {"Covey_Force": "true"}
        status, headers, answer = await member.put_manifest(TEMPLATE, wish.tag, manifest, **more)
        if status != 201:
            self.check(status, answer, (404, 503))  # 404: the blobs went to the one that held the role before
            return False
        number = int(headers[oci.VERSION_HEADER])
        self.say(f"acknowledged {wish.tag} as {number} through {member.number}")
        self.done.append(verdict.Done(TEMPLATE, wish.tag, oci.digest_of(manifest), number))
        return True

    async def delete(self, wish: verdict.Done, member: fleet.Member) -> bool:
        status, _, answer = await member.call("DELETE", f"/v2/{TEMPLATE}/manifests/{wish.tag}")
        self.check(status, answer, (202, 404, 503))
        if status == 202:
            self.say(f"acknowledged the end of {wish.tag} through {member.number}")
            self.done.append(verdict.Done(TEMPLATE, wish.tag, ""))
        return status != 503

    def check(self, status: int, answer: bytes, fine: tuple[int, ...]) -> None:
        if status not in fine:
            raise verdict.Wrong(f"HTTP {status}: {answer.decode()[:300]}")

    # ---- the end ---------------------------------------------------------------------------------------------------

    async def settled(self) -> None:
        end_s = time.monotonic() + CALM_S
        ended = False
        while time.monotonic() < end_s:
            logs = [member.entries(TEMPLATE) for member in self.members]
            for member in self.members:  # a failpoint may have had it killed
                if member.child is not None and member.child.returncode is not None:
                    await member.start()
            if ended and logs[0] == logs[1] == logs[2]:
                return
            if not ended:
                ended = await self.attempt(verdict.Done(TEMPLATE, "the-end", "the end"), self.members[0])
            await asyncio.sleep(0.3)
        counts = [len(member.entries(TEMPLATE)) for member in self.members]
        views = [await member.says() for member in self.members]
        raise verdict.Wrong(f"it does not settle: {counts} {views}")

    def judge(self) -> None:
        aside = {
            member.known_as: {str(path): [b""] for path in member.base.rglob("_aside.*")} for member in self.members
        }
        verdict.judge({TEMPLATE: self.members[0].entries(TEMPLATE)}, aside, self.done, with_etcd=True, forced=False)


def _say(text: str) -> None:
    sys.stdout.write(f"{time.strftime('%H:%M:%S')} {text}\n")
    sys.stdout.flush()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--histories", type=int, default=20)
    parser.add_argument("--first", type=int, default=1, help="the first seed")
    parser.add_argument("-v", action="store_true", help="tell what happens")
    options = parser.parse_args()
    wrong = changes = 0
    for seed in range(options.first, options.first + options.histories):
        with etcd.running() as cluster, tempfile.TemporaryDirectory(prefix="covey-reigns-", dir="/var/tmp") as folder:
            history = History(seed, Path(folder), cluster, _say if options.v else lambda _: None)
            try:
                asyncio.run(history.run())
            except verdict.Wrong as error:
                wrong += 1
                _say(f"seed {seed}: {error}")
            changes += len(history.done)
            _say(f"seed {seed}: {history.tried} tried, {len(history.done)} acknowledged")
    _say(f"{options.histories} histories from seed {options.first}, {changes} changes acknowledged: {wrong} wrong")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
