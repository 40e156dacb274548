"""Other nodes that have what this one pulls, or pull it too: whom to ask, and when to leave them.

    told        a controller named a few for a template, with tickets, the best first (`decide.neighbours`)
    Download    one blob: each of its ranges is asked of one of them; what nobody sends comes from the registry
    passing     what comes to this node, which others read along (`passing`, `sharing`)

Rules: bytes count only when the whole has its digest (promise I8, `client.pull`); what was wrong comes again, from the
registry alone, and those that had a part in it are not asked for a while. A node that finds out tells those that read
along, who begin anew with what comes to it next: so a liar costs the registry one more copy, not one for each node
behind it. One that cannot be reached, refuses or falls
silent is left at once; one that answers and has nothing new is waited for, since what it waits for it may soon have,
but for some seconds only. One that is slow is left when others, or it itself, have more of the blob than it sends: when
nobody has more, what all wait for is slow, and to leave would only add to its load.
"""

import asyncio
import contextlib
import re
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence

import aiohttp

from covey import model, observe, wire, world
from covey.agent import passing
from covey.client import oci, partial, pull

SCHEME = "Covey-Ticket"
HERE_HEADER = "Covey-Here"  # how many bytes of the blob a neighbour has
TRY_HEADER = "Covey-Try"  # which of its tries they are of, while they come
WRONG_HEADER = "Covey-Wrong"  # its last try of the blob that turned out wrong
_TEMPLATES = 100  # of which it is known who has them
_LINGER_S = 30.0
_ANEW = 2  # so often a blob is begun anew because a neighbour says so
_TOTAL = re.compile(r"bytes (\d+)-(\d+)/(\d+)")
_log = observe.log("neighbours")


class Limits(model.Noun, frozen=True, kw_only=True):
    """Patience with neighbours, in seconds unless the name says otherwise."""

    paper_s: float = 2.0  # so long a registry is waited for before one is asked for a manifest
    connect_s: float = 2.0
    answer_s: float = 5.0  # until one begins to answer
    quiet_s: float = 3.0  # without a byte: then it is asked again, to see whether it is there
    hope_s: float = 10.0  # without an answer from any: then the registry
    still_s: float = 20.0  # without a byte from any, though they answer
    turn_s: float = 1.0  # so much later each next one is tried while the ones before it have nothing yet
    again_s: float = 0.1
    banned_s: float = 600.0  # after wrong bytes
    away_s: float = 30.0  # after no connection
    pace_s: float = 5.0  # over which speed is judged
    slow_bytes_s: int = 1 << 20
    ahead_bytes: int = 8 << 20  # so much more has one that is worth changing to


class Neighbours:
    """Of one node. `session` is for requests to them; `port`: where this node serves them, 0 when it does not."""

    def __init__(
        self, clock: world.World, session: Callable[[], aiohttp.ClientSession], limits: Limits | None = None
    ) -> None:
        self.clock = clock
        self.session = session
        self.limits = limits or Limits()
        self.port = 0
        self.passing: dict[str, passing.Passing] = {}
        self.nonces: dict[str, int] = {}  # of the store's history: when this node first heard of them
        self.wrong: dict[str, str] = {}  # by digest: the last try that was wrong
        self._told: dict[str, tuple[wire.Neighbour, ...]] = {}
        self._banned: dict[str, int] = {}
        self._lingering: dict[passing.Passing, asyncio.TimerHandle] = {}

    def told(self, template: str, neighbours: tuple[wire.Neighbour, ...]) -> None:
        """A controller's word of who has a template."""
        self._told.pop(template, None)
        self._told[template] = neighbours
        if len(self._told) > _TEMPLATES:
            del self._told[next(iter(self._told))]

    def heard(self, nonce: str) -> int:
        """When this node first heard of the nonce, on its own clock."""
        at_ns = self.nonces.setdefault(nonce, self.clock.boot_ns())
        if len(self.nonces) > _TEMPLATES:
            del self.nonces[next(iter(self.nonces))]
        return at_ns

    def of(self, template: str) -> list[wire.Neighbour]:
        """Whom to ask, the best first."""
        now_ns = self.clock.boot_ns()
        return [one for one in self._told.get(template, ()) if self._banned.get(one.url, 0) <= now_ns]

    def ban(self, urls: Sequence[str], for_s: float) -> None:
        """Do not ask these for a while, whatever for."""
        until_ns = self.clock.boot_ns() + int(for_s * 1e9)
        self._banned = {url: at for url, at in self._banned.items() if at > self.clock.boot_ns()}
        self._banned.update(dict.fromkeys(urls, until_ns))

    async def has(self, template: str, digest: str) -> bool:
        """Whether one of them has this blob, or fetches it."""
        return any((await self.here(self.of(template), template, digest)).values())

    async def here(self, some: Sequence[wire.Neighbour], template: str, digest: str) -> dict[str, int]:
        """How many bytes of the blob each of these has, by URL; those that do not say are left out."""
        found = await asyncio.gather(*(self._here(one, template, digest) for one in some))
        return {one.url: size for one, size in zip(some, found, strict=True) if size is not None}

    async def _here(self, one: wire.Neighbour, template: str, digest: str) -> int | None:
        try:
            async with (
                asyncio.timeout(self.limits.answer_s),
                self.session().head(path(one, template, digest), headers=headers(one)) as answer,
            ):
                text = answer.headers.get(HERE_HEADER, "")
                return int(text) if answer.status == 200 and text.isdecimal() else None
        except (aiohttp.ClientError, OSError, TimeoutError, ValueError) as error:
            self.notice(one, error)
            return None

    async def paper(self, template: str, digest: str) -> bytes | None:
        """A manifest or config that one of them has, verified."""
        for one in self.of(template):
            try:
                async with (
                    asyncio.timeout(self.limits.answer_s),
                    self.session().get(path(one, template, digest), headers=headers(one)) as answer,
                ):
                    content = b""
                    while len(content) <= oci.MANIFEST_LIMIT and (more := await answer.content.readany()):
                        content += more
            except (aiohttp.ClientError, OSError, TimeoutError) as error:
                self.notice(one, error)
                continue
            if oci.digest_of(content, oci.algorithm_of(digest)) == digest:
                return content
        return None

    def notice(self, one: wire.Neighbour, error: Exception) -> None:
        """One that cannot be reached is not asked again for a while: it would cost each layer the same wait."""
        if isinstance(error, aiohttp.ClientConnectorError | aiohttp.ConnectionTimeoutError):
            self.ban((one.url,), self.limits.away_s)

    @contextlib.contextmanager
    def download(self, template: str, digest: str, *, alone: bool) -> Iterator["Download"]:
        """One blob comes. `alone`: the registry has none of this digest."""
        made = Download(self, template, digest, alone=alone)
        try:
            yield made
        finally:
            made.end()

    # ---- what others read ------------------------------------------------------------------------------------------

    def passes(self, digest: str, part: partial.Partial) -> passing.Passing:
        made = self.passing[digest] = passing.Passing(part, self.clock.token())
        return made

    def passed(self, digest: str, one: passing.Passing, *, whole: bool, wrong: bool = False) -> None:
        """It ended. Others that read it go on for a while when it is whole."""
        if wrong:
            self.wrong[digest] = one.token
            if len(self.wrong) > _TEMPLATES:
                del self.wrong[next(iter(self.wrong))]
        if not whole:
            one.broken()
            self._forget(digest, one)
            return
        loop = asyncio.get_running_loop()
        self._lingering[one] = loop.call_later(_LINGER_S, self._forget, digest, one)

    def _forget(self, digest: str, one: passing.Passing) -> None:
        self._lingering.pop(one, None)
        one.close()
        if self.passing.get(digest) is one:
            del self.passing[digest]

    def close(self) -> None:
        for timer in self._lingering.values():
            timer.cancel()
        self._lingering.clear()
        for one in self.passing.values():
            one.close()
        self.passing.clear()


class Download:
    """One blob as others have it: `client.pull.Near`. Several ranges of it at once."""

    def __init__(self, all_: Neighbours, template: str, digest: str, *, alone: bool) -> None:
        self.alone = alone
        self._all = all_
        self._limits = all_.limits
        self._template = template
        self._digest = digest
        self._part: partial.Partial | None = None
        self._passing: passing.Passing | None = None
        self._whole = self._over = False
        self._tries: set[str] = set()  # of others, that bytes came from
        self._begun_anew = 0
        self._left: set[str] = set()
        self._again_at: dict[str, float] = {}
        self._pace: dict[str, tuple[float, int]] = {}  # by URL: since when, how many bytes
        self.sent: dict[str, int] = {}  # by URL: bytes that came from it
        self._heard_at = self._moved_at = _now()

    # ---- the partial file ------------------------------------------------------------------------------------------

    def begins(self, part: partial.Partial) -> None:
        self._drop(wrong=False)
        self._part, self._passing = part, self._all.passes(self._digest, part)
        self._heard_at = self._moved_at = _now()

    def right(self) -> None:
        self._whole = True
        if self._passing is not None:
            self._passing.verified()

    def wrong(self) -> bool:
        self._drop(wrong=True)
        self._over = True
        if self.sent:
            _log.warning("what neighbours sent was wrong and is thrown away", digest=self._digest, urls=[*self.sent])
            self._all.ban(tuple(self.sent), self._limits.banned_s)
        helped = bool(self.sent)
        self.sent = {}
        return helped

    def end(self) -> None:
        if self._passing is not None:
            self._all.passed(self._digest, self._passing, whole=self._whole)
        if self.sent:
            _log.info("neighbours sent parts of a layer", digest=self._digest, size_bytes=sum(self.sent.values()))

    def _drop(self, *, wrong: bool) -> None:
        if self._passing is not None:
            self._all.passed(self._digest, self._passing, whole=False, wrong=wrong)
            self._passing = None

    def _hear_of_wrong(self, answer: aiohttp.ClientResponse) -> None:
        """Raises Anew when a neighbour says that a try of its was wrong which bytes came from."""
        if answer.headers.get(WRONG_HEADER, "") not in self._tries:
            return
        self._drop(wrong=True)
        self._tries.clear()
        self._begun_anew += 1
        self._over = self._begun_anew > _ANEW
        _log.info("what a neighbour sent was wrong, it says; the layer is begun anew", digest=self._digest)
        raise pull.Anew

    # ---- ranges ----------------------------------------------------------------------------------------------------

    async def pieces(self, start: int, end: int) -> AsyncGenerator[bytes, None]:
        place = start
        while place < end and (one := await self._next()) is not None:
            async with contextlib.aclosing(self._from(one, place, end)) as chunks:
                async for chunk in chunks:
                    place += len(chunk)
                    yield chunk

    async def _next(self) -> wire.Neighbour | None:
        """Who is asked now; None: nobody any more."""
        while not self._over:
            there = [one for one in self._all.of(self._template) if one.url not in self._left]
            now = _now()
            unheard_s = now - self._heard_at
            if not there or unheard_s > self._limits.hope_s or now - self._moved_at > self._limits.still_s:
                self._over = True
                break
            for rank, one in enumerate(there):
                if unheard_s >= rank * self._limits.turn_s and now >= self._again_at.get(one.url, 0.0):
                    return one
            await asyncio.sleep(self._limits.again_s / 2)
        return None

    async def _from(self, one: wire.Neighbour, start: int, end: int) -> AsyncGenerator[bytes, None]:
        """What one neighbour sends of a range."""
        place, answered = start, False
        limits = aiohttp.ClientTimeout(total=None, sock_connect=self._limits.connect_s, sock_read=self._limits.quiet_s)
        try:
            async with contextlib.AsyncExitStack() as stack:
                async with asyncio.timeout(self._limits.answer_s):
                    request = self._all.session().get(
                        path(one, self._template, self._digest),
                        headers={**headers(one), "Range": f"bytes={start}-{end - 1}"},
                        timeout=limits,
                        allow_redirects=False,
                    )
                    answer = await stack.enter_async_context(request)
                answered = self._takes(one, answer, start, end)
                while answered and (chunk := await answer.content.readany()):
                    if place + len(chunk) > end:
                        self._leave(one, "it sends more than it was asked for")
                        break
                    place += len(chunk)
                    self._moved(one, len(chunk))
                    yield chunk
                    await self._judge(one)
                    answered = one.url not in self._left
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            self._all.notice(one, error)
            if not answered:
                self._leave(one, f"{type(error).__name__} {error}".strip())
                return
            self._again_at[one.url] = _now() + (0.0 if isinstance(error, TimeoutError) else self._limits.again_s)
            await self._judge(one)

    def _takes(self, one: wire.Neighbour, answer: aiohttp.ClientResponse, start: int, end: int) -> bool:
        """Whether the answer is the range that was asked for."""
        self._hear_of_wrong(answer)
        if answer.status in (404, 503):  # it has nothing of it yet, or is busy
            self._again_at[one.url] = _now() + self._limits.again_s * (1 if answer.status == 404 else 5)
            return False
        found = _TOTAL.fullmatch(answer.headers.get("Content-Range", ""))
        size = self._part.size_bytes if self._part is not None else 0
        if answer.status != 206 or found is None or tuple(map(int, found.groups())) != (start, end - 1, size):
            self._leave(one, f"it answers {answer.status}")
            return False
        self._heard_at = _now()
        if token := answer.headers.get(TRY_HEADER, ""):
            self._tries.add(token)
        return True

    def _leave(self, one: wire.Neighbour, why: str) -> None:
        if one.url not in self._left:
            _log.info("a neighbour does not help", url=one.url, digest=self._digest, why=why)
        self._left.add(one.url)

    # ---- speed -----------------------------------------------------------------------------------------------------

    def _moved(self, one: wire.Neighbour, size: int) -> None:
        self._heard_at = self._moved_at = _now()
        self.sent[one.url] = self.sent.get(one.url, 0) + size
        since, before = self._pace.get(one.url, (self._moved_at, 0))
        self._pace[one.url] = (since, before + size)

    async def _judge(self, one: wire.Neighbour) -> None:
        """Leave it when it is slow, and not because what it waits for is."""
        since, moved = self._pace.setdefault(one.url, (_now(), 0))
        past_s = _now() - since
        if past_s < self._limits.pace_s:
            return
        self._pace[one.url] = (_now(), 0)
        if moved >= past_s * self._limits.slow_bytes_s or self._part is None:
            return
        there = [other for other in self._all.of(self._template) if other.url not in self._left]
        here = await self._all.here(there, self._template, self._digest)
        if one.url not in here:
            self._leave(one, "it does not answer")
            return
        ours = self._part.here_bytes
        enough = ours + min(self._limits.ahead_bytes, max(self._part.size_bytes - ours, 2) // 2)
        if any(size >= enough for size in here.values()):
            self._leave(one, f"it is slow: {moved / past_s / 1e6:.2f} MB/s")


def path(one: wire.Neighbour, template: str, digest: str) -> str:
    return f"{one.url}/layers/v1/{template}/{digest}"


def headers(one: wire.Neighbour) -> dict[str, str]:
    return {"Authorization": f"{SCHEME} {one.ticket}"}


def _now() -> float:
    return asyncio.get_running_loop().time()
