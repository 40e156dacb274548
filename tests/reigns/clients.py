"""What clients of real registries do in a history, and what they must never see.

Three push and delete tags of one template, each its own; one pushes and takes back versions of another template, each
step until it is acknowledged; others read both, through any server:

* a tag's digest is one that was pushed under it; a manifest and its layers have their digests' bytes, or do not come;
* one number is one version, whichever server says so, for ever;
* "no such tag" of a tag that is certainly there is said by nobody (safety S14): who cannot know says 503.
"""

import asyncio
import collections
import json
import random
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from typing import Any

import aiohttp
import msgspec

from covey.client import oci
from covey.registry import views
from tests.reigns import verdict
from tests.support import fleet, registry

ONE = "templates/7a3f5f5e-6d0c-4b87-9c15-3f1f2a3b4c5d"
TWO = "templates/0b9d2f61-52c4-4e9b-8f0e-9a1d6c7e8f90"
NAMES = {ONE: "one", TWO: "two"}
CONFIG = registry.template_config()
PUSHING = 3
_LARGE = 40_000  # so often is a layer's text repeated in a large one: some MiB
_PIECE = 256 << 10
_ATTEMPT_S = 20.0

Tag = tuple[str, str]  # of a repository


class Clients:
    """Of one history. `stormy` False: they come to their end."""

    def __init__(self, members: Sequence[fleet.Member], chance: random.Random, say: Callable[[str], None]) -> None:
        self.members = members
        self.chance = chance
        self.say = say
        self.stormy = True
        self.tried = self.reads = 0
        self.done: list[verdict.Done] = []
        self.steps: list[verdict.Step] = []  # of TWO
        self._pushed: dict[Tag, set[str]] = collections.defaultdict(set)  # digests that were tried
        self._stands: dict[Tag, tuple[int, str | None]] = {}  # the attempt, and what is there since: None if not known
        self._numbers: dict[tuple[str, int], tuple[str, str]] = {}
        self._tasks: list[asyncio.Task[None]] = []

    async def begin(self) -> None:
        """Something is there before anything goes wrong."""
        for repository in (ONE, TWO):
            while not await self.attempt(verdict.Done(repository, "kept", "kept"), self.chance.choice(self.members)):
                await asyncio.sleep(0.2)
        kept = next(done for done in self.done if done.repository == TWO)
        self.steps.append(verdict.Step(views.Kind.PUSH, "kept", kept.digest, kept.number or 0))
        work = [self._taking_back(), self._reading(), self._reading()]
        work += [self._pushing(number) for number in range(PUSHING)]
        self._tasks = [asyncio.create_task(one) for one in work]

    async def end(self) -> None:
        self.stormy = False
        await asyncio.gather(*self._tasks)

    def check(self) -> None:
        """Raises what a client has seen."""
        for task in self._tasks:
            if task.done():
                task.result()

    async def stop(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    # ---- pushes and deletes ----------------------------------------------------------------------------------------

    async def _pushing(self, number: int) -> None:
        while self.stormy:
            await asyncio.sleep(self.chance.uniform(0.0, 0.8))
            tag = f"c{number}-{self.chance.randrange(2)}"
            layer = "" if self.chance.random() < 0.2 else self._layer(number)
            wish = verdict.Done(ONE, tag, layer)
            for _ in range(self.chance.choice((1, 2, 5))):
                if await self.attempt(wish, self.chance.choice(self.members)):
                    break
                await asyncio.sleep(self.chance.uniform(0.1, 1.0))

    def _layer(self, number: int) -> str:
        self.tried += 1
        return f"layer {number} {self.tried} " * (_LARGE if self.chance.random() < 0.15 else 1)

    async def attempt(self, wish: verdict.Done, member: fleet.Member) -> bool:
        """Whether it was acknowledged, or there is nothing to delete."""
        place = wish.repository, wish.tag
        mark = self._stands.get(place, (0, ""))[0] + 1
        self._stands[place] = mark, None
        try:
            async with asyncio.timeout(_ATTEMPT_S):
                if not wish.digest:
                    return await self._delete(wish, member, mark)
                return await self._push(wish, member, mark)
        except (aiohttp.ClientError, TimeoutError, OSError):
            return False

    async def _push(self, wish: verdict.Done, member: fleet.Member, mark: int) -> bool:
        layer, place = wish.digest.encode(), (wish.repository, wish.tag)
        manifest = registry.template_manifest(CONFIG, layer, name=NAMES[wish.repository], tag=wish.tag)
        digest = oci.digest_of(manifest)
        for content in (CONFIG, layer):
            path = f"/v2/{wish.repository}/blobs/uploads/?digest={oci.digest_of(content)}"
            status, _, answer = await member.call("POST", path, self._slowly(content))
            if status != 201:
                _check(status, answer, (503,))
                return False
        self._pushed[place].add(digest)
        status, headers, answer = await member.put_manifest(wish.repository, wish.tag, manifest, Covey_Force="true")
        if status != 201:
            _check(status, answer, (404, 503))  # 404: the blobs went to the one that held the role before
            return False
        number = int(headers[oci.VERSION_HEADER])
        self.say(f"acknowledged {wish.tag} as {number} through {member.number}")
        self._see(wish.repository, number, wish.tag, digest)
        self.done.append(verdict.Done(wish.repository, wish.tag, digest, number))
        self._stands[place] = mark, digest
        return True

    async def _slowly(self, content: bytes) -> AsyncIterator[bytes]:
        """So that something may happen meanwhile."""
        for start in range(0, len(content), _PIECE):
            yield content[start : start + _PIECE]
            await asyncio.sleep(self.chance.uniform(0.0, 0.1) if len(content) > _PIECE else 0)

    async def _delete(self, wish: verdict.Done, member: fleet.Member, mark: int) -> bool:
        status, _, answer = await member.call("DELETE", f"/v2/{wish.repository}/manifests/{wish.tag}")
        _check(status, answer, (202, 404, 503))
        if status == 202:
            self.say(f"acknowledged the end of {wish.tag} through {member.number}")
            self.done.append(verdict.Done(wish.repository, wish.tag, ""))
            self._stands[wish.repository, wish.tag] = mark, ""
        return status != 503

    # ---- versions that are taken back ------------------------------------------------------------------------------

    async def _taking_back(self) -> None:
        there: list[str] = []
        count = 0
        while self.stormy:
            await asyncio.sleep(self.chance.uniform(0.0, 1.0))
            count += 1
            if len(there) > 1 and self.chance.random() < 0.5:
                tag = self.chance.choice(there)
                if not await self._until(lambda: self._take_back(tag, f"request {count}")):  # noqa: B023
                    return
                there = there[: there.index(tag)]
                continue
            tag = f"t{count}"
            wish = verdict.Done(TWO, tag, self._layer(PUSHING))
            if not await self._until(lambda: self.attempt(wish, self.chance.choice(self.members))):  # noqa: B023
                return
            there.append(tag)
            self.steps.append(verdict.Step(views.Kind.PUSH, tag, self.done_of(tag).digest, self.done_of(tag).number))

    async def _until(self, work: Callable[[], Coroutine[Any, Any, bool]]) -> bool:
        """False: the storm is over, and nobody knows whether it was taken."""
        while not await work():
            if not self.stormy:
                return False
            await asyncio.sleep(self.chance.uniform(0.1, 1.0))
        return True

    def done_of(self, tag: str) -> verdict.Done:
        return next(done for done in reversed(self.done) if (done.repository, done.tag) == (TWO, tag))

    async def _take_back(self, tag: str, request: str) -> bool:
        later = [place for place in self._stands if place[0] == TWO and place[1] != "kept"]
        for place in later:
            self._stands[place] = self._stands[place][0] + 1, None
        member = self.chance.choice(self.members)
        try:
            async with asyncio.timeout(_ATTEMPT_S):
                headers = {"Idempotency_Key": request}
                status, _, answer = await member.call("DELETE", f"/registry/revert?id=two&tag={tag}", **headers)
        except (aiohttp.ClientError, TimeoutError, OSError):
            return False
        if status == 503:
            return False
        body = json.loads(answer)
        if status != 200 or body["status"] != "OK":
            raise verdict.Wrong(f"revert of {tag}: HTTP {status} {body}")
        self.say(f"acknowledged that {tag} was taken back, through {member.number}")
        self.steps.append(verdict.Step(views.Kind.REVERT, request, "", self.done_of(tag).number))
        return True

    # ---- readers ---------------------------------------------------------------------------------------------------

    async def _reading(self) -> None:
        while self.stormy:
            await asyncio.sleep(self.chance.uniform(0.0, 0.3))
            member = self.chance.choice(self.members)
            try:
                async with asyncio.timeout(_ATTEMPT_S):
                    await self.read(member, self.chance.choice(sorted(self._stands)))
            except (aiohttp.ClientError, TimeoutError, OSError):
                continue

    async def read(self, member: fleet.Member, place: Tag) -> bool:
        """One tag with all that it needs; whether all of it came. Raises Wrong."""
        repository, tag = place
        before = self._stands[place]
        status, _, content = await member.call("GET", f"/registry/vm/info?id={NAMES[repository]}&tag={tag}")
        _check(status, content, (200, 503))
        if status != 200:
            return False
        self.reads += 1
        answer = json.loads(content)
        if answer["status"] != "OK":
            if self._stands[place] == before and before[1]:
                raise verdict.Wrong(f"server {member.number} says {answer['message']!r} of {place}, which is {before}")
            return False
        digest = answer["body"]["digest"]
        if digest not in self._pushed[place]:
            raise verdict.Wrong(f"server {member.number} says that {place} is {digest}, which nobody pushed there")
        self._see(repository, answer["body"]["number"], tag, digest)
        manifest = await self._content(member, f"/v2/{repository}/manifests/{digest}", digest)
        if manifest is None:
            return False
        named = json.loads(manifest)
        for blob in (named["config"], *named["layers"]):
            if await self._content(member, f"/v2/{repository}/blobs/{blob['digest']}", blob["digest"]) is None:
                return False
        return True

    async def _content(self, member: fleet.Member, path: str, digest: str) -> bytes | None:
        status, _, content = await member.call("GET", path)
        _check(status, content, (200, 503))
        if status != 200:
            return None
        if oci.digest_of(content) != digest:
            raise verdict.Wrong(f"server {member.number} sent {len(content)} wrong bytes for {path}")
        return content

    def _see(self, repository: str, number: int, tag: str, digest: str) -> None:
        known = self._numbers.setdefault((repository, number), (tag, digest))
        if known != (tag, digest):
            raise verdict.Wrong(f"version {number} of {repository} is {known} and {tag, digest}")

    async def all_can_be_read(self, entries: Sequence[bytes]) -> bool:
        """Every living tag of ONE, through every server, with all that it needs."""
        log = [msgspec.json.decode(raw, type=views.Entry) for raw in entries]
        tags = views.fold(views.Repository(name=ONE), log).tags
        for member in self.members:
            for tag in tags:
                try:
                    if not await self.read(member, (ONE, tag)):
                        return False
                except (aiohttp.ClientError, TimeoutError, OSError):
                    return False
        return True


def _check(status: int, answer: bytes, fine: tuple[int, ...]) -> None:
    if status not in fine:
        raise verdict.Wrong(f"HTTP {status}: {answer.decode(errors='replace')[:300]}")
