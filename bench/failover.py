"""How soon nodes are served again when one of three controllers dies or freezes: `python -m bench.failover --nodes 60`.

Real controllers on a real etcd, no balancer: each node is given all three URLs and chooses by itself. The agents run in
this process over synthetic VMs, so that their traffic can be watched: a node counts as served from the moment when a
controller that lives answers it, or has its poll; a poll that a live controller does not answer in the end would show
as a fault. Told apart are nodes that have something to say just then, and idle ones: those notice a frozen controller
only when their next heartbeat (every 5 s) has no answer.
"""

import argparse
import asyncio
import contextlib
import json
import os
import signal
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from bench import cloud
from covey import observe, wire, world
from covey.agent import agent, synthetic
from covey.client import http

BACK_S = 35.0  # from a controller's return until nodes are spread as before


@dataclass
class Watched:
    """An Exchange that notes when its node was last served, and where."""

    sockets: http.Sockets
    dead: set[str]
    served_s: float = 0.0  # first time since `watch`
    at: str = ""  # the controller that has the poll
    faults: list[str] = field(default_factory=list)

    def watch(self) -> None:
        self.served_s = 0.0

    async def send(
        self, url: str, method: str, path: str, data: bytes | None, headers: Mapping[str, str], timeout_s: float
    ) -> http.Reply:
        poll = path.endswith("/wanted")
        if poll:
            self.at = url
            if url not in self.dead:
                self._served()
        reply = await self.sockets.send(url, method, path, data, headers, timeout_s)
        if path != "/readyz" and reply.status == 200:
            self._served()
        elif reply.status != 200:
            self.faults.append(f"{path}: HTTP {reply.status}")
        return reply

    def _served(self) -> None:
        self.served_s = self.served_s or asyncio.get_running_loop().time()


class Node:
    """One agent whose traffic is watched."""

    def __init__(self, urls: Sequence[str], sockets: http.Sockets, dead: set[str], number: int) -> None:
        clock = world.System()
        self.net = Watched(sockets, dead)
        self.endpoints = http.Endpoints(urls, salt=clock.token(), exchange=self.net)
        config = agent.Config(name=f"watched-{number:03}")
        driver = synthetic.Synthetic(clock, synthetic.Knobs(), root=None, wake=lambda: None)
        self.agent = agent.Agent(config, clock, driver, synthetic.Images(0.0), self.endpoints)

    async def say(self) -> None:
        """Something, just now."""
        standing = self.agent.session
        with contextlib.suppress(Exception):
            report = wire.Report(seen=standing.seen, messages=standing.count())
            await standing.call("report", wire.Reported, report)


@dataclass(frozen=True)
class Row:
    what: str
    nodes: int
    median_s: float
    p95_s: float
    worst_s: float


def row(what: str, took: Sequence[float]) -> Row:
    ordered = sorted(took)
    p95 = ordered[min(len(ordered) - 1, int(0.95 * len(ordered)))]
    return Row(what, len(ordered), round(statistics.median(ordered), 3), round(p95, 3), round(ordered[-1], 3))


async def hurt(running: cloud.Cloud, nodes: Sequence[Node], dead: set[str], number: int, *, kill: bool) -> list[Row]:
    """One controller dies or freezes; when were the nodes that it served are served again?"""
    url, process = running.controllers[number - 1], running.processes[f"controller {number}"]
    loop = asyncio.get_running_loop()
    hit = [node for node in nodes if node.net.at == url]
    dead.add(url)
    for node in hit:
        node.net.watch()
    os.kill(process.pid, signal.SIGKILL if kill else signal.SIGSTOP)
    began_s = loop.time()
    talking = hit[::2]
    said = [asyncio.create_task(node.say()) for node in talking]
    async with asyncio.timeout(60):
        while not all(node.net.served_s for node in hit):
            await asyncio.sleep(0.02)
    await asyncio.gather(*said)
    what = "kill -9" if kill else "SIGSTOP"
    rows = [
        row(f"{what}, something to say", [node.net.served_s - began_s for node in talking]),
        row(f"{what}, idle", [node.net.served_s - began_s for node in hit[1::2]]),
    ]
    if not kill:
        os.kill(process.pid, signal.SIGCONT)
        dead.discard(url)
    return rows


def spread(nodes: Sequence[Node]) -> list[int]:
    return sorted(Counter(node.net.at for node in nodes).values())


async def measure(running: cloud.Cloud, count: int) -> None:
    sockets, dead = http.Sockets(), set[str]()
    nodes = [Node(running.controllers, sockets, dead, number) for number in range(count)]
    tasks = [asyncio.create_task(node.agent.run()) for node in nodes]
    rows: list[Row] = []
    try:
        async with asyncio.timeout(60):
            while not all(node.agent.session.may_act and node.net.at for node in nodes):
                await asyncio.sleep(0.1)
        await asyncio.sleep(8)  # parked everywhere, heartbeats spread
        print("nodes per controller", spread(nodes), flush=True)
        rows += await hurt(running, nodes, dead, 1, kill=False)
        print("after SIGSTOP       ", spread(nodes), flush=True)
        await asyncio.sleep(BACK_S)
        print("some time after CONT", spread(nodes), flush=True)
        rows += await hurt(running, nodes, dead, 2, kill=True)
        await asyncio.sleep(12)  # every poll that was parked then has been answered
        print("after kill -9       ", spread(nodes), flush=True)
        print("faults", dict(Counter(fault for node in nodes for fault in node.net.faults)))
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for node in nodes:
            await node.endpoints.close()
        await sockets.close()
    print(f"{'seconds until served again':32} nodes  median     p95   worst")
    for one in rows:
        print(f"{one.what:32} {one.nodes:5} {one.median_s:7.3f} {one.p95_s:7.3f} {one.worst_s:7.3f}")
    print(json.dumps([vars(one) for one in rows]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--nodes", type=int, default=60)
    chosen = parser.parse_args()
    observe.configure(json=None, level="warning")
    with cloud.running(nodes=1, controllers=3) as running:
        asyncio.run(measure(running, chosen.nodes))


if __name__ == "__main__":
    main()
