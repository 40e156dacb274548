"""What lists cost with thousands of instances: `python -m bench.lists`, or `--instances 1000 --readers 64`.

One controller, one etcd member, synthetic nodes whose VMs all stand. Readers in a process of their own ask for the
whole list all at once, while nothing changes and while instances change; beside that single lists, pages and filtered
ones.
Printed: how they were answered, how long the slowest took, and the controller's processor time for each.
"""

import argparse
import asyncio
import collections
import json
import multiprocessing
import time
from typing import NamedTuple

import aiohttp

from bench import cloud

CHANGES_PER_S = 20


class Round(NamedTuple):
    answers: dict[str, int]
    slowest_s: float
    bytes_each: int


async def _readers(url: str, path: str, readers: int) -> Round:
    """All at once, as several programs."""
    timeout = aiohttp.ClientTimeout(total=120)
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=timeout) as session:

        async def one(number: int) -> tuple[str, float, int]:
            began = time.monotonic()
            async with session.get(url + path, headers={"User-Agent": f"reader-{number % 8}"}) as answer:
                size = sum([len(piece) async for piece in answer.content.iter_any()])
                return str(answer.status), time.monotonic() - began, size

        found = await asyncio.gather(*map(one, range(readers)))
    answers = collections.Counter(status for status, _, _ in found)
    return Round(dict(answers), max(took for _, took, _ in found), max(size for _, _, size in found))


def _read(url: str, path: str, readers: int, out: "multiprocessing.Queue[Round]") -> None:
    out.put(asyncio.run(_readers(url, path, readers)))


async def _change(url: str, ids: list[str], until: asyncio.Event) -> None:
    async with aiohttp.ClientSession() as session:
        number = 0
        while not until.is_set():
            path = f"{url}/api/v1/vm?id={ids[number % len(ids)]}"
            async with session.put(path, json={"metadata": {"number": number}}) as answer:
                await answer.read()
            number += 1
            await asyncio.sleep(1 / CHANGES_PER_S)


async def _round(one: cloud.Cloud, path: str, readers: int, ids: list[str]) -> tuple[Round, float]:
    """One round, and the controller's processor seconds. With `ids` those change meanwhile."""
    url, pid = one.controllers[0], one.processes["controller 1"].pid
    out: multiprocessing.Queue[Round] = multiprocessing.Queue()
    before = cloud.cpu_s(pid)
    process = multiprocessing.Process(target=_read, args=(url, path, readers, out))
    ended = asyncio.Event()
    changing = asyncio.create_task(_change(url, ids, ended)) if ids else None
    process.start()
    found = await asyncio.to_thread(out.get)
    ended.set()
    if changing is not None:
        await changing
    process.join()
    return found, cloud.cpu_s(pid) - before


async def _fill(one: cloud.Cloud, instances: int) -> list[str]:
    """Instances that are all Started; their ids."""
    url, ids = one.controllers[0], list[str]()
    template = json.loads(one.run("template", "list", "--json", "--registry", one.registry))[0]["id"]
    async with aiohttp.ClientSession() as session:
        while len(ids) < instances:
            body = {"vmid": template, "count": min(100, instances - len(ids)), "external_id": f"job-{len(ids)}"}
            async with session.post(f"{url}/api/v1/vm", json=body) as answer:
                ids += (await answer.json()).get("body", ())  # it may be refused for a moment
    while cloud.body(f"{url}/api/v1/health")["instances"].get("Started", 0) < instances:
        await asyncio.sleep(0.5)
    return ids


async def measure(instances: int, readers: int, nodes: int) -> None:
    with cloud.running(nodes=nodes, slots=-(-instances // nodes)) as one:
        ids = await _fill(one, instances)
        print(f"{instances} instances on {nodes} nodes")
        rounds = {
            "whole list, one at a time": ("/api/v1/vm", 1, []),
            f"whole list, {readers} at once": ("/api/v1/vm", readers, []),
            f"the same, {CHANGES_PER_S} changes/s": ("/api/v1/vm", readers, ids),
            "page of 100": ("/api/v1/vm?limit=100", 1, []),
            "?external_id=": ("/api/v1/vm?external_id=job-0", 1, []),
            "?state=Error": ("/api/v1/vm?state=Error", 1, []),
        }
        for name, (path, at_once, changing) in rounds.items():
            times = 1 if at_once > 1 else 20
            took, slowest, last = 0.0, 0.0, Round({}, 0.0, 0)
            for _ in range(times):
                last, used = await _round(one, path, at_once, changing)
                took, slowest = took + used, max(slowest, last.slowest_s)
            answers = ", ".join(f"{count} × {status}" for status, count in sorted(last.answers.items()))
            each_ms = 1000 * took / times / at_once
            print(
                f"  {name:32} {answers:14} slowest {slowest * 1000:6.0f} ms   controller {each_ms:6.1f} ms each   "
                f"{last.bytes_each:,} bytes"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--instances", type=int, default=5000)
    parser.add_argument("--readers", type=int, default=256)
    parser.add_argument("--nodes", type=int, default=20)
    options = parser.parse_args()
    asyncio.run(measure(options.instances, options.readers, options.nodes))


if __name__ == "__main__":
    main()
