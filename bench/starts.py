"""How fast instances start: `make bench`, or `make bench ARGS="--members 3 --nodes 100"`.

Real processes on one machine (bench/cloud.py); the hypervisor is the synthetic one with no boot time, so what is
measured is Covey and etcd. Three things, in one run, so that ratios between them mean something on a busy machine:

1. memory of each process with all nodes joined and nothing to do, and the processor time that idleness costs;
2. guarded transactions a second that this etcd gives to Covey's own store client and nothing else;
3. from POST to Started: one at a time, then in a closed loop in which each of C submitters starts an instance, waits
   until it is Started, terminates it, and starts the next.

Latency ends when a reader of etcd sees Started in the closed loop (so that looking costs the controller nothing), and
when the API shows it, asked every 2 ms, in the case of one at a time.
"""

import argparse
import asyncio
import contextlib
import dataclasses
import json
import statistics
import sys
import time
from collections.abc import AsyncIterator, Coroutine
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import aiohttp
import msgspec

from bench import cloud
from covey import world
from covey.store import base, etcd, schema

LOOK_S = 0.002
PATIENCE_S = 30.0


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the result: starts a second, and milliseconds."""

    what: str
    rate: float
    p50_ms: float
    p95_ms: float
    failed: int = 0
    cpu_ms: dict[str, float] = field(default_factory=dict)  # of each process, per start


class Idle(NamedTuple):
    """One process with nothing to do: MiB, and percent of one core."""

    name: str
    rss_mb: float
    pss_mb: float
    core_percent: float


class State(msgspec.Struct):
    """What the bench reads of a stored instance."""

    state: str = ""


@dataclass(slots=True)
class Watcher:
    """States of instances as etcd's watch tells them."""

    waiting: dict[tuple[str, str], asyncio.Future[float]] = field(default_factory=dict)
    seen: dict[tuple[str, str], float] = field(default_factory=dict)

    async def follow(self, store: etcd.Etcd, since: int) -> None:
        prefix = schema.INSTANCES
        async for batch in store.watch(prefix, base.prefix_end(prefix), since):
            now = time.perf_counter()
            for change in batch.changes:
                if change.kv is not None:
                    self._tell(schema.tail(change.key), msgspec.json.decode(change.kv.value, type=State).state, now)

    def _tell(self, id: str, state: str, now: float) -> None:
        self.seen.setdefault((id, state), now)
        future = self.waiting.pop((id, state), None)
        if future is not None and not future.done():
            future.set_result(now)

    async def wait_until(self, id: str, state: str) -> float:
        """When `id` reached `state`, on this process's clock."""
        if (id, state) in self.seen:
            return self.seen[id, state]
        future = self.waiting.setdefault((id, state), asyncio.get_running_loop().create_future())
        return await asyncio.wait_for(asyncio.shield(future), PATIENCE_S)


# ---- the API ---------------------------------------------------------------------------------------------------


class Api:
    """The few calls that the bench makes, straight and without retries."""

    def __init__(self, session: aiohttp.ClientSession, urls: list[str]) -> None:
        self._session = session
        self._urls = urls
        self._turn = 0

    def _url(self) -> str:
        self._turn += 1
        return self._urls[self._turn % len(self._urls)] + "/api/v1/vm"

    async def start(self, template: str) -> str:
        answer = await self._call("POST", {"vmid": template, "tag": "v1"})
        return str(answer[0])

    async def terminate(self, id: str) -> None:
        await self._call("DELETE", {"id": id})

    async def state(self, id: str) -> str:
        async with self._session.get(self._url(), params={"id": id}) as answer:
            body = (await answer.json(content_type=None)).get("body") or {}
        return str(body.get("instance_state", ""))

    async def _call(self, method: str, payload: dict[str, Any]) -> Any:
        async with self._session.request(method, self._url(), json=payload) as answer:
            envelope = await answer.json(content_type=None)
        if envelope["status"] != "OK":
            raise RuntimeError(f"{method}: {envelope['message']}")
        return envelope.get("body")


# ---- measurements ----------------------------------------------------------------------------------------------


async def raw_rate(store: etcd.Etcd, writers: int, seconds: float) -> float:
    """Guarded creates of 300 bytes a second, by `writers` at once through the store's group commit."""
    end = time.perf_counter() + seconds
    done = 0

    async def write(writer: int) -> None:
        nonlocal done
        number = 0
        while time.perf_counter() < end:
            key = f"/bench/{seconds}-{writer}-{number}"
            outcome = await store.commit(base.Txn((base.absent(key),), (base.Put(key, b"x" * 300),)))
            assert outcome.succeeded
            number += 1
            done += 1

    begun = time.perf_counter()
    await asyncio.gather(*(write(writer) for writer in range(writers)))
    rate = done / (time.perf_counter() - begun)
    await store.commit(base.Txn((), (base.Delete("/bench/", base.prefix_end("/bench/")),)))
    return rate


async def one_at_a_time(api: Api, watcher: Watcher, template: str, count: int) -> tuple[Row, int]:
    """POST, then GET every 2 ms until it says Started; nothing else happens meanwhile."""
    times = []
    begun = time.perf_counter()
    for _ in range(count):
        started = time.perf_counter()
        id = await api.start(template)
        while await api.state(id) != "Started":
            if time.perf_counter() - started > PATIENCE_S:
                raise RuntimeError(f"instance {id} is not Started after {PATIENCE_S:.0f} s")
            await asyncio.sleep(LOOK_S)
        times.append(time.perf_counter() - started)
        await api.terminate(id)
        await watcher.wait_until(id, "Terminated")
    return row("one at a time, seen by API", times, time.perf_counter() - begun), len(times)


async def closed_loop(api: Api, watcher: Watcher, template: str, submitters: int, seconds: float) -> tuple[Row, int]:
    """Each submitter: POST, wait for Started, terminate, again."""
    times: list[float] = []
    failed = 0
    end = time.perf_counter() + seconds

    async def submit() -> None:
        nonlocal failed
        while time.perf_counter() < end:
            started = time.perf_counter()
            try:
                id = await api.start(template)
                times.append(await watcher.wait_until(id, "Started") - started)
                await api.terminate(id)
            except (TimeoutError, RuntimeError, aiohttp.ClientError):
                failed += 1

    begun = time.perf_counter()
    await asyncio.gather(*(submit() for _ in range(submitters)))
    return row(f"closed loop, {submitters} submitters", times, time.perf_counter() - begun, failed), len(times)


def row(what: str, times: list[float], took_s: float, failed: int = 0) -> Row:
    if len(times) < 2:
        return Row(what, len(times) / took_s, 0.0, 0.0, failed)
    cuts = statistics.quantiles(times, n=20)
    return Row(what, len(times) / took_s, statistics.median(times) * 1000, cuts[18] * 1000, failed)


def idle(running: cloud.Cloud, seconds: float) -> list[Idle]:
    """Each process while nothing is asked of the cloud."""
    pids = running.pids()
    before = {name: cloud.cpu_s(pid) for name, pid in pids.items()}
    time.sleep(seconds)
    return [
        Idle(name, *cloud.memory_mb(pid), (cloud.cpu_s(pid) - before[name]) / seconds * 100)
        for name, pid in pids.items()
    ]


# ---- the program -----------------------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def opened(running: cloud.Cloud) -> AsyncIterator[tuple[etcd.Etcd, Api, Watcher]]:
    store = etcd.Etcd(running.members.endpoints, world=world.System())
    watcher = Watcher()
    since = (await store.range(schema.FORMAT_KEY)).revision + 1
    following = asyncio.create_task(watcher.follow(store, since))
    try:
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
            yield store, Api(session, running.controllers), watcher
    finally:
        following.cancel()
        await asyncio.gather(following, return_exceptions=True)
        await store.close()


async def measure(running: cloud.Cloud, options: argparse.Namespace) -> tuple[float, list[Row]]:
    (template,) = (item["id"] for item in cloud.body(running.registry + "/registry/v2/vm") if item["name"] == "bench")
    async with opened(running) as (store, api, watcher):
        rows = [await weighed(running, one_at_a_time(api, watcher, template, options.singles))]
        for count in options.submitters:
            rows += [await weighed(running, closed_loop(api, watcher, template, count, options.seconds))]
        raw = await raw_rate(store, 128, options.seconds / 2)  # last: its garbage would slow etcd for the others
    return raw, rows


async def weighed(running: cloud.Cloud, work: Coroutine[Any, Any, tuple[Row, int]]) -> Row:
    """The row with the processor time that each process spent per start."""
    pids = running.pids()
    before = {name: cloud.cpu_s(pid) for name, pid in pids.items()}
    line, starts = await work
    spent = {name: (cloud.cpu_s(pid) - before[name]) * 1000 / max(starts, 1) for name, pid in pids.items()}
    return dataclasses.replace(line, cpu_ms=spent)


def show(options: argparse.Namespace, still: list[Idle], raw: float, rows: list[Row]) -> None:
    shape = f"{options.nodes} nodes, {options.controllers} controller(s), {options.members} etcd member(s)"
    print(f"\nIdle, {shape}")
    print(f"{'process':<16}{'RSS MiB':>9}{'PSS MiB':>9}{'% core':>8}")
    for name, rss, pss, cpu in still:
        print(f"{name:<16}{rss:>9.1f}{pss:>9.1f}{cpu:>8.1f}")
    print(f"\nGuarded transactions of this etcd, 128 writers at once: {raw:.0f} a second")
    print("\nFrom POST to Started, 0 ms boot")
    print(f"{'':<28}{'starts/s':>9}{'p50 ms':>9}{'p95 ms':>9}{'raw / it':>10}{'failed':>8}")
    for line in rows:
        share = f"{raw / line.rate:.0f}" if line.rate else "-"
        print(f"{line.what:<28}{line.rate:>9.1f}{line.p50_ms:>9.1f}{line.p95_ms:>9.1f}{share:>10}{line.failed:>8}")
    print("\nProcessor milliseconds per start")
    names = [name for name in rows[0].cpu_ms if name != "registry"]
    print(f"{'':<28}" + "".join(f"{name:>14}" for name in names))
    for line in rows:
        print(f"{line.what:<28}" + "".join(f"{line.cpu_ms[name]:>14.2f}" for name in names))


def main() -> int:
    parser = argparse.ArgumentParser(description="Measure how fast instances start.")
    parser.add_argument("--nodes", type=int, default=100)
    parser.add_argument("--controllers", type=int, default=1)
    parser.add_argument("--members", type=int, default=1, choices=(1, 3), help="etcd members")
    parser.add_argument("--submitters", type=int, nargs="+", default=[8, 32, 64])
    parser.add_argument("--seconds", type=float, default=10.0, help="length of each closed loop")
    parser.add_argument("--singles", type=int, default=50, help="starts one at a time")
    parser.add_argument("--quick", action="store_true", help="a few seconds, to see that it works")
    parser.add_argument("--json", type=Path, help="write the figures there too")
    options = parser.parse_args()
    if options.quick:
        options.nodes, options.submitters, options.seconds, options.singles = 10, [8], 2.0, 5
    try:
        with cloud.running(nodes=options.nodes, members=options.members, controllers=options.controllers) as running:
            still = idle(running, 3.0)
            raw, rows = asyncio.run(measure(running, options))
    except cloud.NotReady as trouble:
        print(f"bench: {trouble}", file=sys.stderr)
        return 1
    show(options, still, raw, rows)
    if options.json:
        figures = {"idle": still, "raw": raw, "starts": [msgspec.to_builtins(line) for line in rows]}
        options.json.write_text(json.dumps(figures, indent=1) + "\n")
    return 1 if any(line.failed for line in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
