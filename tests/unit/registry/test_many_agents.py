"""Ten agents pull one template at once while a push runs: everything is right, and the server's memory stays flat."""

import asyncio
import random
from pathlib import Path

from covey import model, world
from covey.agent import images
from covey.client import http, oci, remembered, templates
from covey.client import registry as client
from tests.support import registry

AGENTS = 10
SIZE = 24 << 20
ROOM = 48 << 20  # what the server may take beside its start, whatever moves: buffers of 14 connections, and a margin


def memory_bytes(pid: int, field: str) -> int:
    lines = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return int(lines[field].split()[0]) * 1024


def made(folder: Path, seed: int) -> list[Path]:
    """A layer that is not worth packing and one that is."""
    folder.mkdir()
    noise, text = folder / "noise.img", folder / "text.img"
    noise.write_bytes(random.Random(seed).randbytes(SIZE))
    text.write_bytes(b"".join(b"%d and line %d\n" % (seed, number) for number in range(200_000)))
    return [noise, text]


async def test_ten_agents_pull_one_template_while_a_push_runs(tmp_path: Path) -> None:
    first, second = made(tmp_path / "first", 1), made(tmp_path / "second", 2)
    notes = remembered.Notes(tmp_path / "notes", world.System())
    async with registry.process(tmp_path / "base") as server, http.Endpoints([server.url]) as endpoints:
        remote = client.Registry(endpoints)
        pushed = await templates.push_template(remote, "mac", "v1", first, arch=model.Arch.AMD64, notes=notes)
        before = memory_bytes(server.pid, "VmRSS")
        peak = [before]
        watching = asyncio.create_task(_watch(server.pid, peak))
        told: dict[int, list[float]] = {}

        async def agent(number: int) -> tuple[str, ...]:
            cache = images.Cache(tmp_path / f"agent-{number}", lambda _: remote, reserve_bytes=0)
            cache.from_registries((server.url,))
            progress = told.setdefault(number, [])
            found = await cache.get(f"vm.{number}", pushed.template, pushed.digest, progress.append)
            return found.layers

        pushing = templates.push_template(remote, "mac", "v2", second, arch=model.Arch.AMD64, notes=notes)
        *found, later = await asyncio.gather(*(agent(number) for number in range(AGENTS)), pushing)
        watching.cancel()
        wanted = [oci.digest_of(path.read_bytes()) for path in first]
        for layers in found:
            assert isinstance(layers, tuple)
            assert [oci.digest_of(Path(path).read_bytes()) for path in layers] == wanted
        assert all(0 <= fraction <= 1 for fractions in told.values() for fraction in fractions)
        assert isinstance(later, templates.Pushed) and later.version == 1
        pulled = await templates.pull_template(remote, "mac", tmp_path / "out")
        assert [path.read_bytes() for path in pulled.files] == [path.read_bytes() for path in second]
    print(f"the server took {(max(peak) - before) >> 20} MiB more while {AGENTS * SIZE >> 20} moved")  # noqa: T201
    assert max(peak) - before < ROOM < AGENTS * SIZE


async def _watch(pid: int, peak: list[int]) -> None:
    while True:
        peak.append(memory_bytes(pid, "VmRSS"))
        await asyncio.sleep(0.02)
