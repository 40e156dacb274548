"""What a fleet costs that has nothing to do: `python -m bench.idle --nodes 5000 --controllers 3`.

Real processes on one machine (bench/cloud.py); many synthetic nodes share each agent process. All nodes join at once,
then nothing is asked of the cloud for a minute (each node says its word once in that time), and then single instances
are started beside the idle fleet:

1. seconds until every node has joined, and how many of their sessions ended since (0: no lease ran out);
2. raft proposals a second, of the member that counts most; processor time and memory of each process;
3. from POST to Started, of single instances.

With `--standing` so many more nodes stand in the store, with a lease of their own and nobody who asks for them: what
the controllers spend on nodes as such, apart from their messages, on a machine that could not play them all.
"""

import argparse
import asyncio
import json
import time
import urllib.request
from dataclasses import asdict, dataclass, field
from typing import NamedTuple

from bench import cloud, shapes, starts
from covey.store import base, etcd, schema

LOOK_S = 0.5
BATCH = 20  # standing nodes in one transaction
GAP_S = 0.5  # between two starts, on average
SETTLE_S = 25.0  # what joining has started is over: words are said, polls are spread
_PROPOSALS = "etcd_server_proposals_applied_total"


class Process(NamedTuple):
    """What one process used while nothing happened: MiB, and percent of one core."""

    name: str
    rss_mb: float
    pss_mb: float
    core_percent: float


@dataclass
class Found:
    nodes: int
    joined_s: float = 0.0
    lost_sessions: int = 0
    fewest_alive: int = 0
    proposals_per_s: float = 0.0
    processes: list[Process] = field(default_factory=list)
    started: shapes.Row | None = None


class NotJoined(Exception):
    """The fleet did not come together in time."""


async def alive(store: etcd.Etcd) -> int:
    """How many nodes have a lease."""
    return (await store.range(schema.ALIVE, base.prefix_end(schema.ALIVE), count_only=True)).total


async def joined(running: cloud.Cloud, store: etcd.Etcd, nodes: int, limit_s: float) -> float:
    """Seconds until all nodes are there."""
    begun = time.monotonic()
    while (there := await alive(store)) < nodes:
        if time.monotonic() - begun > limit_s:
            raise NotJoined(f"{there} of {nodes} nodes after {limit_s:.0f} s:\n{running.tail('controller 1')}")
        await asyncio.sleep(LOOK_S)
    return time.monotonic() - begun


async def stand(store: etcd.Etcd, count: int) -> None:
    """Put so many copies of a node that is there into the store."""
    lease = await store.grant(3600)
    values: dict[str, bytes] = {}
    for prefix in (schema.NODES, schema.SESSIONS, schema.LEDGERS, schema.WORDS):
        page = await store.range(prefix, base.prefix_end(prefix), limit=1)
        values[prefix] = page.kvs[0].value
    old = schema.tail(page.kvs[0].key)
    alive = schema.encode(schema.Alive(session=1))
    for begin in range(0, count, BATCH):
        puts: list[base.Op] = []
        for number in range(begin, min(begin + BATCH, count)):
            id = f"00000000-0000-4000-8000-{number:012d}"
            puts += [
                base.Put(prefix + id, value.replace(old.encode(), id.encode())) for prefix, value in values.items()
            ]
            puts.append(base.Put(schema.alive(id), alive, lease.id))
        await store.commit(base.Txn((), tuple(puts)))


def proposals(running: cloud.Cloud) -> float:
    """Raft proposals applied so far."""
    counts: list[float] = []
    for member in running.members.members:
        with urllib.request.urlopen(f"http://127.0.0.1:{member.health_port}/metrics", timeout=10) as answer:
            lines = answer.read().decode().splitlines()
        counts += [float(line.split()[1]) for line in lines if line.startswith(_PROPOSALS + " ")]
    return max(counts)


def joins(running: cloud.Cloud) -> int:
    """How many sessions the controllers have begun."""
    names = [name for name in running.processes if name.startswith("controller")]
    return sum((running.directory / f"{name}.log").read_text(errors="replace").count("a node joined") for name in names)


async def still(running: cloud.Cloud, store: etcd.Etcd, found: Found, seconds: float, standing: int) -> None:
    """Nothing is asked of the cloud."""
    pids, sessions, applied = running.pids(), joins(running), proposals(running)
    before = {name: cloud.cpu_s(pid) for name, pid in pids.items()}
    begun = time.monotonic()
    found.fewest_alive = found.nodes
    while time.monotonic() - begun < seconds:
        await asyncio.sleep(5)
        found.fewest_alive = min(found.fewest_alive, await alive(store) - standing)
    took_s = time.monotonic() - begun
    found.proposals_per_s = (proposals(running) - applied) / took_s
    found.processes = [
        Process(name, *cloud.memory_mb(pid), (cloud.cpu_s(pid) - before[name]) / took_s * 100)
        for name, pid in pids.items()
    ]
    found.lost_sessions = joins(running) - sessions


async def measure(options: argparse.Namespace) -> Found:
    found = Found(options.nodes)
    with cloud.running(nodes=0, members=options.members, controllers=options.controllers) as running:
        async with starts.opened(running) as (store, api, watcher):
            share, more = divmod(options.nodes, options.processes)
            for number in range(options.processes):
                cloud.start_nodes(running, f"nodes {number + 1}", share + (number < more))
            found.joined_s = await joined(running, store, options.nodes, options.limit)
            await stand(store, options.standing)
            print(f"{options.nodes} nodes have joined after {found.joined_s:.1f} s", flush=True)
            await asyncio.sleep(SETTLE_S)
            await still(running, store, found, options.seconds, options.standing)
            if not options.standing:  # nobody would start anything there
                found.started = await shapes.isolated(shapes.Lives(api, watcher), options.singles, GAP_S)
        for name in running.processes:
            if options.keep_logs and not name.startswith("etcd"):
                print(f"---- {name}\n{running.tail(name)}")
    return found


def show(options: argparse.Namespace, found: Found) -> None:
    servers = f"{options.controllers} controller(s), {options.members} etcd member(s)"
    print(f"\nIdle, {found.nodes} nodes and {options.standing} standing, {servers}")
    print(f"joined in {found.joined_s:.1f} s; sessions that ended since: {found.lost_sessions}")
    print(f"fewest leases at once: {found.fewest_alive}; raft proposals a second: {found.proposals_per_s:.1f}")
    print(f"{'process':<16}{'RSS MiB':>9}{'PSS MiB':>9}{'% core':>8}")
    for name, rss, pss, cpu in found.processes:
        print(f"{name:<16}{rss:>9.1f}{pss:>9.1f}{cpu:>8.1f}")
    if found.started is not None:
        print(f"single starts, median / p95 ms: {found.started.p50_ms:.0f} / {found.started.p95_ms:.0f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--nodes", type=int, default=5000)
    parser.add_argument("--standing", type=int, default=0, help="more nodes, that send nothing")
    parser.add_argument("--controllers", type=int, default=3)
    parser.add_argument("--members", type=int, default=1, choices=(1, 3), help="of etcd")
    parser.add_argument("--processes", type=int, default=2, help="that play the nodes")
    parser.add_argument("--seconds", type=float, default=60, help="of idleness measured")
    parser.add_argument("--singles", type=int, default=20, help="starts beside it")
    parser.add_argument("--limit", type=float, default=300, help="seconds for joining")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--keep-logs", action="store_true", help="print the end of each log")
    options = parser.parse_args()
    found = asyncio.run(measure(options))
    if options.json:
        print(json.dumps(asdict(found)))
    else:
        show(options, found)


if __name__ == "__main__":
    main()
