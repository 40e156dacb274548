"""Templates whose layers travel packed: what moves, what is remembered, and what arrives."""

import json
import random
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from covey import errors, model, world
from covey.client import oci, packing, remembered, templates
from covey.client import registry as client
from tests.support import registry

NOISE = random.Random(3).randbytes(400_000)
TEXT = b"".join(b"line %d\n" % number for number in range(100_000))


class Clock(world.System):
    """So late that no file is too young to be remembered."""

    def wall_ns(self) -> int:
        return super().wall_ns() + 10**10


@pytest.fixture
async def remote(tmp_path: Path) -> AsyncIterator[client.Registry]:
    async with registry.serving(tmp_path / "base") as server, registry.talking(server) as remote:
        yield remote


@pytest.fixture
def notes(tmp_path: Path) -> remembered.Notes:
    return remembered.Notes(tmp_path / "notes", Clock())


@pytest.fixture
def layers(tmp_path: Path) -> list[Path]:
    """Text, noise, and a disk that is mostly hole."""
    text, noise, disk = (tmp_path / name for name in ("text.img", "noise.img", "disk.img"))
    text.write_bytes(TEXT)
    noise.write_bytes(NOISE)
    with disk.open("wb") as file:
        file.write(NOISE)
        file.truncate(20 << 20)
    return [text, noise, disk]


async def push(
    remote: client.Registry, tag: str, layers: list[Path], notes: remembered.Notes | None, **more: Any
) -> templates.Pushed:
    return await templates.push_template(remote, "mac", tag, layers, arch=model.Arch.AMD64, notes=notes, **more)


async def forms(remote: client.Registry, pushed: templates.Pushed) -> list[oci.Descriptor]:
    return (await remote.manifest(oci.repository_of(pushed.template), pushed.digest))[0].layers


async def test_layers_that_pay_are_packed_and_come_back_as_they_were(
    remote: client.Registry, notes: remembered.Notes, layers: list[Path], tmp_path: Path
) -> None:
    pushed = await push(remote, "v1", layers, notes)
    assert pushed.file_bytes == sum(path.stat().st_size for path in layers)
    assert pushed.moved_bytes < len(TEXT) / 2 + 2 * len(NOISE) + 10_000
    found = await forms(remote, pushed)
    assert [item.media_type.endswith("+zstd") for item in found] == [True, False, True]
    assert [item.annotations.get(oci.SIZE) for item in found] == [str(len(TEXT)), None, str(20 << 20)]
    pulled = await templates.pull_template(remote, "mac", tmp_path / "out")
    assert [path.read_bytes() for path in pulled.files] == [path.read_bytes() for path in layers]
    assert pulled.moved_bytes == pushed.moved_bytes
    assert pulled.files[2].stat().st_blocks * 512 < 1 << 20, "holes are holes again"
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(
        [*(path.name for path in layers), templates.CONFIG_FILE]
    )
    again = await templates.pull_template(remote, "mac", tmp_path / "out")
    assert (again.moved_bytes, again.skipped_bytes) == (0, pulled.moved_bytes)


@pytest.mark.parametrize("forgetful", [False, True])
async def test_the_same_layers_again_move_nothing(
    remote: client.Registry, notes: remembered.Notes, layers: list[Path], tmp_path: Path, forgetful: bool
) -> None:
    """Under the same tag, under another one, and in another template; also when all that was remembered is lost."""
    first = await push(remote, "v1", layers, notes)
    if forgetful:
        notes = remembered.Notes(tmp_path / "other-notes", Clock())
    again = await push(remote, "v1", layers, notes)
    assert (again.digest, again.version, again.moved_bytes) == (first.digest, 0, 0)
    assert again.skipped_bytes == first.moved_bytes
    assert (await push(remote, "v2", layers, notes)).moved_bytes == 0
    other = await templates.push_template(remote, "other", "v1", layers, arch=model.Arch.AMD64, notes=notes)
    assert (other.moved_bytes, other.skipped_bytes) == (0, first.moved_bytes)


async def test_an_unchanged_file_is_neither_hashed_nor_packed_again(
    remote: client.Registry, notes: remembered.Notes, layers: list[Path]
) -> None:
    seen: set[str] = set()
    await push(remote, "v1", layers, notes, progress=lambda title, done, total: seen.add(title))
    assert {"hashing text.img", "packing text.img", "text.img", "hashing noise.img"} <= seen
    assert "packing noise.img" not in seen
    seen.clear()
    await push(remote, "v2", layers, notes, progress=lambda title, done, total: seen.add(title))
    assert seen == {"text.img", "noise.img", "disk.img"}
    layers[0].write_bytes(TEXT[::-1])
    await push(remote, "v3", layers, notes, progress=lambda title, done, total: seen.add(title))
    assert {"hashing text.img", "packing text.img"} <= seen


async def test_without_packing_everything_travels_as_it_is(
    remote: client.Registry, notes: remembered.Notes, layers: list[Path]
) -> None:
    """For agents that cannot unpack: also what the registry has in packed form already."""
    await push(remote, "v1", layers[:1], notes)
    plain = await push(remote, "v2", layers[:1], notes, pack=False)
    assert plain.moved_bytes == len(TEXT)
    assert [item.media_type for item in await forms(remote, plain)] == [oci.DISK_RAW]


async def test_a_tag_is_the_same_whether_its_layers_are_packed_or_not(
    remote: client.Registry, notes: remembered.Notes, layers: list[Path]
) -> None:
    first = await push(remote, "v1", layers[:1], None)
    again = await push(remote, "v1", layers[:1], notes)
    assert (again.digest, again.moved_bytes) == (first.digest, 0)
    with pytest.raises(errors.Refused, match="exists; --force replaces it"):
        await push(remote, "v1", layers[1:2], notes)


async def test_a_packed_layer_that_holds_something_else_never_appears(tmp_path: Path, layers: list[Path]) -> None:
    async with registry.serving(tmp_path / "base") as server, registry.talking(server) as remote:
        await offer_packed(server, remote, TEXT, zstd_of(tmp_path, NOISE))
        with pytest.raises(packing.Damaged, match="push the template again"):
            await templates.pull_template(remote, "mac", tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def zstd_of(tmp_path: Path, content: bytes) -> bytes:
    (tmp_path / "plain").write_bytes(content)
    packing.pack(tmp_path / "plain", tmp_path / "plain.zst")
    return (tmp_path / "plain.zst").read_bytes()


async def offer_packed(
    server: registry.Server, remote: client.Registry, plain: bytes, blob: bytes, size: str | None = None
) -> None:
    """A template whose one layer is said to hold `plain` and is `blob`."""
    template = await remote.hold_name("mac")
    config = json.dumps({"arch": "amd64", "uncompressed": [oci.digest_of(plain)]}).encode()
    for content in (config, blob):
        await server.push_blob(f"templates/{template}", content)
    manifest = json.loads(registry.template_manifest(config, blob, name="mac", tag="v1"))
    manifest["layers"][0]["mediaType"] += oci.ZSTD
    manifest["layers"][0]["annotations"] = {oci.SIZE: str(len(plain)) if size is None else size}
    assert (await server.put_manifest(f"templates/{template}", "v1", json.dumps(manifest).encode()))[0] == 201


@pytest.mark.parametrize("size", ["", "x", "-1", "9" * 30])
async def test_a_packed_layer_of_no_known_size_is_refused(tmp_path: Path, size: str) -> None:
    async with registry.serving(tmp_path / "base") as server, registry.talking(server) as remote:
        await offer_packed(server, remote, TEXT, zstd_of(tmp_path, TEXT), size)
        with pytest.raises(errors.Refused, match="does not say what it becomes"):
            await templates.pull_template(remote, "mac", tmp_path / "out")


async def test_views_name_packed_files(remote: client.Registry, notes: remembered.Notes, layers: list[Path]) -> None:
    text, noise, disk = layers
    await push(remote, "v1", [disk], notes, state=text, nvram=noise)
    (version,) = (await remote.template("mac")).versions
    assert (version.images, version.state_files, version.nvram) == (["disk.img"], ["text.img"], "noise.img")
    assert version.config_file
    assert version.size < len(TEXT) / 2 + 2 * len(NOISE) + 10_000
