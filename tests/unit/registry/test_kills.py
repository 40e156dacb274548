"""Pushes and pulls that are killed at any byte go on where they stood: no wrong byte, and little is moved twice."""

import os
import random
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from covey import model
from covey.client import oci, templates
from tests.support import mover, proxy, registry

KILLS = int(os.environ.get("COVEY_TEST_KILLS", "20"))
SEED = int(os.environ.get("COVEY_TEST_SEED", "7"))
SIZE = 64 << 20
AT_RISK = 4 << 20  # of one kill: not yet recorded, on its way, and in sockets' buffers
KEPT = 0.25  # of what moved before the kills; without any resume it would be nothing


@pytest.fixture
async def movers() -> AsyncIterator[mover.Movers]:
    async with mover.ready() as movers:
        yield movers


@pytest.fixture
def layers(tmp_path: Path) -> list[Path]:
    """One that is not worth packing, and a small one with holes that is."""
    chance = random.Random(SEED)
    big, small = tmp_path / "big.img", tmp_path / "small.img"
    big.write_bytes(chance.randbytes(SIZE))
    with small.open("wb") as file:
        file.write(b"small")
        file.truncate(5 << 20)
        file.seek(3 << 20)
        file.write(chance.randbytes(200_000))
    return [big, small]


def drawn(chance: random.Random, moved: int) -> int:
    """After how many bytes more the next kill comes: never so late that the whole may have moved before."""
    return chance.randrange(max(1, min(3 * SIZE // 2 // KILLS, SIZE * 9 // 10 - moved)))


def tell(before: int, total: int) -> None:
    kept = 1 - (total - SIZE) / before
    print(f"seed {SEED}: {before >> 20} MiB moved before {KILLS} kills, {kept:.0%} of that was kept")  # noqa: T201


async def test_a_pull_that_is_killed_again_and_again(tmp_path: Path, movers: mover.Movers, layers: list[Path]) -> None:
    chance = random.Random(SEED)
    out = tmp_path / "out"
    async with registry.serving(tmp_path / "base") as server, proxy.before(server.port) as counting:
        run = await movers.begin("push", server.url, "mac", tmp_path / "notes", *layers)
        assert await run.ended() == 0
        for _ in range(KILLS):
            run = await movers.begin("pull", f"http://{counting.address}", "mac", out)
            counting.after(drawn(chance, counting.down_bytes), run.kill)
            assert await run.ended() == -9
            assert not (out / "big.img").exists()
        before = counting.down_bytes
        run = await movers.begin("pull", f"http://{counting.address}", "mac", out)
        assert await run.ended() == 0
    for layer in layers:
        assert (out / layer.name).read_bytes() == layer.read_bytes()
    assert (out / "small.img").stat().st_blocks * 512 < 1 << 20, "holes are holes again"
    assert sorted(path.name for path in out.iterdir()) == ["big.img", "small.img", templates.CONFIG_FILE]
    tell(before, counting.down_bytes)
    assert counting.down_bytes - before < SIZE - KEPT * before


async def test_a_push_that_is_killed_again_and_again(tmp_path: Path, movers: mover.Movers, layers: list[Path]) -> None:
    chance = random.Random(SEED)
    async with (
        registry.serving(tmp_path / "base") as server,
        proxy.before(server.port) as counting,
        registry.talking(server) as remote,
    ):
        for _ in range(KILLS):
            run = await movers.begin("push", f"http://{counting.address}", "mac", tmp_path / "notes", *layers)
            counting.after(drawn(chance, counting.up_bytes), run.kill, up=True)
            assert await run.ended() == -9
            assert await remote.templates() == []
        before = counting.up_bytes
        run = await movers.begin("push", f"http://{counting.address}", "mac", tmp_path / "notes", *layers)
        assert await run.ended() == 0
        pulled = await templates.pull_template(remote, "mac", tmp_path / "out")
        sent = counting.up_bytes
        run = await movers.begin("push", f"http://{counting.address}", "mac", tmp_path / "notes", *layers)
        assert await run.ended() == 0
        assert counting.up_bytes - sent < 20_000, "the same push again moves nothing"
    assert [path.read_bytes() for path in pulled.files] == [layer.read_bytes() for layer in layers]
    assert list((tmp_path / "notes/uploads").iterdir()) == list((tmp_path / "notes/packed").iterdir()) == []
    tell(before, sent)
    assert sent - before < SIZE - KEPT * before


async def test_a_server_that_dies_in_the_middle_of_a_pull(
    tmp_path: Path, movers: mover.Movers, layers: list[Path]
) -> None:
    """Two servers of one directory: the pull goes on at the other one, from where it stood."""
    base = tmp_path / "base"
    async with (
        registry.process(base) as first,
        registry.process(base) as second,
        proxy.before(first.port) as before_first,
        proxy.before(second.port) as before_second,
    ):
        async with registry.talking(second) as remote:
            await templates.push_template(remote, "mac", "v1", layers, arch=model.Arch.AMD64)
        urls = f"http://{before_first.address},http://{before_second.address}"
        run = await movers.begin("pull", urls, "mac", tmp_path / "out")
        before_first.after(SIZE // 2, first.kill)
        assert await run.ended() == 0
        assert await first.ended() != 0
        assert before_second.down_bytes > SIZE // 4
        assert before_first.down_bytes + before_second.down_bytes < SIZE + (6 << 20) + AT_RISK
    assert oci.digest_of((tmp_path / "out/big.img").read_bytes()) == oci.digest_of(layers[0].read_bytes())
