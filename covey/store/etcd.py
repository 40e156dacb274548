"""The store on a real etcd: `base.Store` on v3's gRPC API.

    Etcd ─► batch (group commit, S23) ─► etcd_codec ─┐
         ├► ranges, compaction ──────────────────────┤
         ├► etcd_watch (whole revisions, S20) ───────┼─► etcd_endpoints (members, health, login) ─► etcd
         ├► etcd_lease (lost by our own clock) ──────┤
         └► admin: etcd_admin (members, care) ───────┘

It knows nothing of Covey's keys. Every call ends within `timeout_s` (a commit: one attempt more, when its batch began
late); one attempt at one member takes at most `attempt_s`.
"""

import contextlib
from collections.abc import AsyncIterator, Sequence

from covey import errors, world
from covey.decide import permission
from covey.store import base, batch, etcd_admin, etcd_codec, etcd_endpoints, etcd_lease, etcd_watch
from covey.store.etcdpb import etcd_pb2 as pb

PAGE = 1000  # keys fetched at a time by a range without limit, so that each fetch fits an attempt
_COMPACTED = "required revision has been compacted"
_MANY = 3  # times that a range is begun anew because a compaction overtook it


class Etcd:
    """A client of one etcd cluster. `endpoints` are ``[http[s]://]host[:port]``, single or as comma lists; with `tls`
    those without a scheme are https. Nothing is connected before the first call."""

    def __init__(
        self,
        endpoints: Sequence[str],
        *,
        world: world.World,
        attempt_s: float = 2.0,
        timeout_s: float = 10.0,
        tls: etcd_endpoints.Tls | None = None,
        login: etcd_endpoints.Login | None = None,
    ) -> None:
        self._pool = etcd_endpoints.Pool(
            endpoints, world=world, attempt_s=attempt_s, timeout_s=timeout_s, tls=tls, login=login
        )
        self._batcher = batch.Batcher(self._send, now_ns=world.boot_ns, timeout_s=timeout_s, attempt_s=attempt_s)
        self.admin = etcd_admin.Admin(self._pool)

    async def range(
        self,
        key: str,
        end: str = "",
        *,
        limit: int = 0,
        revision: int = 0,
        keys_only: bool = False,
        count_only: bool = False,
        serializable: bool = False,
        oldest_first: bool = False,
    ) -> base.Page:
        request = pb.RangeRequest(
            key=base.to_bytes(key),
            range_end=base.to_bytes(end),
            limit=limit,
            revision=revision,
            keys_only=keys_only,
            count_only=count_only,
            serializable=serializable,
        )
        if oldest_first:
            request.sort_order, request.sort_target = pb.RangeRequest.ASCEND, pb.RangeRequest.CREATE
        if limit or not end or count_only or serializable or oldest_first:
            return await self._page(request)
        for _ in range(_MANY):
            try:
                return await self._all_pages(request)
            except errors.Compacted:
                if revision:
                    raise
        raise errors.Unavailable("compactions overtake the range again and again")

    async def commit(self, txn: base.Txn, *, within_s: float | None = None) -> base.Outcome:
        return await self._batcher.commit(txn, within_s)

    async def watch(self, key: str, end: str, start_revision: int) -> AsyncIterator[base.Batch]:
        if start_revision <= 0:
            start_revision = (await self.range(base.EVERYTHING)).revision + 1
        async with contextlib.aclosing(etcd_watch.Watch(self._pool, key, end, start_revision).run()) as batches:
            async for one in batches:
                yield one

    async def grant(self, ttl_s: int) -> etcd_lease.Lease:
        return await etcd_lease.grant(self._pool, ttl_s)

    async def renew(self, leases: Sequence[int]) -> dict[int, float]:
        return await etcd_lease.renew(self._pool, leases)

    async def compact(self, revision: int) -> None:
        try:
            await self._pool.call(etcd_endpoints.COMPACT, pb.CompactionRequest(revision=revision), repeatable=True)
        except errors.Rejected as refusal:
            if _COMPACTED not in str(refusal):
                raise

    async def origin(self, revision: int) -> permission.Origin:
        """Asked of the present member, and of others when it lags or does not answer: a hung one costs an attempt.
        Newer releases of etcd tell a member's status to administrators only: then a linearizable read tells all but
        the index."""
        present = self.admin.present
        for address in (present, *(other for other in self.admin.addresses if other != present)):
            with contextlib.suppress(errors.Unavailable):
                try:
                    status = await self.admin.status(address)
                except errors.Rejected:
                    page = await self.range(base.EVERYTHING)
                    if page.revision < revision:
                        break
                    return permission.Origin(page.cluster, page.term)
                if status.revision >= revision and status.leader_id:
                    return permission.Origin(f"{status.cluster_id:x}", status.raft_term, status.raft_index)
        raise errors.Unavailable("no member says where the store is in its life")

    async def close(self) -> None:
        await self._batcher.close()
        await self._pool.close()

    async def _send(self, txns: Sequence[base.Txn], timeout_s: float) -> Sequence[base.Outcome]:
        """Apply independent transactions in one proposal."""
        alone = len(txns) == 1
        request = etcd_codec.txn(txns[0]) if alone else etcd_codec.batch(txns)
        answer = await self._pool.call(etcd_endpoints.TXN, request, repeatable=False, timeout_s=timeout_s)
        return [etcd_codec.answered(answer, txns[0])] if alone else etcd_codec.outcomes(answer, len(txns))

    async def _page(self, request: pb.RangeRequest) -> base.Page:
        try:
            answer = await self._pool.call(
                etcd_endpoints.RANGE, request, repeatable=True, leader=not request.serializable
            )
        except errors.Rejected as refusal:
            if _COMPACTED not in str(refusal):
                raise
            raise errors.Compacted(await etcd_watch.oldest_revision(self._pool)) from None
        kvs = tuple(etcd_codec.kv(kv) for kv in answer.kvs)
        head = answer.header
        shown = request.revision or head.revision
        return base.Page(kvs, shown, answer.count, answer.more, head.raft_term, f"{head.cluster_id:x}")

    async def _all_pages(self, request: pb.RangeRequest) -> base.Page:
        """The whole range as of one revision, fetched in pieces."""
        piece = pb.RangeRequest()
        piece.CopyFrom(request)
        piece.limit = PAGE
        first = page = await self._page(piece)
        kvs = list(page.kvs)
        while page.more:
            piece.key, piece.revision = base.to_bytes(page.kvs[-1].key) + b"\0", first.revision
            page = await self._page(piece)
            kvs += page.kvs
        return base.Page(tuple(kvs), first.revision, first.total, False, first.term, first.cluster)
