"""Leases of etcd: granted under ids of our own, renewed many in one stream, lost by our own clock.

A lease's end is counted from the moment a question was *sent*: the server cannot have started its own count earlier.
So `lost` turns true no later than the server ends the lease, whatever happens to the answers in between.

Leases live in the leader. So renewals go to it, if it is known: half the processor time of asking another member.

Ids are ours so that a grant can be repeated: "already exists" is then the answer to a question whose reply was lost.
"""

import asyncio
import hashlib
from collections.abc import Iterator, Sequence

import grpc
import grpc.aio

from covey import errors
from covey.store import etcd_endpoints
from covey.store.etcdpb import etcd_pb2 as pb

CHUNK = 100  # leases renewed in one stream, one after another; a follower would ask the leader for each, over HTTP
STREAMS = 8  # at once


class Lease:
    """A `base.Lease`."""

    def __init__(self, pool: etcd_endpoints.Pool, id: int, ttl_s: float, ends_ns: int) -> None:
        self.id = id
        self.ttl_s = ttl_s
        self._pool = pool
        self._ends_ns = ends_ns
        self._gone = False

    @property
    def lost(self) -> bool:
        return self._gone or self._pool.now_ns() >= self._ends_ns

    async def keep_alive(self) -> None:
        while not self.lost:
            sent_ns = self._pool.now_ns()
            left_s = max((self._ends_ns - sent_ns) / 1e9, 0.001)
            try:
                answered_s = (await renew(self._pool, [self.id], timeout_s=left_s))[self.id]
            except errors.Unavailable:
                await self._pool.sleep(etcd_endpoints.PAUSES_S[0])
                continue
            if answered_s <= 0:
                self._gone = True
                break
            if not self.lost:  # an answer that comes after the end extends nothing
                self._ends_ns = max(self._ends_ns, sent_ns + int(answered_s * 1e9))
                await self._pool.sleep(self.ttl_s / 3)
        raise errors.LeaseLost(f"lease {self.id:x} is lost")

    async def revoke(self) -> None:
        self._gone = True
        try:
            await self._pool.call(etcd_endpoints.REVOKE, pb.LeaseRevokeRequest(id=self.id), repeatable=True)
        except errors.Rejected as refusal:
            if "lease not found" not in str(refusal):
                raise


async def grant(pool: etcd_endpoints.Pool, ttl_s: int) -> Lease:
    """A new lease; its life counts from before the first attempt. Raises Unavailable or Rejected."""
    if ttl_s <= 0:
        raise errors.Rejected("a lease lives at least one second")
    id = int.from_bytes(_digest(pool), "big") >> 1 or 1
    sent_ns = pool.now_ns()
    granted_s = ttl_s
    try:
        answer = await pool.call(etcd_endpoints.GRANT, pb.LeaseGrantRequest(ttl=ttl_s, id=id), repeatable=True)
        granted_s = answer.ttl
    except errors.Rejected as refusal:
        if "lease already exists" not in str(refusal):
            raise
    return Lease(pool, id, float(granted_s), sent_ns + int(granted_s * 1e9))


async def renew(pool: etcd_endpoints.Pool, leases: Sequence[int], timeout_s: float | None = None) -> dict[int, float]:
    """Keep leases alive: id → seconds left, 0 for one that is gone. Raises Unavailable."""
    free = asyncio.Semaphore(STREAMS)

    async def some(chunk: Sequence[int]) -> dict[int, float]:
        async with free:
            return await _renew_chunk(pool, chunk, timeout_s)

    results = await asyncio.gather(*map(some, _chunks(list(dict.fromkeys(leases)))), return_exceptions=True)
    renewed: dict[int, float] = {}
    for result in results:
        if isinstance(result, BaseException):
            raise result
        renewed |= result
    return renewed


def _chunks(leases: Sequence[int]) -> Iterator[Sequence[int]]:
    return (leases[start : start + CHUNK] for start in range(0, len(leases), CHUNK))


async def _renew_chunk(pool: etcd_endpoints.Pool, leases: Sequence[int], timeout_s: float | None) -> dict[int, float]:
    row = etcd_endpoints.Attempts(pool, etcd_endpoints.KEEP_ALIVE.path, timeout_s, leading=True)
    while True:
        endpoint, left_s = await row.next()
        metadata = await pool.metadata(timeout_s=left_s)
        try:
            async with asyncio.timeout(left_s):
                return await _renew_at(endpoint, leases, metadata)
        except grpc.aio.AioRpcError as error:
            await row.failed(endpoint, error, metadata)
        except TimeoutError:
            row.hung(endpoint)


async def _renew_at(
    endpoint: etcd_endpoints.Endpoint, leases: Sequence[int], metadata: etcd_endpoints.Metadata
) -> dict[int, float]:
    stream = endpoint.stream(etcd_endpoints.KEEP_ALIVE, metadata)
    try:
        for id in leases:
            await stream.write(pb.LeaseKeepAliveRequest(id=id))
        renewed: dict[int, float] = {}
        while len(renewed) < len(leases):
            answer = await stream.read()
            if not isinstance(answer, pb.LeaseKeepAliveResponse):
                raise TimeoutError  # the member ended the stream without a word
            renewed[answer.id] = float(max(answer.ttl, 0))
        return renewed
    finally:
        stream.cancel()


def _digest(pool: etcd_endpoints.Pool) -> bytes:
    """Eight bytes of chance."""
    return hashlib.sha256(pool.world.token().encode()).digest()[:8]
