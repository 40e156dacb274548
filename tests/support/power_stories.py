"""Stories of a registry on a disk whose power fails, one after the other at each of their steps:

    python -m tests.support.power_stories xfs push 1 fsync FOLDER       # every step; within `power.within()`
    python -m tests.support.power_stories ext4 push 3 fsync FOLDER      # every third; `unsafe` instead: without fsync

Prints the steps met and everything that was wrong after the disk was there again, as JSON: something acknowledged that
is not there, something half that shows, something that cannot be pushed or collected any more.
"""

import contextlib
import json
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from pathlib import Path

import msgspec

from covey import durable, observe
from covey.client import oci
from covey.decide import garbage
from covey.registry import blobs, disk, upkeep, verify
from tests.support import power, registry, storage

OLD, NEW = b"old layer " * 30_000, b"new layer " * 40_000
HALF = len(NEW) // 2
TEMPLATE = "templates/7a3f5f5e-6d0c-4b87-9c15-3f1f2a3b4c5d"
UNNEEDED = [f"unneeded {number}".encode() for number in range(2)]
IDLE = upkeep.Settings(collect_every_s=0.0, scrub_every_s=0.0)


class Stories:
    """On one folder of a volume, with fsync or without."""

    def __init__(self, base: Path, *, fsync: bool) -> None:
        self.base = base
        self._fsync = fsync
        self.all: Mapping[str, Callable[[power.Run], Awaitable[None]]] = {"push": self.push, "collect": self.collect}

    @contextlib.asynccontextmanager
    async def _serving(self) -> AsyncIterator[registry.Server]:
        async with registry.serving(self.base, fsync=self._fsync, care=IDLE, grace_s=0.0) as server:
            yield server

    # ---- what happens ----------------------------------------------------------------------------------------------

    async def push(self, run: power.Run) -> None:
        """On an empty disk: blobs whole and in parts, an image, another one in its place, a template; a tag deleted."""
        run.begin()
        async with self._serving() as server:
            for layer in (b"{}", OLD):
                await _push_blob(run, server, layer)
            await _put_manifest(run, server, "a", "v1", registry.image_manifest(b"{}", OLD))
            await _push_in_parts(run, server)
            await _put_manifest(run, server, "a", "v1", registry.image_manifest(b"{}", NEW))
            await _put_manifest(run, server, "a", "v2", registry.image_manifest(b"{}", OLD))
            await _push_template(run, server)
            await self._push_what_another_has_just_linked(run, server)
            with run.change("tag a v1", None):
                assert (await server.call("DELETE", "/v2/a/manifests/v1"))[0] == 202
            with run.change("tag a v2", None):
                assert (await server.call("DELETE", "/v2/a/manifests/v2"))[0] == 202

    async def _push_what_another_has_just_linked(self, run: power.Run, server: registry.Server) -> None:
        """Another server of the storage is a moment earlier, and has not yet made durable what it did."""
        content = b"pushed at two servers"
        digest = oci.digest_of(content)
        with storage.opened(self.base, fsync=self._fsync) as place:
            await place.logs.grant("a", digest)
        theirs = self.base / "aside" / "theirs"
        durable.write_new(theirs, content, fsync=self._fsync)
        shelf = disk.locate(self.base, digest)

        def link() -> None:
            durable.make_dirs(shelf.parent, fsync=False)
            theirs.rename(shelf)

        run.at("registry.part.entered", link)
        await _push_blob(run, server, content)

    async def collect(self, run: power.Run) -> None:
        """Garbage goes to the trash, some is asked for again, the rest is deleted; what is needed comes back."""
        with storage.opened(self.base, fsync=self._fsync) as place:
            run.answered(**{"tag a v1": await place.push("a", "v1", OLD)})
            for content in UNNEEDED:
                await place.store("a", content)
            session = await place.blobs.begin()
            await place.blobs.write(session, 0, _pieces(b"never finished"))
            storage.age(self.base, hours=30)
            await place.care.move(oci.digest_of(OLD), blobs.Place.SHELF, blobs.Place.TRASH)
            run.begin()
            for _ in range(2):  # the second one gives back what is needed
                await place.collector().run()
            with run.change("tag a v2", oci.digest_of(registry.image_manifest(b"{}", UNNEEDED[0]))):
                await place.push("a", "v2", UNNEEDED[0])
            await place.collector(garbage.Periods(trash_s=-1.0)).run()
            with run.change("tag a v3", oci.digest_of(registry.image_manifest(b"{}", NEW))):
                await place.push("a", "v3", NEW)

    # ---- what must be so afterwards ----------------------------------------------------------------------------------

    def check(self, allowed: Mapping[str, Sequence[str]]) -> Callable[[power.Run], Awaitable[None]]:
        async def checking(run: power.Run) -> None:
            async with self._serving() as server:
                for what, values in allowed.items():
                    found = await _look(server, what)
                    if found not in values:
                        run.wrong(f"{what} is {found}, not {' or '.join(values)}")
            await self._verify(run, "with the power back")
            async with self._serving() as server:
                for layer in (OLD, NEW):
                    await server.push_image("a", "v9", layer)
            await self._collect_all(run)

        return checking

    async def _verify(self, run: power.Run, when: str) -> None:
        with storage.opened(self.base, fsync=self._fsync) as place:
            report = await verify.Verification(place.catalog, place.care, place.care).run()
            for problem in report.problems:
                run.wrong(f"{when}: {problem}")

    async def _collect_all(self, run: power.Run) -> None:
        """What the crash left goes like all garbage, and nothing else does."""
        storage.age(self.base, hours=100)
        with storage.opened(self.base, fsync=self._fsync) as place:
            for _ in range(2):
                await place.collector(garbage.Periods(grace_s=-1.0, trash_s=-1.0)).run()
            if await place.lying() != set((await place.collector().needed()).reasons):
                run.wrong("a collection left or took too much")
        for folder in ("trash", "quarantine", "uploads", "aside"):
            for path in (self.base / folder).rglob("*"):
                if path.is_file():
                    run.wrong(f"after a collection {path.relative_to(self.base)} is still there")
        await self._verify(run, "after a collection")


async def _push_blob(run: power.Run, server: registry.Server, content: bytes) -> None:
    digest = oci.digest_of(content)
    with run.change(f"blob a {digest}", digest):
        await server.push_blob("a", content)


async def _push_in_parts(run: power.Run, server: registry.Server) -> None:
    status, headers, _ = await server.call("POST", "/v2/a/blobs/uploads/")
    assert status == 202
    location = headers["Location"]
    location = "/v2/" + location.partition("/v2/")[2]
    session, digest = f"upload {location}", oci.digest_of(NEW)
    run.answered(**{session: 0})
    for start in (0, HALF):
        with run.change(session, start + HALF):
            there = f"{start}-{start + HALF - 1}"
            status, _, _ = await server.call("PATCH", location, NEW[start : start + HALF], Content_Range=there)
            assert status == 202
    run.may(session, None)  # also for ever: that it is over is nothing that must last
    run.may(f"blob a {digest}", digest)
    assert (await server.call("PUT", f"{location}?digest={digest}"))[0] == 201
    run.answered(**{f"blob a {digest}": digest})


async def _push_template(run: power.Run, server: registry.Server) -> None:
    config = registry.template_config()
    for content in (config, b"disk"):
        await server.push_blob(TEMPLATE, content)
    manifest = registry.template_manifest(config, b"disk", name="mac", tag="v1")
    await _put_manifest(run, server, TEMPLATE, "v1", manifest)


async def _put_manifest(run: power.Run, server: registry.Server, repository: str, tag: str, manifest: bytes) -> None:
    with run.change(f"tag {repository} {tag}", oci.digest_of(manifest)):
        status, _, answer = await server.put_manifest(repository, tag, manifest)
        assert status == 201, answer


async def _look(server: registry.Server, what: str) -> str:
    """What `what` is now, by its bytes; a tag also needs every blob of its manifest."""
    kind, repository, *more = what.split(" ")
    if kind == "upload":
        status, headers, _ = await server.call("GET", repository)
        return headers[oci.OFFSET_HEADER] if status == 204 else str(None)
    path = f"/v2/{repository}/{'blobs' if kind == 'blob' else 'manifests'}/{more[0]}"
    status, _, content = await server.call("GET", path)
    if status == 404:
        return str(None)
    if kind == "tag":
        manifest = oci.parse_manifest(content)
        for blob in filter(None, (manifest.config, *manifest.layers)):
            status, _, layer = await server.call("GET", f"/v2/{repository}/blobs/{blob.digest}")
            if status != 200 or oci.digest_of(layer) != blob.digest:
                return f"a manifest without {blob.digest} ({status})"
    return str(oci.digest_of(content))


async def _pieces(content: bytes) -> AsyncIterator[bytes]:
    yield content


# ---- the program ---------------------------------------------------------------------------------------------------


class Outcome(msgspec.Struct):
    """`steps`: their names in order. `wrong`: what was found, each with the step at which the power had failed."""

    steps: list[str] = []
    wrong: list[str] = []


def play_all(volume: power.Volume, name: str, stride: int, *, fsync: bool) -> Outcome:
    """The story once for every `stride`-th of its steps. Without fsync until something is lost: that one is enough."""
    outcome, number, stopped = Outcome(), 1 - stride, True
    while stopped and (fsync or not outcome.wrong):
        number += stride
        stories = Stories(volume.folder / str(number), fsync=fsync)
        told = power.play(stories.all[name], number, volume)
        stopped, outcome.steps = told.stopped, told.steps
        volume.restart()
        checked = power.play(stories.check(told.allowed), 0, volume)
        when = f"{number} {told.steps[-1] if told.steps else 'before the first step'}"
        outcome.wrong += [f"{when}: the story itself failed: {text}" for text in told.wrong]
        outcome.wrong += [f"{when}: {text}" for text in checked.wrong]
    return outcome


def main(kind: str, name: str, stride: str, fsync: str, folder: str) -> None:
    observe.configure(level="critical")
    volume = power.Volume(Path(folder), kind)
    outcome = play_all(volume, name, int(stride), fsync=fsync == "fsync")
    sys.stdout.write(json.dumps(msgspec.to_builtins(outcome)) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
