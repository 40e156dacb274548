"""Objects made of others inside the store (UploadPartCopy): no byte passes through this server.

Source: https://docs.aws.amazon.com/AmazonS3/latest/API/API_UploadPartCopy.html. Limits: a part has 5 MiB at least, but
for the last, and 5 GiB at most; an object has 10,000 of them. The S3 library has no such request, so these are sent by
ourselves, with the credentials of the environment; where those come from elsewhere (a machine's role), nothing can be
joined, and callers take the long way.

The target appears when all of it is there. What is begun and fails is aborted. An answer that was lost is asked for
again: copying a part twice does no harm, and a completion that has happened is seen by the target's size.
"""

import asyncio
import datetime
import itertools
import re
import ssl
import urllib.parse
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import NamedTuple
from xml.sax import saxutils

import aiohttp
import yarl

from covey import errors, world
from covey.registry import s3_sign

LEAST_BYTES = 5 << 20  # of a part that is not the last
COPY_BYTES = 5 << 30  # that one copy takes
_PIECE = 1 << 30  # one request: many at once are faster than a few long ones
_PIECES = 10_000
_AT_ONCE = 8
_TRIES = 4
_PAUSE_S = 0.5
_TIMEOUT_S = 600.0


class Source(NamedTuple):
    """An object, all of which goes in."""

    key: str
    size_bytes: int


class Piece(NamedTuple):
    key: str
    start: int
    end: int


class _Answer(NamedTuple):
    status: int
    text: str

    @property
    def good(self) -> bool:
        """The store may begin with 200 and tell of its fault in the text."""
        return self.status < 300 and "<Error>" not in self.text

    def value(self, name: str) -> str:
        """Of an element without children."""
        found = re.search(rf"<{name}>([^<]*)</{name}>", self.text)
        return "" if found is None else saxutils.unescape(found[1], {"&quot;": '"'})


def fits(sources: Sequence[Source]) -> bool:
    """Whether S3 can join these."""
    small = any(source.size_bytes < LEAST_BYTES for source in sources[:-1])
    return not small and 0 < len(pieces(sources)) <= _PIECES


def pieces(sources: Sequence[Source]) -> list[Piece]:
    """Each source in parts of about one size, so that none is too small."""
    found = []
    for source in sources:
        count = -(-source.size_bytes // _PIECE)
        edges = [source.size_bytes * number // count for number in range(count + 1)] if count else []
        found += [Piece(source.key, start, end) for start, end in itertools.pairwise(edges)]
    return found


class Joiner:
    """`url`: of the bucket. `trust`: a file of authorities, or False for none."""

    def __init__(
        self, bucket: str, url: str, mine: s3_sign.Credentials, world: world.World, trust: Path | bool | None
    ) -> None:
        self._bucket = bucket
        self._url = url.rstrip("/")
        self._mine = mine
        self._world = world
        self._ssl: ssl.SSLContext | bool = trust if isinstance(trust, bool) else True
        if isinstance(trust, Path):
            self._ssl = ssl.create_default_context(cafile=trust)

    async def join(self, target: str, sources: Sequence[Source], there: Callable[[], Awaitable[bool]]) -> None:
        """Make `target` of `sources`, which `fits` them. `there`: whether it is there whole. Raises FileNotFoundError
        for a source that is gone, Unavailable."""
        limits = aiohttp.ClientTimeout(total=_TIMEOUT_S, sock_connect=5.0)
        connector = aiohttp.TCPConnector(ssl=self._ssl)
        async with aiohttp.ClientSession(connector=connector, timeout=limits) as session:
            began = await self._asked(session, "POST", f"{target}?uploads=")
            if not (upload := began.value("UploadId")):
                raise self._fault(began)
            query = f"uploadId={urllib.parse.quote(upload, safe='')}"
            try:
                tags = await self._copied(session, target, query, pieces(sources))
                await self._complete(session, target, query, tags, there)
            except BaseException:
                await asyncio.shield(self._abort(session, f"{target}?{query}"))
                raise

    async def _copied(self, session: aiohttp.ClientSession, target: str, query: str, wanted: list[Piece]) -> list[str]:
        """Copy all; their entity tags."""
        free = asyncio.Semaphore(_AT_ONCE)

        async def one(number: int, piece: Piece) -> str:
            headers = {
                "x-amz-copy-source": f"/{self._bucket}/{piece.key}",
                "x-amz-copy-source-range": f"bytes={piece.start}-{piece.end - 1}",
            }
            async with free:
                answer = await self._asked(session, "PUT", f"{target}?partNumber={number}&{query}", headers)
            if not (tag := answer.value("ETag")):
                raise self._fault(answer)
            return tag

        copying = [asyncio.ensure_future(one(number, piece)) for number, piece in enumerate(wanted, 1)]
        try:
            return await asyncio.gather(*copying)
        finally:
            for task in copying:
                task.cancel()
            await asyncio.gather(*copying, return_exceptions=True)

    async def _complete(
        self,
        session: aiohttp.ClientSession,
        target: str,
        query: str,
        tags: list[str],
        there: Callable[[], Awaitable[bool]],
    ) -> None:
        parts = "".join(
            f"<Part><PartNumber>{number}</PartNumber><ETag>{saxutils.escape(tag)}</ETag></Part>"
            for number, tag in enumerate(tags, 1)
        )
        body = f"<CompleteMultipartUpload>{parts}</CompleteMultipartUpload>".encode()
        try:
            answer = await self._asked(session, "POST", f"{target}?{query}", {}, body)
        except FileNotFoundError:  # no such upload: an attempt whose answer was lost has ended it
            answer = _Answer(404, "<Code>NoSuchUpload</Code>")
        if not answer.good and not await there():
            raise self._fault(answer)

    async def _abort(self, session: aiohttp.ClientSession, path: str) -> None:
        try:
            await self._asked(session, "DELETE", path)
        except (errors.Unavailable, FileNotFoundError):
            return  # a life-cycle rule of the bucket collects it

    async def _asked(
        self,
        session: aiohttp.ClientSession,
        method: str,
        path: str,
        headers: dict[str, str] | None = None,
        body: bytes = b"",
    ) -> _Answer:
        """An answer, good or not, after some tries. Raises Unavailable, and FileNotFoundError for 404."""
        answer = _Answer(0, "")
        why = ""
        for number in range(_TRIES):
            if number:
                await asyncio.sleep(_PAUSE_S * 2**number)
            now = datetime.datetime.fromtimestamp(self._world.wall_ns() / 1e9, datetime.UTC)
            url = f"{self._url}/{path}"
            sent = s3_sign.signed(self._mine, method, url, headers or {}, body, now)
            try:
                async with session.request(method, yarl.URL(url, encoded=True), headers=sent, data=body) as found:
                    answer = _Answer(found.status, await found.text())
            except (aiohttp.ClientError, TimeoutError) as error:
                why = str(error) or type(error).__name__
                continue
            if answer.status == 404:
                raise FileNotFoundError(path.partition("?")[0])
            if answer.good or (answer.status < 500 and answer.value("Code") not in ("SlowDown", "InternalError")):
                return answer
        raise self._fault(answer, why)

    def _fault(self, answer: _Answer, why: str = "") -> errors.Unavailable:
        told = " ".join((str(answer.status or ""), answer.value("Code"), why)).strip()
        return errors.Unavailable(f"bucket {self._bucket}: cannot join ({told})")
