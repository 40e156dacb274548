"""Several server processes on one directory: no stickiness, no lock in a process, the file system decides (S29)."""

import asyncio
import json
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from covey import errors, model
from covey.client import oci, templates
from covey.client import registry as client
from tests.support import registry

CONTENT = bytes(range(256)) * 20_000


@pytest.fixture
async def pair(tmp_path: Path) -> AsyncIterator[tuple[registry.Process, registry.Process]]:
    async with registry.process(tmp_path / "base") as one, registry.process(tmp_path / "base") as two:
        yield one, two


Pair = tuple[registry.Process, registry.Process]


def layer(tmp_path: Path, content: bytes) -> Path:
    path = tmp_path / oci.digest_of(content)[7:17]
    path.write_bytes(content)
    return path


async def push(remote: client.Registry, tag: str, path: Path, *, force: bool = False) -> templates.Pushed:
    return await templates.push_template(remote, "mac", tag, [path], arch=model.Arch.AMD64, force=force)


async def test_one_tag_pushed_at_both_at_once_has_one_winner(pair: Pair, tmp_path: Path) -> None:
    for round_number in range(5):
        tag = f"v{round_number}"
        paths = [layer(tmp_path, f"{tag} {number}".encode()) for number in range(6)]
        async with registry.talking(pair[0]) as one, registry.talking(pair[1]) as two:
            results = await asyncio.gather(
                *(push((one, two)[number % 2], tag, path) for number, path in enumerate(paths)), return_exceptions=True
            )
            won = [result for result in results if isinstance(result, templates.Pushed)]
            assert len(won) == 1, results
            assert all(isinstance(result, errors.Refused) for result in results if result not in won)
            for remote in (one, two):
                assert (await remote.resolve("mac", tag)).digest == won[0].digest
    async with registry.talking(pair[1]) as remote:
        assert [version.number for version in (await remote.template("mac")).versions] == [0, 1, 2, 3, 4]


async def test_forced_pushes_at_both_get_a_number_each(pair: Pair, tmp_path: Path) -> None:
    paths = [layer(tmp_path, f"{number}".encode()) for number in range(8)]
    async with registry.talking(pair[0]) as one, registry.talking(pair[1]) as two:
        results = await asyncio.gather(
            *(push((one, two)[number % 2], "v", path, force=True) for number, path in enumerate(paths))
        )
        assert sorted(result.version for result in results) == list(range(8))
        (standing,) = (await one.template("mac")).versions
        assert standing.digest == max(results, key=lambda result: result.version).digest


async def test_what_one_acknowledged_the_other_shows_at_once(pair: Pair) -> None:
    for number in range(20):
        here, there = pair[number % 2], pair[1 - number % 2]
        digest, manifest = await here.push_image("a", f"t{number}", f"{number}".encode())
        assert (await there.call("GET", f"/v2/a/manifests/t{number}"))[2] == manifest
        assert len(json.loads((await there.call("GET", "/v2/a/tags/list"))[2])["tags"]) == number + 1
        assert (await there.call("HEAD", f"/v2/a/manifests/{digest}"))[0] == 200


async def test_an_upload_goes_from_one_server_to_the_other(pair: Pair) -> None:
    one, two = pair
    _, headers, _ = await one.call("POST", "/v2/a/blobs/uploads/")
    location = headers["Location"]
    for number, start in enumerate(range(0, len(CONTENT), 1_000_000)):
        assert (await pair[number % 2].call("PATCH", location, CONTENT[start : start + 1_000_000]))[0] == 202
    digest = oci.digest_of(CONTENT)
    assert (await two.call("PUT", f"{location}?digest={digest}"))[0] == 201
    assert (await one.call("GET", f"/v2/a/blobs/{digest}"))[2] == CONTENT


async def test_the_client_goes_on_when_a_server_dies_under_its_upload(pair: Pair, tmp_path: Path) -> None:
    path = layer(tmp_path, CONTENT * 10)
    async with registry.talking(*pair) as remote:
        seen = 0

        def kill_once(_title: str, done: int, _size: int) -> None:
            nonlocal seen
            if not seen and done > len(CONTENT) * 2:
                pair[0].send(signal.SIGKILL)
            seen = max(seen, done if done > len(CONTENT) * 2 else 0)

        pushed = await templates.push_template(remote, "mac", "v1", [path], arch=model.Arch.AMD64, progress=kill_once)
        assert await pair[0].ended() == -signal.SIGKILL
        pulled = await templates.pull_template(remote, "mac", tmp_path / "out")
    assert pulled.digest == pushed.digest
    assert pulled.files[0].read_bytes() == CONTENT * 10


async def test_the_client_goes_on_when_a_server_dies_under_its_pull(pair: Pair, tmp_path: Path) -> None:
    path = layer(tmp_path, CONTENT * 10)
    async with registry.talking(*pair) as remote:
        await push(remote, "v1", path)
        killed = False

        def kill_once(_title: str, done: int, _size: int) -> None:
            nonlocal killed
            if not killed and done > len(CONTENT):
                pair[0].send(signal.SIGKILL)
                killed = True

        pulled = await templates.pull_template(remote, "mac", tmp_path / "out", progress=kill_once)
        assert await pair[0].ended() == -signal.SIGKILL
    assert pulled.files[0].read_bytes() == CONTENT * 10


async def test_the_client_leaves_a_server_that_is_frozen(pair: Pair, tmp_path: Path) -> None:
    path = layer(tmp_path, CONTENT * 10)
    async with registry.talking(*pair, stall_s=1.0) as remote:
        frozen = False

        def freeze_once(_title: str, done: int, _size: int) -> None:
            nonlocal frozen
            if not frozen and done > len(CONTENT):
                pair[0].send(signal.SIGSTOP)
                frozen = True

        await templates.push_template(remote, "mac", "v1", [path], arch=model.Arch.AMD64, progress=freeze_once)
        pair[0].send(signal.SIGCONT)
        frozen = False
        pulled = await templates.pull_template(remote, "mac", tmp_path / "out", progress=freeze_once)
        pair[0].send(signal.SIGCONT)
    assert pulled.files[0].read_bytes() == CONTENT * 10
