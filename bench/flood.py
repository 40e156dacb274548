"""What a flood costs: `python -m bench.flood`, or `python -m bench.flood --clients 500 --seconds 5`.

One controller, one etcd member, synthetic nodes (bench/cloud.py). Clients of one program, each on a connection of its
own, start instances as fast as they are answered and heed no Retry-After. Beside them a polite client asks once a
second, a balancer asks /readyz twice a second, and the nodes send their signs of life. Printed: what the flood was
answered, how long the others waited, the controller's memory, and whether any node was missed.
"""

import argparse
import asyncio
import collections
import contextlib
import json
import multiprocessing
import resource
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp

from bench import cloud

TEMPLATE = "bench"


@dataclass
class Waits:
    """How often somebody was answered, and how long it took."""

    answers: collections.Counter[str] = field(default_factory=collections.Counter)
    took_s: list[float] = field(default_factory=list)

    def row(self, who: str) -> str:
        took = sorted(self.took_s) or [0.0]
        p50, p99 = took[len(took) // 2], took[min(len(took) - 1, int(len(took) * 0.99))]
        answers = ", ".join(f"{count} × {answer}" for answer, count in sorted(self.answers.items()))
        return (
            f"{who:10} p50 {p50 * 1000:6.0f} ms   p99 {p99 * 1000:6.0f} ms   most {took[-1] * 1000:6.0f} ms   {answers}"
        )


async def _ask(session: aiohttp.ClientSession, waits: Waits, method: str, url: str, body: bytes | None = None) -> None:
    began = time.monotonic()
    try:
        async with session.request(method, url, data=body) as answer:
            await answer.read()
            waits.answers[str(answer.status)] += 1
    except (aiohttp.ClientError, OSError, TimeoutError) as error:
        waits.answers[type(error).__name__] += 1
        await asyncio.sleep(0.01)
    waits.took_s.append(time.monotonic() - began)


async def _flood(url: str, template: str, clients: int, seconds: float) -> Waits:
    waits = Waits()
    until = time.monotonic() + seconds
    body = json.dumps({"vmid": template}).encode()

    async def client(session: aiohttp.ClientSession) -> None:
        while time.monotonic() < until:
            await _ask(session, waits, "POST", f"{url}/api/v1/vm", body)

    timeout = aiohttp.ClientTimeout(total=30)
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=timeout) as session:
        await asyncio.gather(*(client(session) for _ in range(clients)))
    return waits


def _flood_process(url: str, template: str, clients: int, seconds: float, out: "multiprocessing.Queue[Waits]") -> None:
    out.put(asyncio.run(_flood(url, template, clients, seconds)))


async def _every(period_s: float, ending: threading.Event, method: str, url: str, agent: str) -> Waits:
    waits = Waits()
    async with aiohttp.ClientSession(headers={"User-Agent": agent}) as session:
        while not ending.is_set():
            await _ask(session, waits, method, url)
            await asyncio.sleep(period_s)
    return waits


def _rss_mb(pid: int) -> float:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * resource.getpagesize() / (1 << 20)


def measure(clients: int, seconds: float, nodes: int) -> None:
    with cloud.running(nodes=nodes) as one:
        url, pid = one.controllers[0], one.processes["controller 1"].pid
        template = json.loads(one.run("template", "list", "--json", "--registry", one.registry))[0]["id"]
        ending = threading.Event()
        found: dict[str, Waits] = {}
        lost: set[str] = set()

        def run(name: str, period_s: float, path: str) -> threading.Thread:
            def body() -> None:
                found[name] = asyncio.run(_every(period_s, ending, "GET", url + path, name))

            thread = threading.Thread(target=body)
            thread.start()
            return thread

        before = _rss_mb(pid)
        peak = before
        threads = [run("polite", 1.0, "/api/v1/node"), run("balancer", 0.5, "/readyz")]
        out: multiprocessing.Queue[Waits] = multiprocessing.Queue()
        flood = multiprocessing.Process(target=_flood_process, args=(url, template, clients, seconds, out))
        flood.start()
        while out.empty():
            peak = max(peak, _rss_mb(pid))
            time.sleep(0.05)
        found["flood"] = out.get()
        flood.join()
        ending.set()
        for thread in threads:
            thread.join()
        lost |= _offline(one, url)
        print(f"{clients} clients for {seconds:g} s, {nodes} nodes")
        for name, waits in found.items():
            print("  " + waits.row(name))
        print(f"  controller {before:.0f} MiB before, {peak:.0f} MiB at most, {_rss_mb(pid):.0f} MiB after")
        again = _said(one, "a node joined") - nodes
        print(f"  nodes missed: {len(lost)}, joined again: {again}; stood still: {_said(one, 'stood still')} times")


def _offline(one: cloud.Cloud, url: str) -> set[str]:
    nodes = json.loads(one.run("node", "list", "--json", "--controller", url))
    return {node["node_id"] for node in nodes if node["state"] not in ("Active", "Inactive (Max Capacity)")}


def _said(one: cloud.Cloud, text: str) -> int:
    return (one.directory / "controller 1.log").read_text(errors="replace").count(text)


def main(take: Callable[[int, float, int], None] = measure) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clients", type=int, default=2000)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--nodes", type=int, default=20)
    options = parser.parse_args()
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    with contextlib.suppress(ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    take(options.clients, options.seconds, options.nodes)


if __name__ == "__main__":
    main()
