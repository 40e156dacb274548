"""How fast whole life-cycles go: `make bench ARGS="starts --nodes 500 --controllers 1 3"`.

Real processes on one machine (bench/cloud.py), etcd on disk with fsync. The hypervisor is the synthetic one with no
boot time, so what is measured is Covey and etcd. In one run, so that ratios between them mean something on a busy
machine: the load shapes of bench/shapes.py, and guarded transactions a second that this etcd gives to Covey's own store
client and nothing else.

Beside times and rates stands what does not depend on who else uses the machine: processor milliseconds per life-cycle
of each kind of process, from a shape's first POST until its last instance is forgotten.

What it costs that thousands stand is a small difference between large figures, which drift: etcd's history grows with
each life-cycle, and what the cores give changes. So the rate beside them is compared with the rates alone before and
after, `--rounds` times.
"""

import argparse
import asyncio
import contextlib
import dataclasses
import functools
import gc
import json
import math
import os
import resource
import statistics
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvloop

from bench import chart, cloud, load, shapes
from covey import world
from covey.store import base, etcd, schema

SHAPES = ("isolated", "back-to-back", "steady", "burst", "flat-out", "standing", "full-fleet")
WRITERS = 128
BESIDE_GOAL = 0.9  # of the rate alone, beside thousands that stand
_SETTLE_S = 20.0
_TOLD_S = 6.0  # the nodes' words of VMs that begin to stand come within five seconds
_CALLS = ("Txn", "Range", "LeaseKeepAlive")


@dataclass(frozen=True, slots=True)
class Beside:
    """What is left of the rate alone when many stand: by the clock, and by the processor time of a life-cycle, which
    depends less on who else uses the machine. Of each round, against the mean of what was alone before and after it."""

    shape: str
    rates: list[float]
    processors: list[float]

    @property
    def rate(self) -> float:
        return statistics.median(self.rates)

    @property
    def processor(self) -> float:
        return statistics.median(self.processors)


@dataclass(frozen=True, slots=True)
class Result:
    """What one number of controllers gave."""

    controllers: int
    nodes: int
    members: int
    raw: float  # guarded transactions a second
    rows: list[shapes.Row]
    beside: Beside | None = None  # when both were measured


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
    return done / (time.perf_counter() - begun)


class Bench:
    """One cloud under measurement."""

    def __init__(self, running: cloud.Cloud, options: argparse.Namespace, api: load.Api, eye: load.Watcher) -> None:
        self._running = running
        self._options = options
        self._api = api
        self._watcher = eye
        self._standing: list[str] = []

    async def rows(self) -> list[shapes.Row]:
        options = self._options
        works: dict[str, Callable[[shapes.Lives], Awaitable[shapes.Row]]] = {
            "isolated": lambda lives: shapes.isolated(lives, options.singles, 0.25),
            "back-to-back": lambda lives: shapes.back_to_back(lives, options.singles),
            "steady": lambda lives: shapes.steady(lives, options.rate, options.seconds),
            "burst": lambda lives: shapes.burst(lives, options.burst),
            "flat-out": lambda lives: shapes.flat_out(lives, options.flights, options.seconds),
            "full-fleet": self._full_fleet,
        }
        found = []
        for name in (name for name in SHAPES if name in options.shapes):
            if name == "standing":
                found += await self._rounds_beside_standing(compares="flat-out" in options.shapes)
                continue
            if name == "full-fleet":
                await self._stand(options.nodes * options.slots)
            found.append(await self._weighed(works[name]))
        return found

    async def _rounds_beside_standing(self, *, compares: bool) -> list[shapes.Row]:
        options = self._options
        again = functools.partial(shapes.flat_out, flights=options.flights, seconds=options.seconds)
        found = []
        for _ in range(options.rounds):
            await self._stand(options.standing)
            await asyncio.sleep(_TOLD_S)
            found.append(await self._weighed(functools.partial(again, shape=f"beside {len(self._standing)} standing")))
            if compares:
                await shapes.empty(shapes.Lives(self._api, self._watcher), self._standing)
                self._standing.clear()
                await asyncio.sleep(_TOLD_S)
                found.append(await self._weighed(functools.partial(again, shape="flat out again")))
        return found

    async def _stand(self, count: int) -> None:
        lives = shapes.Lives(self._api, self._watcher)
        self._standing += await shapes.fill(lives, max(count - len(self._standing), 0))

    async def _full_fleet(self, lives: shapes.Lives) -> shapes.Row:
        options = self._options
        return await shapes.full_fleet(lives, self._standing, min(options.ends, len(self._standing)), options.rate)

    async def _weighed(self, work: Callable[[shapes.Lives], Awaitable[shapes.Row]]) -> shapes.Row:
        """The row with the processor time of each kind of process per life-cycle."""
        lives = shapes.Lives(self._api, self._watcher)
        before, there = self._spent(), len(self._watcher.lives)
        asked = cloud.asked_of_etcd(self._running.members.endpoints)
        row = await work(lives)
        deadline = time.perf_counter() + _SETTLE_S
        while len(self._watcher.lives) > there and time.perf_counter() < deadline:
            await asyncio.sleep(0.1)
        after, whole = self._spent(), max(lives.whole, 1)
        asked_since = cloud.asked_of_etcd(self._running.members.endpoints)
        row = dataclasses.replace(
            row,
            lives=lives.whole,
            cpu_ms={kind: (after[kind] - before[kind]) * 1000 / whole for kind in after},
            etcd={kind: (asked_since[kind] - asked.get(kind, 0.0)) / whole for kind in ("proposals", *_CALLS)},
        )
        print(f"  {row.shape}: {row.rate:.0f}/s, {row.total_ms:.1f} ms", file=sys.stderr)
        return row

    def _spent(self) -> dict[str, float]:
        """Processor seconds so far by kind of process."""
        spent = {"etcd": 0.0, "controllers": 0.0, "agents": 0.0, "registry": 0.0, "load": cloud.cpu_s(os.getpid())}
        kinds = {"etcd": "etcd", "controller": "controllers", "agent": "agents", "registry": "registry"}
        for name, pid in self._running.pids().items():
            spent[kinds[name.split()[0]]] += cloud.cpu_s(pid)
        return spent


@contextlib.asynccontextmanager
async def opened(running: cloud.Cloud) -> AsyncIterator[tuple[etcd.Etcd, load.Api, load.Watcher]]:
    (template,) = (item["id"] for item in cloud.body(running.registry + "/registry/v2/vm") if item["name"] == "bench")
    store = etcd.Etcd(running.members.endpoints, world=world.System())
    watcher = load.Watcher()
    since = (await store.range(schema.FORMAT_KEY)).revision + 1
    following = asyncio.create_task(watcher.follow(store, since))
    api = load.Api(running.controllers, template)
    try:
        yield store, api, watcher
    finally:
        api.close()
        following.cancel()
        await asyncio.gather(following, return_exceptions=True)
        await store.close()


async def measure(running: cloud.Cloud, options: argparse.Namespace) -> tuple[float, list[shapes.Row]]:
    gc.freeze()
    async with opened(running) as (store, api, watcher):
        rows = await Bench(running, options, api, watcher).rows()
        raw = await raw_rate(store, WRITERS, options.seconds / 2)  # last: its garbage would slow etcd for the others
    return raw, rows


def ratio(rows: list[shapes.Row]) -> Beside | None:
    """What is left of the rate alone, as a ratio of figures of one run."""
    rates, processors, shape = [], [], ""
    for before, many, after in zip(rows, rows[1:], rows[2:], strict=False):
        whole = before.rate and many.total_ms and after.rate
        if whole and many.shape.startswith("beside") and after.shape.startswith("flat out again"):
            shape = many.shape
            rates.append(many.rate / statistics.mean((before.rate, after.rate)))
            processors.append(statistics.mean((before.total_ms, after.total_ms)) / many.total_ms)
    return Beside(shape, rates, processors) if rates else None


# ---- the program -----------------------------------------------------------------------------------------------


def show(one: Result) -> None:
    print(f"\n{one.nodes} nodes, {one.controllers} controller(s), {one.members} etcd member(s)")
    print(f"Guarded transactions of this etcd alone, {WRITERS} writers at once: {one.raw:.0f} a second\n")
    print(f"{'':<32}{'lives':>7}{'lives/s':>9}{'raw/it':>8}{'p50 ms':>8}{'p95 ms':>8}{'worst':>8}{'failed':>8}")
    for row in one.rows:
        share = f"{one.raw / row.rate:.0f}" if row.rate else "-"
        print(
            f"{row.shape:<32}{row.lives:>7}{row.rate:>9.1f}{share:>8}"
            f"{row.p50_ms:>8.1f}{row.p95_ms:>8.1f}{row.worst_ms:>8.1f}{row.failed:>8}"
            + ("" if row.of == "POST → Started" else f"   ({row.of})")
        )
    if one.beside is not None:
        met = "met" if one.beside.rate >= BESIDE_GOAL else "missed"
        each = ", ".join(f"{rate:.0%}" for rate in one.beside.rates)
        print(f"\n{one.beside.shape}: {one.beside.rate:.0%} of the rate alone ({each};", end="")
        print(f" goal {BESIDE_GOAL:.0%}: {met}),", end="")
        print(f" {one.beside.processor:.0%} by processor time")
    print("\nProcessor milliseconds per life-cycle")
    for row in one.rows[:1]:
        print(f"{'':<32}" + "".join(f"{kind:>12}" for kind in row.cpu_ms) + f"{'in all':>8}{'etcd: proposals':>18}")
    for row in one.rows:
        spent = "".join(f"{row.cpu_ms[kind]:>12.2f}" for kind in row.cpu_ms)
        calls = ", ".join(f"{count:.2f} {kind}" for kind, count in row.etcd.items() if kind != "proposals")
        print(f"{row.shape:<32}{spent}{row.total_ms:>8.2f}{row.etcd['proposals']:>18.2f}, calls: {calls}")


def picture(results: list[Result]) -> str:
    def label(one: Result, row: shapes.Row) -> str:
        return f"{row.shape} · {one.controllers} ctl"

    every = [(one, row) for one in results for row in one.rows]
    fast = [(one, row) for one, row in every if row.shape.startswith(("flat", "burst", "beside"))]
    stood = [(f"{one.beside.shape} · {one.controllers} ctl", one.beside) for one in results if one.beside is not None]
    shares = [(name, {"% of the rate alone": 100 * found.rate}) for name, found in stood]
    return chart.draw(
        f"Whole life-cycles: {results[0].nodes} nodes, {results[0].members} etcd members, {os.cpu_count()} cores",
        [
            chart.Panel("life-cycles a second", [(label(*pair), {"rate": pair[1].rate}) for pair in fast]),
            chart.Panel("processor ms per life-cycle", [(label(*pair), pair[1].cpu_ms) for pair in fast]),
            *([chart.Panel("beside many, % of the rate alone", shares, 100 * BESIDE_GOAL)] if shares else []),
            chart.Panel(
                "latency, ms",
                [
                    (label(*pair), {"p50": pair[1].p50_ms, "to p95": pair[1].p95_ms - pair[1].p50_ms})
                    for pair in every
                    if pair not in fast
                ],
            ),
        ],
    )


def parsed(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure how fast whole life-cycles go.")
    parser.add_argument("--nodes", type=int, default=500)
    parser.add_argument("--controllers", type=int, nargs="+", default=[1, 3], help="one run for each number")
    parser.add_argument("--members", type=int, default=3, choices=(1, 3), help="etcd members")
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=SHAPES, metavar="SHAPE", help=str(SHAPES))
    parser.add_argument("--seconds", type=float, default=15.0, help="length of each timed shape")
    parser.add_argument("--singles", type=int, default=60, help="life-cycles of isolated and back-to-back")
    parser.add_argument("--flights", type=int, default=128, help="life-cycles under way, flat out")
    parser.add_argument("--burst", type=int, default=500)
    parser.add_argument("--rate", type=float, default=20.0, help="arrivals, or ends on a full fleet, a second")
    parser.add_argument("--ends", type=int, default=200, help="how many end on a full fleet")
    parser.add_argument("--standing", type=int, default=5000)
    parser.add_argument("--rounds", type=int, default=1, help="how often beside those that stand, and alone after it")
    parser.add_argument("--quick", action="store_true", help="some seconds, to see that it works")
    parser.add_argument("--json", type=Path, help="write the figures there too")
    parser.add_argument("--svg", type=Path, help="draw them there too")
    options = parser.parse_args(arguments)
    if options.quick:
        options.nodes, options.members, options.controllers, options.seconds = 5, 1, options.controllers[:1], 1.0
        options.singles, options.flights, options.burst, options.rate = 3, 4, 8, 10.0
        options.ends, options.standing = 4, 10
    options.slots = math.ceil((options.standing + max(options.flights, options.burst)) / options.nodes)
    return options


def run(options: argparse.Namespace) -> list[Result]:
    """Raises NotReady."""
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    results = []
    for count in options.controllers:
        with cloud.running(
            nodes=options.nodes,
            members=options.members,
            controllers=count,
            slots=options.slots,
            forget_s=0.2 if options.quick else 2.0,
        ) as running:
            raw, rows = uvloop.run(measure(running, options))
            results.append(Result(count, options.nodes, options.members, raw, rows, ratio(rows)))
    return results


def main(arguments: list[str] | None = None) -> int:
    options = parsed(sys.argv[1:] if arguments is None else arguments)
    try:
        results = run(options)
    except cloud.NotReady as trouble:
        print(f"bench: {trouble}", file=sys.stderr)
        return 1
    for one in results:
        show(one)
    figures: list[dict[str, Any]] = [dataclasses.asdict(one) for one in results]
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1, ensure_ascii=False) + "\n")
    if options.svg:
        options.svg.write_text(picture(results))
    return 1 if any(row.failed for one in results for row in one.rows) else 0


if __name__ == "__main__":
    sys.exit(main())
