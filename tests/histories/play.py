"""What clients do in a history, what they may see meanwhile, and what must hold at its end.

Three servers on one folder; four clients, each with one call at a time at any server; a client whose server dies
repeats the call elsewhere, as ours does. Collections and scrubs run like calls. Days pass. Some collections are hasty:
without any grace, so that only the rules of the push itself protect it.

Never: a wrong byte, a manifest without its blobs, a push refused although its layers were there within the grace. In
the end: every accepted entry is in its log, the logs are dense, no version number was given twice, every tag can be
pulled, and after collection nothing lies there that nothing needs.
"""

import asyncio
import contextlib
import dataclasses
import os
import random
import shutil
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path
from typing import Any

import msgspec

from covey import errors, failpoint, model
from covey.client import oci
from covey.decide import garbage
from covey.registry import blobs, catalog, disk, disk_care, journal, scrub, sweep, verify, views
from tests.histories import stage
from tests.support import registry, storage

CONFIG = b'{"arch":"amd64"}'
LAYERS = tuple(f"layer {number} ".encode() * 50 for number in range(6))
TEMPLATES = ("templates/7a3f5f5e-6d0c-4b87-9c15-3f1f2a3b4c5d", "templates/0d9b1c9e-1f0b-4b55-8a53-6f1f2a3b4c5e")
REPOSITORIES = ("a", "b/c", *TEMPLATES)
TAGS = ("v1", "v2")
DEFAULTS = garbage.Periods()
HASTY = garbage.Periods(grace_s=-1.0, trash_s=-1.0)
ALL_GONE = garbage.Periods(grace_s=-1.0, trash_s=-1.0, upload_s=-1.0)


class Wrong(AssertionError):
    """The history shows something that must never be."""


class Chance:
    """`world.World` from a seed."""

    def __init__(self, chance: random.Random) -> None:
        self._chance = chance
        self._ns = 0

    def boot_ns(self) -> int:
        self._ns += 1000
        return self._ns

    def wall_ns(self) -> int:
        return time.time_ns()

    def token(self) -> str:
        return f"{self._chance.getrandbits(64):016x}"

    def secret(self) -> str:
        return self.token()

    def uuid(self) -> str:
        raise AssertionError("every template of a history has its id")


# ---- a server whose every touch of the file system is a step -------------------------------------------------------


class SteppedDisk(disk.Disk):
    step: Callable[[str], None]

    async def _run(self, work: Any, *args: Any, **kwargs: Any) -> Any:
        self.step("disk")
        return work(*args, **kwargs)


class SteppedJournal(journal.Journal):
    step: Callable[[str], None]

    async def _run(self, work: Any) -> Any:
        self.step("journal")
        return work()


class SteppedCare(disk_care.DiskCare):
    step: Callable[[str], None]

    async def _run(self, work: Any) -> Any:
        self.step("care")
        return work()


@dataclasses.dataclass(frozen=True)
class Bugs:
    """What servers are made of: the real thing, or something planted."""

    disk: type[SteppedDisk] = SteppedDisk
    journal: type[SteppedJournal] = SteppedJournal
    care: type[SteppedCare] = SteppedCare
    collector: type[sweep.Collector] = sweep.Collector
    periods: garbage.Periods = DEFAULTS


class Server:
    """One life of a server."""

    def __init__(self, base: Path, world: Chance, step: Callable[[str], None], bugs: Bugs) -> None:
        self.blobs = bugs.disk(base, world, fsync=False)
        self.logs = bugs.journal(base, world, fsync=False)
        self.care = bugs.care(base, world, fsync=False)
        for part in (self.blobs, self.logs, self.care):
            part.step = step
        self.catalog = catalog.Catalog(self.blobs, self.logs, world)
        self._bugs = bugs
        self._world = world

    async def head(self, repository: str, digest: model.Digest) -> bool:
        return await self.catalog.granted_blob(repository, digest) is not None

    async def mount(self, repository: str, digest: model.Digest, source: str) -> bool:
        if await self.catalog.granted_blob(source, digest) is None:
            return False
        await self.logs.grant(repository, digest)
        return True

    async def begin(self) -> blobs.SessionId:
        return await self.blobs.begin()

    async def write(self, session: blobs.SessionId, content: bytes) -> int:
        """The next piece, from where the session stands."""
        start = await self.blobs.offset(session)
        size = max(1, len(content) // 2)
        return await self.blobs.write(session, start, _pieces(content[start : start + size]))

    async def publish(self, repository: str, session: blobs.SessionId, digest: model.Digest) -> None:
        try:
            await self.blobs.finish(session, digest)
            await self.logs.grant(repository, digest)
            await self.blobs.abort(session)
        except blobs.NoSession:
            if not await self.head(repository, digest):
                raise

    async def push(self, repository: str, tag: str, manifest: bytes) -> None:
        await self.catalog.push(repository, tag, manifest, oci.OCI_MANIFEST, force=True)

    async def pull(self, repository: str, tag: str) -> None:
        """Every byte that the tag stands for. Raises Wrong."""
        try:
            known, content = await self.catalog.manifest(repository, tag)
        except catalog.Missing as error:
            if "damaged or lost" in str(error) and tag in (await self.catalog.repository(repository)).tags:
                raise Wrong(f"pull: {error}") from error
            return
        if oci.digest_of(content) != known.digest:
            raise Wrong(f"pull: {repository}:{tag} is not {known.digest}")
        for digest in known.refers:
            blob = await self.catalog.granted_blob(repository, digest)
            if blob is None:
                if known.digest in (await self.catalog.repository(repository)).manifests:
                    raise Wrong(f"pull: {repository}:{tag} has lost {digest}")
                return
            assert blob.path is not None
            try:
                if oci.digest_of(blob.path.read_bytes()) != digest:
                    raise Wrong(f"pull: {digest} has wrong bytes")
            except FileNotFoundError as error:
                if known.digest in (await self.catalog.repository(repository)).manifests:
                    raise Wrong(f"pull: {digest} vanished while it was opened") from error

    async def delete(self, repository: str, tag: str, *, manifest: bool) -> str | None:
        """What was deleted, as its entry says; None: it was not there."""
        reference = (await self.catalog.repository(repository)).tags.get(tag, tag) if manifest else tag
        try:
            await self.catalog.delete(repository, reference)
        except (catalog.Missing, catalog.ManifestNeeded):
            return None
        return reference

    async def withdraw(self, repository: str, digest: model.Digest) -> None:
        try:
            await self.catalog.withdraw(repository, digest)
        except (catalog.Missing, catalog.BlobNeeded):
            return

    async def revert(self, repository: str) -> None:
        fold = await self.catalog.repository(repository)
        if len(fold.versions) > 1:  # the first one ends the template for ever
            newest = fold.versions[-1]
            target = views.Target(tag=newest.release.tag, version=newest.number, digest=newest.manifest.digest)
            try:
                await self.catalog.revert(oci.template_of(repository) or "", target)
            except (catalog.Missing, errors.Refused):
                return

    async def collect(self, *, hasty: bool) -> None:
        periods = HASTY if hasty else self._bugs.periods
        await self._bugs.collector(self.catalog, self.care, self.care, periods).run()

    async def scrub(self) -> None:
        collector = sweep.Collector(self.catalog, self.care, self.care, garbage.Periods())
        told = await scrub.Scrub(collector, self.care, self._world).run(anew=True)
        if told.damaged:
            raise Wrong(f"scrub: {told.damaged} were called damaged")

    def close(self) -> None:
        for part in (self.blobs, self.logs, self.care):
            part.close()


async def _pieces(content: bytes) -> AsyncIterator[bytes]:
    yield content


# ---- clients -------------------------------------------------------------------------------------------------------

Call = Callable[[Server], Coroutine[Any, Any, object]]


def ask(what: str, *words: object, **more: object) -> Call:
    """One request, to whichever server."""
    return lambda server: getattr(server, what)(*words, **more)


@dataclasses.dataclass(frozen=True)
class Accepted:
    """What a server has acknowledged: an entry of this kind must be in the log."""

    repository: str
    tag: str
    digest: str
    deleted: bool = False


@dataclasses.dataclass(frozen=True)
class Mix:
    """What a history is about: how wide it is, and how often a client does what."""

    repositories: tuple[str, ...] = REPOSITORIES
    layers: tuple[bytes, ...] = LAYERS
    weights: tuple[int, ...] = (40, 20, 8, 6, 6, 12, 8, 3)
    day_share: float = 0.004
    kill_share: float = 0.006


WIDE = Mix()
NARROW = Mix(REPOSITORIES[:1], LAYERS[:2], weights=(40, 10, 25, 0, 0, 10, 30, 0), day_share=0.01, kill_share=0.002)
SIEGE = Mix(REPOSITORIES[:1], LAYERS[:2], weights=(45, 0, 20, 0, 0, 0, 45, 0), day_share=0.0, kill_share=0.0)
_DEEDS = ("push", "pull", "delete", "withdraw", "revert", "collect", "hasty", "scrub")


class Play:
    """One history."""

    def __init__(self, seed: int, bugs: Bugs, say: Callable[[str], None]) -> None:
        self.chance = random.Random(seed)
        parent = Path("/dev/shm")
        where = parent if os.access(parent, os.W_OK) else None
        self.base = Path(tempfile.mkdtemp(prefix="covey-history-", dir=where))
        self.accepted: list[Accepted] = []
        self.say = say
        self._world = Chance(self.chance)
        self._bugs = bugs
        self._mix = (WIDE, NARROW, WIDE, SIEGE)[seed % 4]
        kills = self.chance.choice((0, 1, 2, 4))
        self._stage = stage.Stage(self.chance, kills=kills, kill_share=self._mix.kill_share, say=say)
        self._servers: list[Server] = []
        self._late_epoch = 0
        self._hasty = 0  # calls that run and may take a layer from under a push

    def run(self) -> int:
        """The whole history; how many steps it had. Raises Wrong."""
        failpoint.watch(self._stage.step)
        try:
            self._servers = [self._server() for _ in range(3)]
            self._perform()
            self._judge()
            return self._stage.steps
        finally:
            failpoint.watch(None)
            shutil.rmtree(self.base, ignore_errors=True)
            self._stage.end()
            shutil.rmtree(self.base, ignore_errors=True)

    def _server(self) -> Server:
        return Server(self.base, self._world, self._stage.step, self._bugs)

    # ---- the play itself -------------------------------------------------------------------------------------------

    def _perform(self) -> None:
        clients = [self._client(self.chance.randrange(4, 8)) for _ in range(4)]
        waiting: list[tuple[Any, object]] = [(client, None) for client in clients]
        calls: dict[stage.Actor, tuple[Any, Call]] = {}
        while waiting or calls:
            for client, result in waiting:
                try:
                    call = client.send(result)
                except StopIteration:
                    continue
                calls[self._begin(call)] = (client, call)
            waiting = []
            if not calls:
                break
            self._stage.advance()
            self._revive(calls)
            for actor in [actor for actor in calls if actor.done]:
                client, _ = calls.pop(actor)
                if isinstance(actor.outcome, Wrong):
                    raise actor.outcome
                waiting.append((client, actor.outcome))
            if self.chance.random() < self._mix.day_share:
                self.say("a day passes")
                storage.age(self.base, hours=25)
                self._everyone_is_late()

    def _begin(self, call: Call) -> stage.Actor:
        server = self.chance.choice(self._servers)
        return self._stage.start(server, lambda: _alone(call(server)))

    def _revive(self, calls: dict[stage.Actor, tuple[Any, Call]]) -> None:
        """A server that died starts again, and its clients ask again, wherever."""
        dead = {id(actor.server) for actor in calls if actor.dead}
        if not dead:
            return
        self._servers = [self._server() if id(server) in dead else server for server in self._servers]
        for actor in [actor for actor in calls if actor.dead]:
            client, call = calls.pop(actor)
            again = self._begin(call)
            calls[again] = (client, call)

    def _everyone_is_late(self) -> None:
        """From now on a push that began before may find that its layers are gone."""
        self._late_epoch += 1

    # ---- what a client does ----------------------------------------------------------------------------------------

    def _client(self, count: int) -> Any:
        """Yields calls, is sent what came of each."""
        for _ in range(count):
            repository, tag = self.chance.choice(self._mix.repositories), self.chance.choice(TAGS)
            what = self.chance.choices(_DEEDS, weights=self._mix.weights)[0]
            if what == "push":
                yield from self._push(repository, tag)
            elif what == "pull":
                yield from self._ask(ask("pull", repository, tag))
            elif what == "delete":
                yield from self._delete(repository, tag)
            elif what == "withdraw":
                digest = oci.digest_of(self.chance.choice(self._mix.layers))
                yield from self._hastily(ask("withdraw", repository, digest))
            elif what == "revert" and repository in TEMPLATES:
                yield from self._ask(ask("revert", repository))
            elif what == "scrub":
                yield from self._ask(ask("scrub"))
            elif what in ("collect", "hasty"):
                asking = self._hastily if what == "hasty" else self._ask
                yield from asking(ask("collect", hasty=what == "hasty"))

    def _ask(self, call: Call) -> Any:
        outcome = yield call
        if isinstance(outcome, Exception):
            raise Wrong(f"a call failed: {outcome!r}") from outcome
        return outcome

    def _hastily(self, call: Call) -> Any:
        """A call after which a push that runs may have to bring its layers again."""
        self._hasty += 1
        yield from self._ask(call)
        self._hasty -= 1
        self._everyone_is_late()

    def _delete(self, repository: str, tag: str) -> Any:
        manifest = self.chance.random() < 0.3
        if repository in TEMPLATES:  # keep one version, or the template dies
            return
        gone = yield from self._ask(ask("delete", repository, tag, manifest=manifest))
        if gone is not None:
            names = {"digest": gone, "tag": ""} if oci.valid_digest(gone) else {"digest": "", "tag": gone}
            self.accepted.append(Accepted(repository=repository, deleted=True, **names))

    def _push(self, repository: str, tag: str) -> Any:
        layers = self.chance.sample(self._mix.layers, self.chance.choice((1, 1, 2)))
        manifest = registry.image_manifest(CONFIG, *layers)
        if repository in TEMPLATES:
            name = f"template {TEMPLATES.index(repository)}"
            manifest = registry.template_manifest(CONFIG, *layers, name=name, tag=tag)
        for _ in range(20):
            epoch = self._late_epoch
            for content in (CONFIG, *layers):
                yield from self._blob(repository, content)
            outcome = yield ask("push", repository, tag, manifest)
            if outcome is None:
                self.accepted.append(Accepted(repository, tag, oci.digest_of(manifest)))
                return
            if isinstance(outcome, errors.Refused) and "was deleted" in str(outcome):
                return  # two clients together took back its last version
            if not isinstance(outcome, catalog.BlobMissing):
                raise Wrong(f"a push failed: {outcome!r}") from outcome
            if epoch == self._late_epoch and not self._hasty:
                raise Wrong(f"a push was refused although its layers were there: {outcome}")
        raise Wrong("twenty pushes in a row were refused")

    def _blob(self, repository: str, content: bytes) -> Any:
        digest = oci.digest_of(content)
        if (yield from self._ask(ask("head", repository, digest))):
            return
        source = self.chance.choice(self._mix.repositories)
        if self.chance.random() < 0.4 and (yield from self._ask(ask("mount", repository, digest, source))):
            return
        while True:
            session = yield from self._ask(ask("begin"))
            offset = 0
            while offset < len(content):
                outcome = yield ask("write", session, content)
                if isinstance(outcome, blobs.NoSession):
                    break
                if isinstance(outcome, Exception):
                    raise Wrong(f"a piece was refused: {outcome!r}") from outcome
                offset = outcome
            else:
                outcome = yield ask("publish", repository, session, digest)
                if outcome is None:
                    return
                if not isinstance(outcome, blobs.NoSession):
                    raise Wrong(f"an upload was refused: {outcome!r}") from outcome

    # ---- what must hold in the end ---------------------------------------------------------------------------------

    def _judge(self) -> None:
        server, collecting = (Server(self.base, self._world, lambda _: None, bugs) for bugs in (Bugs(), self._bugs))
        _alone(self._check_logs(server))
        _alone(self._check_content(server))
        storage.age(self.base, hours=100)
        for _ in range(2):
            _alone(self._bugs.collector(collecting.catalog, collecting.care, collecting.care, ALL_GONE).run())
        _alone(self._check_content(server))
        _alone(self._check_garbage(server))

    async def _check_logs(self, server: Server) -> None:
        for repository in REPOSITORIES:
            raw = (await server.logs.read({repository: 0}))[repository]
            entries = [msgspec.json.decode(entry, type=views.Entry) for entry in raw]
            for one in (one for one in self.accepted if one.repository == repository):
                kinds = (views.Kind.DELETE,) if one.deleted else (views.Kind.PUSH, views.Kind.TAG)
                if not any(
                    entry.kind in kinds and (entry.tag, entry.digest) == (one.tag, one.digest) for entry in entries
                ):
                    raise Wrong(f"accepted, and not in the log: {one}")
            pushes = [entry for entry in entries if entry.kind in (views.Kind.PUSH, views.Kind.TAG)]
            numbers = [entry.version for entry in pushes if entry.version >= 0]
            if len(set(numbers)) != len(numbers):
                raise Wrong(f"{repository}: a version number was given twice: {numbers}")

    async def _check_content(self, server: Server) -> None:
        report = await verify.Verification(server.catalog, server.care, server.care).run()
        if report.problems:
            raise Wrong("verify: " + "; ".join(report.problems))
        for repository in REPOSITORIES:
            for tag in (await server.catalog.repository(repository)).tags:
                await server.pull(repository, tag)

    async def _check_garbage(self, server: Server) -> None:
        needed = await sweep.Collector(server.catalog, server.care, server.care, garbage.Periods()).needed()
        lying = {held.digest async for held in server.care.held(blobs.Place.SHELF)}
        if lying != set(needed.reasons):
            raise Wrong(f"garbage: {sorted(lying - set(needed.reasons))}, lost: {sorted(set(needed.reasons) - lying)}")
        for folder in ("trash", "quarantine", "uploads", "aside"):
            if left := [path.name for path in (self.base / folder).iterdir()]:
                raise Wrong(f"garbage in {folder}: {left}")
        for repository in REPOSITORIES:
            extra = set(await server.care.grants(repository)) - needed.by_repository.get(repository, frozenset())
            if extra:
                raise Wrong(f"{repository} may still read {sorted(extra)}")


def _alone(work: Coroutine[Any, Any, object]) -> object:
    """Run one coroutine on a loop of its own, on this thread."""
    loop = asyncio.new_event_loop()
    try:
        return loop.run_until_complete(work)
    finally:
        with contextlib.suppress(stage.Killed):
            loop.run_until_complete(loop.shutdown_asyncgens())
        loop.close()


def run(seed: int, bugs: Bugs | None = None, say: Callable[[str], None] = lambda _: None) -> int:
    """One history; how many steps it had. Raises Wrong."""
    return Play(seed, bugs or Bugs(), say).run()
