"""Looking after an etcd cluster: members, status, compaction's second half, snapshots, alarms.

What concerns one member (status, defragment, snapshot) names it by its address as the client knows it. Changes of
membership are never repeated by themselves: a lost reply is `Unsure`, and the member list tells.
"""

import asyncio
import contextlib
import hashlib
import os
import pathlib
from collections.abc import Sequence
from typing import IO, NamedTuple

import grpc
import grpc.aio

from covey import errors
from covey.store import etcd_endpoints, etcd_errors
from covey.store.etcdpb import etcd_pb2 as pb

MEMBER_LIST = etcd_endpoints.Method("/etcdserverpb.Cluster/MemberList", pb.MemberListRequest, pb.MemberListResponse)
MEMBER_ADD = etcd_endpoints.Method("/etcdserverpb.Cluster/MemberAdd", pb.MemberAddRequest, pb.MemberAddResponse)
MEMBER_REMOVE = etcd_endpoints.Method(
    "/etcdserverpb.Cluster/MemberRemove", pb.MemberRemoveRequest, pb.MemberRemoveResponse
)
MEMBER_PROMOTE = etcd_endpoints.Method(
    "/etcdserverpb.Cluster/MemberPromote", pb.MemberPromoteRequest, pb.MemberPromoteResponse
)
STATUS = etcd_endpoints.Method("/etcdserverpb.Maintenance/Status", pb.StatusRequest, pb.StatusResponse)
ALARM = etcd_endpoints.Method("/etcdserverpb.Maintenance/Alarm", pb.AlarmRequest, pb.AlarmResponse)
DEFRAGMENT = etcd_endpoints.Method("/etcdserverpb.Maintenance/Defragment", pb.DefragmentRequest, pb.DefragmentResponse)
SNAPSHOT = etcd_endpoints.Method("/etcdserverpb.Maintenance/Snapshot", pb.SnapshotRequest, pb.SnapshotResponse)
MOVE_LEADER = etcd_endpoints.Method("/etcdserverpb.Maintenance/MoveLeader", pb.MoveLeaderRequest, pb.MoveLeaderResponse)

DEFRAGMENT_S = 120.0  # the member answers nothing else meanwhile
SILENCE_S = 30.0  # between two pieces of a snapshot
_DIGEST_BYTES = 32  # of SHA-256, which etcd appends to a snapshot
_PIECE_BYTES = 1 << 20


class Member(NamedTuple):
    id: int
    name: str  # empty: added and never started
    peer_urls: tuple[str, ...]
    client_urls: tuple[str, ...]
    learner: bool


class Status(NamedTuple):
    """What one member says of itself."""

    address: str
    cluster_id: int
    member_id: int
    leader_id: int  # 0: it knows of none
    version: str
    revision: int
    raft_term: int
    raft_index: int
    size_bytes: int
    used_bytes: int
    learner: bool
    troubles: tuple[str, ...]


class Alarm(NamedTuple):
    member_id: int
    name: str  # NOSPACE | CORRUPT


class Admin:
    """The care of the cluster that a store is connected to."""

    def __init__(self, pool: etcd_endpoints.Pool) -> None:
        self._pool = pool

    @property
    def addresses(self) -> list[str]:
        """The members as this client knows them."""
        return [endpoint.address for endpoint in self._pool.endpoints]

    @property
    def present(self) -> str:
        """The member that calls go to at present."""
        return self._pool.pick().address

    async def members(self) -> list[Member]:
        question = pb.MemberListRequest(linearizable=True)
        return _members((await self._pool.call(MEMBER_LIST, question, repeatable=True)).members)

    async def learn(self) -> tuple[list[Member], dict[str, Status | None]]:
        """The members, and every word of theirs by address. From now on those are called too that were not known and
        are reached at an address which they advertise: proved by their own word, because such an address may mean
        something else here (loopback, a proxy)."""
        members, words = await asyncio.gather(self.members(), self.statuses())
        known = {word.member_id: address for address, word in words.items() if word is not None}
        unknown = [member for member in members if member.id not in known]
        for word in filter(None, await asyncio.gather(*map(self._find, unknown))):
            words[word.address] = word
        for id in known.keys() - {member.id for member in members}:
            self._pool.forget(self._at(known[id]))
        return members, words

    async def _find(self, member: Member) -> Status | None:
        for url in member.client_urls:
            endpoint = self._pool.endpoint(url)
            with contextlib.suppress(errors.StoreError):
                word = await self._word(endpoint)
                if word.member_id == member.id:
                    self._pool.learn(endpoint)
                    return word
            if endpoint not in self._pool.endpoints:
                await endpoint.close()
        return None

    async def add_member(self, peer_urls: Sequence[str], *, learner: bool = True) -> Member:
        """A new member, by default one without a vote until it has caught up and is promoted."""
        question = pb.MemberAddRequest(peer_urls=peer_urls, is_learner=learner)
        return _members([(await self._pool.call(MEMBER_ADD, question, repeatable=False)).member])[0]

    async def promote_member(self, id: int) -> list[Member]:
        """Give a learner its vote. Rejected while it has not caught up."""
        answer = await self._pool.call(MEMBER_PROMOTE, pb.MemberPromoteRequest(id=id), repeatable=False)
        return _members(answer.members)

    async def remove_member(self, id: int) -> list[Member]:
        answer = await self._pool.call(MEMBER_REMOVE, pb.MemberRemoveRequest(id=id), repeatable=False)
        return _members(answer.members)

    async def status(self, address: str) -> Status:
        """One member's word. Raises Unavailable when that member does not answer."""
        answer = await self._pool.call(
            STATUS,
            pb.StatusRequest(),
            repeatable=True,
            at=self._at(address),
            leader=False,
            timeout_s=self._pool.attempt_s,
        )
        return _status(address, answer)

    async def statuses(self) -> dict[str, Status | None]:
        """Every known member's word, asked for once; None for one that does not answer. Who leads is kept in mind."""
        endpoints = list(self._pool.endpoints)
        words = await asyncio.gather(*map(self._word, endpoints), return_exceptions=True)
        found: dict[str, Status | None] = {}
        for endpoint, word in zip(endpoints, words, strict=True):
            if isinstance(word, BaseException) and not isinstance(word, errors.Unavailable):
                raise word
            found[endpoint.address] = word if isinstance(word, Status) else None
            if isinstance(word, Status) and word.member_id == word.leader_id:
                self._pool.leader = endpoint
        return found

    async def _word(self, endpoint: etcd_endpoints.Endpoint) -> Status:
        """One attempt; one more with a new login. A member that is away costs no waiting."""
        if not await endpoint.connected(self._pool.attempt_s):
            raise errors.Unavailable(f"{endpoint.address} does not accept connections")
        metadata = await self._pool.metadata(leader=False)
        try:
            answer = await endpoint.ask(STATUS, pb.StatusRequest(), self._pool.attempt_s, metadata)
        except grpc.aio.AioRpcError as error:
            if etcd_errors.judge(error) is not etcd_errors.Verdict.LOGIN:
                raise errors.Unavailable(f"{endpoint.address}: {etcd_errors.describe(error)}") from None
            await self._pool.log_in_again(metadata)
            return await self.status(endpoint.address)
        return _status(endpoint.address, answer)

    async def defragment(self, address: str) -> None:
        """Give back the space of what was compacted. The member serves nobody until it is done."""
        await self._pool.call(
            DEFRAGMENT,
            pb.DefragmentRequest(),
            repeatable=True,
            at=self._at(address),
            leader=False,
            timeout_s=DEFRAGMENT_S,
            attempt_s=DEFRAGMENT_S,
        )

    async def alarms(self) -> list[Alarm]:
        answer = await self._pool.call(ALARM, pb.AlarmRequest(action=pb.AlarmRequest.GET), repeatable=True)
        return [Alarm(alarm.member_id, pb.AlarmType.Name(alarm.alarm)) for alarm in answer.alarms]

    async def disarm(self) -> None:
        """End all alarms. etcd raises them again when the cause is still there."""
        for alarm in await self.alarms():
            question = pb.AlarmRequest(action=pb.AlarmRequest.DEACTIVATE, member_id=alarm.member_id, alarm=alarm.name)
            await self._pool.call(ALARM, question, repeatable=True)

    async def move_leader(self, to: int) -> None:
        """Hand the lead to member `to`. Harmless when it leads already."""
        for address, status in (await self.statuses()).items():
            if status is not None and status.member_id == status.leader_id:
                if status.leader_id != to:
                    question = pb.MoveLeaderRequest(target_id=to)
                    await self._pool.call(MOVE_LEADER, question, repeatable=False, at=self._at(address))
                return
        raise errors.Unavailable("the cluster has no leader among the members that answer")

    async def end_lease(self, id: int) -> None:
        """End somebody's lease and delete its keys. Rejected when there is none."""
        await self._pool.call(etcd_endpoints.REVOKE, pb.LeaseRevokeRequest(id=id), repeatable=True)

    async def snapshot(self, path: pathlib.Path, address: str = "") -> int:
        """Write the whole database to `path`, as `etcdctl snapshot restore` reads it; its size. After a crash `path`
        is the old file or none. Raises Unavailable when the member breaks off, or what came is not what was sent."""
        endpoint = self._at(address) if address else self._pool.pick()
        aside = path.with_name(path.name + ".part")
        try:
            with aside.open("wb") as file:
                size = await self._download(endpoint, file)
                file.flush()
                await asyncio.to_thread(os.fsync, file.fileno())
            aside.replace(path)
        finally:
            with contextlib.suppress(FileNotFoundError):
                aside.unlink()
        return size

    async def _download(self, endpoint: etcd_endpoints.Endpoint, file: IO[bytes]) -> int:
        """Stream the database into `file` and prove the digest at its end."""
        call = endpoint.download(SNAPSHOT, pb.SnapshotRequest(), await self._pool.metadata())
        digest = hashlib.sha256()
        held = bytearray()  # not yet written: the last bytes may be the digest
        size = 0
        try:
            while True:
                async with asyncio.timeout(SILENCE_S):
                    answer = await call.read()
                if not isinstance(answer, pb.SnapshotResponse):
                    break
                held += answer.blob
                if len(held) > _PIECE_BYTES:
                    piece, held = bytes(held[:-_DIGEST_BYTES]), held[-_DIGEST_BYTES:]
                    digest.update(piece)
                    size += await asyncio.to_thread(file.write, piece)
        except TimeoutError:
            raise errors.Unavailable(f"snapshot from {endpoint.address}: it does not answer") from None
        except grpc.aio.AioRpcError as error:
            etcd_errors.judge(error)
            raise errors.Unavailable(f"snapshot from {endpoint.address}: {etcd_errors.describe(error)}") from None
        finally:
            call.cancel()
        digest.update(held[:-_DIGEST_BYTES])
        if digest.digest() != bytes(held[-_DIGEST_BYTES:]):
            raise errors.Unavailable(f"snapshot from {endpoint.address}: its digest is wrong")
        return size + await asyncio.to_thread(file.write, bytes(held))

    def _at(self, address: str) -> etcd_endpoints.Endpoint:
        for endpoint in self._pool.endpoints:
            if endpoint.address == address:
                return endpoint
        raise errors.Rejected(f"no member is known as {address}; known are {', '.join(self.addresses)}")


def _members(members: Sequence[pb.Member]) -> list[Member]:
    return [Member(one.id, one.name, tuple(one.peer_urls), tuple(one.client_urls), one.is_learner) for one in members]


def _status(address: str, answer: pb.StatusResponse) -> Status:
    return Status(
        address=address,
        cluster_id=answer.header.cluster_id,
        member_id=answer.header.member_id,
        leader_id=answer.leader,
        version=answer.version,
        revision=answer.header.revision,
        raft_term=answer.raft_term,
        raft_index=answer.raft_index,
        size_bytes=answer.db_size,
        used_bytes=answer.db_size_in_use,
        learner=answer.is_learner,
        troubles=tuple(answer.errors),
    )


def target(url: str) -> str:
    """The host:port of a member's URL, as addresses are known here."""
    return etcd_endpoints.parse([url], secure=False)[0].target
