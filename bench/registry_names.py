"""A registry of many names: how soon it starts, and how long its list takes. Part of `bench.registry`."""

import asyncio
import json
import statistics
import time
import urllib.request
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from covey import world
from covey.client import oci
from covey.registry import catalog, storage


@dataclass
class Found:
    """Times in milliseconds, but for the start."""

    templates: int
    tags: int
    start_s: float
    start_cpu_s: float
    first_ms: float
    list_ms: float
    list_cpu_ms: float

    def told(self) -> str:
        return (
            f"{self.templates} templates with {self.tags} tags: started in {self.start_s:.2f} s (goal: 2;"
            f" {self.start_cpu_s:.2f} s of processor), listed in {self.list_ms:.0f} ms (goal: 100;"
            f" {self.list_cpu_ms:.0f} ms of processor), the first time after the start in {self.first_ms:.0f} ms"
        )


async def _one(base: Path, tags: int) -> str:
    """One template with so many tags, pushed as usual: its id."""
    held = storage.on_disk(base, world.System(), reserved_bytes=0, fsync=False)
    made = catalog.Catalog(held.content, held.logs, world.System())
    template = str(uuid.uuid4())
    name = f"templates/{template}"
    config = json.dumps({"arch": "amd64"}).encode()
    layer = b"layer"
    for content in (config, layer):
        await held.logs.grant(name, (await held.content.put(content)).digest)
    for number in range(tags):
        manifest = {
            "schemaVersion": 2,
            "mediaType": oci.OCI_MANIFEST,
            "artifactType": oci.TEMPLATE,
            "config": _descriptor(oci.TEMPLATE_CONFIG, config),
            "layers": [_descriptor(oci.DISK_RAW, layer)],
            "annotations": {oci.NAME: f"name-{template}", oci.TAG: f"v{number}"},
        }
        await made.push(name, f"v{number}", json.dumps(manifest).encode(), oci.OCI_MANIFEST, force=False)
    held.close()
    return template


def _descriptor(media_type: str, content: bytes) -> dict[str, object]:
    return {"mediaType": media_type, "digest": oci.digest_of(content), "size": len(content)}


def fill(base: Path, templates: int, tags: int) -> None:
    """One template is pushed; the logs of the others are that one's with another name."""
    first = asyncio.run(_one(base, tags))
    source = base / "repositories" / "templates" / first / "_log"
    entries = {path.name: path.read_bytes() for path in source.iterdir()}
    for _ in range(templates - 1):
        template = str(uuid.uuid4())
        folder = base / "repositories" / "templates" / template / "_log"
        folder.mkdir(parents=True)
        for name, entry in entries.items():
            (folder / name).write_bytes(entry.replace(first.encode(), template.encode()))


def measure(
    base: Path,
    templates: int,
    tags: int,
    start: Callable[[Any], Any],
    spec: Callable[..., Any],
    ports: Callable[[int], list[int]],
) -> Found:
    fill(base, templates, tags)
    (port,) = ports(1)
    began = time.monotonic()
    server = start(spec(base=str(base), port=port))
    start_s = time.monotonic() - began
    try:
        start_cpu_s = server.cpu_s()
        times, cpu = [], []
        for _ in range(11):
            began, used = time.monotonic(), server.cpu_s()
            with urllib.request.urlopen(f"{server.url}/registry/v2/vm", timeout=60) as answer:
                listed = json.loads(answer.read())["body"]
            times.append((time.monotonic() - began) * 1000)
            cpu.append((server.cpu_s() - used) * 1000)
            assert len(listed) == templates, len(listed)
    finally:
        server.stop()
    return Found(
        templates, templates * tags, start_s, start_cpu_s, times[0], statistics.median(times[1:]), sum(cpu[1:]) / 10
    )
