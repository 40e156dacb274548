"""`covey template …` from end to end: the program as people run it, against a registry."""

import asyncio
import os
import random
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.support import ran, registry

TAG = "nightly #7 ü"


class Shell:
    """Runs the program; its cache is the test's own."""

    def __init__(self, url: str, cache: Path) -> None:
        self._env = {**os.environ, "COVEY_REGISTRY": url, "XDG_CACHE_HOME": str(cache)}

    async def __call__(self, *words: object) -> ran.Ran:
        child = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "covey", "template", *map(str, words)),
            env=self._env,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        out, err = await child.communicate()
        return ran.Ran(child.returncode or 0, out.decode(), err.decode())


@pytest.fixture
async def shell(tmp_path: Path) -> AsyncIterator[Shell]:
    async with registry.serving(tmp_path / "base") as server:
        yield Shell(server.url, tmp_path / "cache")


async def test_a_template_s_life(shell: Shell, tmp_path: Path) -> None:
    noise, text = tmp_path / "noise.img", tmp_path / "text.img"
    noise.write_bytes(random.Random(5).randbytes(300_000))
    text.write_bytes(b"packs well " * 50_000)
    pushed = await shell("push", "mac", noise, text, "--tag", "v0", "--description", "first", "--json")
    assert (pushed.code, pushed.json["version"], pushed.json["file_bytes"]) == (0, 0, 850_000), pushed
    assert 300_000 < pushed.json["moved_bytes"] < 310_000
    plain = await shell("push", "mac", text, "--tag", TAG, "--no-compress")
    assert (plain.code, "mac nightly #7 ü is version 1" in plain.out, "537.1 KiB" in plain.out) == (0, True, True), (
        plain
    )
    refused = await shell("push", "mac", noise, "--tag", TAG)
    assert (refused.code, refused.out, "--force replaces it" in refused.err) == (1, "", True)
    assert "mac v2 is version 2" in (await shell("tag", "mac", "v2", "--tag", "v0")).out
    (listed,) = (await shell("list", "--json")).json
    assert (listed["name"], listed["id"]) == ("mac", pushed.json["template"])
    shown = await shell("show", "mac")
    assert [line.split()[1] for line in shown.out.splitlines()[-3:]] == ["v0", "nightly", "v2"], shown
    pulled = await shell("pull", "mac", tmp_path / "out", "--version", 0, "--json")
    assert [Path(file).read_bytes() for file in pulled.json["files"]] == [noise.read_bytes(), text.read_bytes()]
    unsaid = await shell("revert", "mac", "--tag", TAG)
    assert (unsaid.code, "versions 1 (nightly #7 ü), 2 (v2)? Say so with --yes" in unsaid.err) == (1, True), unsaid
    assert (await shell("revert", "mac", "--tag", TAG, "--yes")).code == 0
    assert [one["tag"] for one in (await shell("show", "mac", "--json")).json["versions"]] == ["v0"]
    assert (await shell("delete", "mac", "-y")).out == "deleted template mac with 1 versions\n"
    assert (await shell("list", "--json")).json == []
    for verb in ("show", "pull"):
        gone = await shell(verb, "mac")
        assert (gone.code, gone.out, gone.err.count("\n")) == (1, "", 1), gone
        assert "there is no template mac" in gone.err
