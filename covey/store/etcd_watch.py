"""Watching etcd: every revision once, whole and in order, whatever members die meanwhile (safety S20).

An answer of etcd holds events of many revisions, and a large answer is cut into fragments anywhere, inside a revision
too. So events are gathered, and a revision is passed on only when an answer with fragment=false, or a higher revision,
has followed. When a stream breaks, what was gathered of an unfinished revision is thrown away, and the next stream
starts at the last whole revision + 1.

A silent stream is asked for its progress, and is given up when no answer comes: so a hung member is noticed. What that
answer *says* is not used: in etcd before 3.4.25 and 3.5.8 it may overtake events that are still to come (etcd #15220).
"""

import asyncio
from collections.abc import AsyncGenerator, Iterator

import grpc
import grpc.aio

from covey import errors
from covey.store import base, etcd_codec, etcd_endpoints, etcd_errors
from covey.store.etcdpb import etcd_pb2 as pb


class Revisions:
    """Puts whole revisions together from answers. `next` is the first revision not yet passed on."""

    def __init__(self, start_revision: int) -> None:
        self.next = start_revision
        self._revision = 0
        self._gathered: list[base.Change] = []

    def feed(self, answer: pb.WatchResponse) -> Iterator[base.Batch]:
        """The revisions that `answer` completes."""
        for event in answer.events:
            revision = event.kv.mod_revision
            if revision < self.next:
                continue
            if revision != self._revision:
                yield from self._finish()
                self._revision = revision
            self._gathered.append(etcd_codec.change(event))
        if not answer.fragment:
            yield from self._finish()

    def cut(self) -> None:
        """The stream broke: forget the unfinished revision."""
        self._gathered = []

    def _finish(self) -> Iterator[base.Batch]:
        if self._gathered:
            batch = base.Batch(self._revision, tuple(self._gathered))
            self._gathered = []
            self.next = self._revision + 1
            yield batch


class _Ended(Exception):
    """The stream is of no use any more; the text says why."""


class _NotPermitted(_Ended):
    """The member does not let us watch; that may be so because it has forgotten our token."""


class Watch:
    """Whole revisions of [key, end) from `start_revision` on; a watch carried from member to member. Each begins on
    another member than the last: whoever opens a watch anew because the old one fell behind gets another view."""

    def __init__(self, pool: etcd_endpoints.Pool, key: str, end: str, start_revision: int) -> None:
        self._pool = pool
        self._span = (key, end)
        self._revisions = Revisions(start_revision)
        self._endpoint: etcd_endpoints.Endpoint | None = None
        self._failures = 0
        self._refusals = 0

    async def run(self) -> AsyncGenerator[base.Batch, None]:
        """For ever. Raises Compacted, Rejected, or CancelledError when the store is closed."""
        while not self._pool.closed.is_set():
            self._endpoint = self._pool.pick(other_than=self._pool.watched)
            self._pool.watched = self._endpoint
            stream = Stream(self._pool, self._endpoint, self._patience_s())
            try:
                await stream.open(*self._span, self._revisions.next)
                while True:
                    answer = await stream.events()
                    self._failures = self._refusals = 0
                    for batch in self._revisions.feed(answer):
                        yield batch
            except _NotPermitted as refusal:
                await self._log_in_again(stream, refusal)
            except _Ended as broken:
                await self._part(str(broken))
            except grpc.aio.AioRpcError as broken:
                if etcd_errors.judge(broken) is etcd_errors.Verdict.LOGIN:
                    await self._log_in_again(stream, _NotPermitted(etcd_errors.describe(broken)))
                await self._part(etcd_errors.describe(broken))
            finally:
                await stream.close()
            self._revisions.cut()
        raise asyncio.CancelledError

    def _patience_s(self) -> float:
        """How long silence is borne. It grows when streams fail one after another: etcd that searches a long history
        for a few events is silent too, and newer ones give no progress meanwhile."""
        return float(min(self._pool.attempt_s / 2 * 2 ** max(self._failures - len(self._pool.endpoints), 0), 30.0))

    async def _part(self, reason: str) -> None:
        """Leave the member; wait a little when there is no better one."""
        if self._pool.closed.is_set() or self._endpoint is None:
            return
        self._failures += 1
        self._pool.avoid(self._endpoint, f"watch: {reason}")
        if self._pool.all_avoided():
            await asyncio.sleep(etcd_endpoints.PAUSES_S[-1] * (0.5 + self._pool.chance() / 2))

    async def _log_in_again(self, stream: "Stream", refusal: _NotPermitted) -> None:
        self._refusals += 1
        if self._refusals > 1:
            raise errors.Rejected(str(refusal)) from None
        await self._pool.log_in_again(stream.metadata)


class Stream:
    """One watch on one member."""

    def __init__(self, pool: etcd_endpoints.Pool, endpoint: etcd_endpoints.Endpoint, patience_s: float) -> None:
        self.metadata: etcd_endpoints.Metadata = ()
        self._pool = pool
        self._endpoint = endpoint
        self._patience_s = patience_s
        self._call: grpc.aio.StreamStreamCall[pb.WatchRequest, pb.WatchResponse] | None = None
        self._reading: asyncio.Task[object] | None = None

    async def open(self, key: str, end: str, start_revision: int) -> None:
        """Create the watch and wait until the member has confirmed it."""
        if not await self._endpoint.connected(self._pool.attempt_s):
            raise _Ended("it does not accept connections")
        self.metadata = await self._pool.metadata()
        self._call = self._endpoint.stream(etcd_endpoints.WATCH, self.metadata)
        wanted = pb.WatchCreateRequest(
            key=base.to_bytes(key), range_end=base.to_bytes(end), start_revision=start_revision, fragment=True
        )
        await self._ask(pb.WatchRequest(create_request=wanted))
        answer = await self._next(self._pool.attempt_s)
        if answer is None or not answer.created:
            raise _Ended("it does not confirm the watch")

    async def events(self) -> pb.WatchResponse:
        """The next answer that holds events. Raises _Ended when the member is gone or silent, or Compacted."""
        while True:
            answer = await self._next(self._patience_s)
            if answer is None:
                await self._ask(pb.WatchRequest(progress_request=pb.WatchProgressRequest()))
                answer = await self._next(self._patience_s)
                if answer is None:
                    raise _Ended("it does not answer")
            if answer.events:
                return answer

    @property
    def _open_call(self) -> "grpc.aio.StreamStreamCall[pb.WatchRequest, pb.WatchResponse]":
        if self._call is None:
            raise _Ended("the watch is not open")
        return self._call

    async def _ask(self, question: pb.WatchRequest) -> None:
        try:
            async with asyncio.timeout(self._pool.attempt_s):
                await self._open_call.write(question)
        except TimeoutError:
            raise _Ended("it takes no questions") from None
        except asyncio.InvalidStateError:
            raise _Ended("the stream is over") from None

    async def _next(self, timeout_s: float) -> pb.WatchResponse | None:
        """The next answer, None when none came in time: the read goes on, for to cancel it would end the stream."""
        if self._reading is None:
            self._reading = asyncio.ensure_future(self._open_call.read())
        done, _ = await asyncio.wait({self._reading}, timeout=timeout_s)
        if not done:
            return None
        answer, self._reading = self._reading.result(), None
        if not isinstance(answer, pb.WatchResponse):
            raise _Ended("it ended the stream")
        if answer.compact_revision:
            raise errors.Compacted(answer.compact_revision)
        if answer.canceled:
            refused = "permission denied" in answer.cancel_reason or "auth" in answer.cancel_reason
            raise (_NotPermitted if refused else _Ended)(answer.cancel_reason or "it cancelled the watch")
        return answer

    async def close(self) -> None:
        if self._call is not None:
            self._call.cancel()
        if self._reading is not None:
            self._reading.cancel()
            await asyncio.gather(self._reading, return_exceptions=True)


async def oldest_revision(pool: etcd_endpoints.Pool) -> int:
    """The oldest revision that etcd still keeps, 1 when it keeps all: only a refused watch says it."""
    row = etcd_endpoints.Attempts(pool, etcd_endpoints.WATCH.path)
    while True:
        endpoint, _ = await row.next()
        stream = Stream(pool, endpoint, pool.attempt_s)
        try:
            async with asyncio.timeout(pool.attempt_s):
                await stream.open(base.EVERYTHING, base.EVERYTHING, 1)
                await stream.events()  # etcd confirms a watch first and refuses it then
        except errors.Compacted as compacted:
            return compacted.revision
        except (_Ended, TimeoutError):
            row.hung(endpoint)
        except grpc.aio.AioRpcError as error:
            await row.failed(endpoint, error, stream.metadata)
        else:
            return 1
        finally:
            await stream.close()
