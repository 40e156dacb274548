"""A damaged blob is found, taken out of service, told of, and healed; a right one is never taken (safety S32)."""

import json
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from covey import failpoint, model, world
from covey.cli import main
from covey.client import oci
from covey.registry import blobs, disk, disk_care, elsewhere, scrub, upkeep, verify
from tests.support import registry, storage

SHELF, QUARANTINE = blobs.Place.SHELF, blobs.Place.QUARANTINE
LAYER = bytes(range(256)) * 20_000
DIGEST = oci.digest_of(LAYER)


@pytest.fixture
def place(tmp_path: Path) -> Iterator[storage.Storage]:
    with storage.opened(tmp_path / "base") as opened:
        yield opened
    failpoint.watch(None)


def damage(base: Path, digest: str) -> None:
    """One bit turns over; the time of the file stays."""
    path = disk.locate(base, digest)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.chmod(0o644)
    path.write_bytes(content)


def scrubbing(place: storage.Storage, care: blobs.Care | None = None, *urls: str) -> scrub.Scrub:
    others = elsewhere.Registries(urls, place.blobs) if urls else None
    return scrub.Scrub(place.collector(), care or place.care, world.System(), elsewhere=others)


async def test_a_damaged_blob_is_taken_out_of_service(place: storage.Storage) -> None:
    await place.push("a", "v1", LAYER, b"another")
    damage(place.base, DIGEST)
    told = await scrubbing(place).run()
    assert (told.damaged, told.blobs, await place.lying(QUARANTINE)) == ((DIGEST,), 4, {DIGEST})
    assert await place.catalog.granted_blob("a", DIGEST) is None
    assert (await scrubbing(place).run()).damaged == ()


async def test_a_damaged_blob_is_a_404_that_says_so_until_it_is_pushed_again(tmp_path: Path) -> None:
    async with registry.serving(tmp_path) as server:
        digest, _ = await server.push_image("a", "v1", LAYER)
        damage(tmp_path, DIGEST)
        with storage.opened(tmp_path) as place:
            await scrubbing(place).run()
        status, code, message = await server.error("GET", f"/v2/a/blobs/{DIGEST}")
        assert (status, code) == (404, "BLOB_UNKNOWN")
        assert "damaged" in message
        assert "push it again" in message
        assert (await server.call("GET", "/readyz"))[0] == 200
        await server.push_blob("a", LAYER)
        assert (await server.call("GET", f"/v2/a/blobs/{DIGEST}"))[2] == LAYER
        assert (await server.call("GET", f"/v2/a/manifests/{digest}"))[0] == 200


async def test_the_figures_tell_of_it(place: storage.Storage) -> None:
    await place.push("a", "v1", LAYER)
    damage(place.base, DIGEST)
    await scrubbing(place).run()
    working = upkeep.Upkeep(place.catalog, place.care, place.care, world.System(), upkeep.Settings())
    await working.survey()
    assert working.figures.quarantined == (DIGEST,)
    assert working.figures.troubles() == ["1 damaged blobs in quarantine: push them again"]
    assert working.figures.scrubbed_s > 0
    await place.blobs.put(LAYER)
    await working.survey()
    assert working.figures.troubles() == []


class Lying(disk_care.DiskCare):
    """The page cache holds wrong bytes; the disk holds right ones, unless `disk_too`."""

    disk_too = False

    async def read(
        self, digest: model.Digest, place: blobs.Place = SHELF, *, past_cache: bool = False
    ) -> AsyncIterator[bytes]:
        async for piece in super().read(digest, place, past_cache=past_cache):
            yield piece if past_cache and not self.disk_too else b"x" + piece[1:]


@pytest.mark.parametrize("disk_too", [False, True])
async def test_memory_that_lies_puts_nothing_in_quarantine(place: storage.Storage, disk_too: bool) -> None:
    await place.store("a", LAYER)
    care = Lying(place.base, world.System(), fsync=False)
    care.disk_too = disk_too
    told = await scrubbing(place, care).run()
    care.close()
    assert told.damaged == ((DIGEST,) if disk_too else ())
    assert await place.lying() == (set() if disk_too else {DIGEST})


async def test_a_scrub_goes_on_where_a_server_stopped_and_others_leave_it_alone(place: storage.Storage) -> None:
    digests = sorted([await place.store("a", f"{number}".encode()) for number in range(10)])
    working = scrubbing(place)
    assert await working.due(3600)
    seen: list[str] = []

    class Stopped(Exception):
        pass

    def stop(told: scrub.Progress) -> None:
        seen.append(told.after)
        if len(seen) == 4:
            raise Stopped

    with pytest.raises(Stopped):
        await working.run(on_blob=stop)
    assert not await scrubbing(place).due(3600)  # it may still run
    storage.age(place.base, seconds=700)
    assert await scrubbing(place).due(3600)
    told = await scrubbing(place).run(on_blob=lambda told: seen.append(told.after))
    assert (seen[:4], seen[-1], told.damaged) == (digests[:4], digests[-1], ())
    assert not await scrubbing(place).due(3600)
    storage.age(place.base, hours=1.1)
    assert await scrubbing(place).due(3600)


@pytest.mark.parametrize("what", ["layer", "manifest"])
async def test_a_damaged_blob_is_fetched_again_from_another_registry(tmp_path: Path, what: str) -> None:
    async with registry.serving(tmp_path / "one") as one, registry.serving(tmp_path / "two") as two:
        for server in (one, two):
            manifest, _ = await server.push_image("a/b", "v1", LAYER)
        digest = model.Digest(DIGEST if what == "layer" else manifest)
        damage(tmp_path / "one", digest)
        with storage.opened(tmp_path / "one") as place:
            working = scrubbing(place, None, "http://127.0.0.1:1", two.url)
            assert (await working.run()).damaged == (digest,)
            assert list(await working.heal()) == [digest]
            assert await place.lying(QUARANTINE) == set()
            assert (await working.run()).damaged == ()
        assert (await one.call("GET", f"/v2/a/b/blobs/{DIGEST}"))[2] == LAYER
        assert oci.digest_of((await one.call("GET", "/v2/a/b/manifests/v1"))[2]) == manifest


async def test_wrong_bytes_from_another_registry_heal_nothing(tmp_path: Path) -> None:
    async with registry.serving(tmp_path / "one") as one, registry.serving(tmp_path / "two") as two:
        for server in (one, two):
            await server.push_image("a", "v1", LAYER)
        for base in ("one", "two"):
            damage(tmp_path / base, DIGEST)
        with storage.opened(tmp_path / "one") as place:
            working = scrubbing(place, None, two.url)
            await working.run()
            assert list(await working.heal()) == []
            assert await place.lying(QUARANTINE) == {DIGEST}
        assert (await one.call("HEAD", f"/v2/a/blobs/{DIGEST}"))[0] == 404


# ---- verify --------------------------------------------------------------------------------------------------------


async def problems(place: storage.Storage, *, quick: bool = False) -> tuple[str, ...]:
    with storage.opened(place.base) as fresh:
        return (await verify.Verification(fresh.catalog, fresh.care, fresh.care, quick=quick).run()).problems


async def test_verify_finds_every_kind_of_flaw(place: storage.Storage) -> None:
    first = await place.push("a", "v1", LAYER)
    second = await place.push("a", "v2", b"small")
    await place.push("a", "v3", b"third")
    assert await problems(place) == ()
    assert await problems(place, quick=True) == ()

    damage(place.base, DIGEST)
    assert await problems(place, quick=True) == ()
    (found,) = await problems(place)
    assert f"blob {DIGEST} is damaged" in found

    disk.locate(place.base, oci.digest_of(b"small")).unlink()
    disk.locate(place.base, first).unlink()
    found = "\n".join(await problems(place, quick=True))
    assert f"a@{second}: blob {oci.digest_of(b'small')} is not there" in found
    assert f"a@{first}: its bytes are not there" in found

    (place.base / "repositories" / "a" / "_log" / f"{1:010d}").unlink()
    assert "log a: entry 1 is missing, and there are later ones" in "\n".join(await problems(place, quick=True))


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import asyncio

    base = tmp_path / "base"
    words = ["--base-path", str(base)]
    assert main.run(["registry", "verify", *words]) == 1
    assert "holds no registry" in capsys.readouterr().err

    async def fill() -> None:
        with storage.opened(base) as place:
            await place.push("a", "v1", LAYER)
            await place.store("a", b"lost")

    asyncio.run(fill())
    lost = oci.digest_of(b"lost")
    assert main.run(["registry", "verify", *words]) == 0
    assert "all is well" in capsys.readouterr().out
    storage.age(base, hours=30)
    assert main.run(["registry", "gc", "--dry-run", *words]) == 0
    told = capsys.readouterr().out
    assert lost in told
    assert "nobody asked for it for 30 h" in told
    assert "3 needed" in told
    assert main.run(["registry", "gc", *words]) == 0
    capsys.readouterr()
    assert main.run(["registry", *words, "gc", "--trash", "0s", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["rulings"][0]["fate"] == "delete"
    damage(base, DIGEST)
    assert main.run(["registry", "verify", *words]) == 1
    assert f"blob {DIGEST} is damaged" in capsys.readouterr().out
    assert main.run(["registry", "scrub", *words]) == 1
    assert f"in quarantine: {DIGEST}" in capsys.readouterr().out
    assert main.run(["registry", "verify", "--quick", *words]) == 1
    assert f"blob {DIGEST} is not there" in capsys.readouterr().out
