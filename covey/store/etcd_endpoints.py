"""The members of an etcd cluster as a client sees them: one channel and one health each, and how a call finds its way.

A call is a row of attempts, each with a deadline of its own, so that a hung member (stopped, cut off, disk gone) costs
one attempt and not the call. A member that failed is avoided for a while; as long as the present one works nothing
moves, so a hung member that is tried again costs nobody anything. Who asks says whether the call may be repeated:

    repeatable        reads, and writes whose repetition changes nothing: tried until the call's deadline, `Unavailable`
    not repeatable    tried again only after a failure that is certainly not applied; else `Unsure` (safety S15)

Attempts are made on connected channels only: a call that waits in a channel still connecting, and runs into its
deadline there, would look like a lost reply.

Members come and go (`learn`, `forget`): those that the settings name stay, whatever the cluster says.

grpc must not be forked: start processes before the first call, or with an exec that runs nothing between.
"""

import asyncio
import contextlib
import os
import zlib
from collections.abc import Sequence
from typing import Any, Generic, NamedTuple, TypeVar

os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # it writes TLS errors to stderr, and reads this when imported

import grpc
import grpc.aio
from google.protobuf import message

from covey import errors, observe, world
from covey.store import etcd_errors
from covey.store.etcdpb import etcd_pb2 as pb

_log = observe.log("etcd")

DEFAULT_PORT = 2379
AVOID_S = 3.0  # how long a member that failed is avoided
PAUSES_S = (0.02, 0.05, 0.1, 0.2, 0.5)  # between rounds over members that all failed

# Pings only while calls are open, not more often than every 5 s: etcd ends connections that ping more (too_many_pings).
_OPTIONS: tuple[tuple[str, int | str], ...] = (
    ("grpc.keepalive_time_ms", 6000),
    ("grpc.keepalive_timeout_ms", 2500),
    ("grpc.keepalive_permit_without_calls", 0),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.max_receive_message_length", -1),  # an answer may have any size: a range, one event of a catch-up
    ("grpc.max_send_message_length", -1),  # etcd says itself what is too large
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.min_reconnect_backoff_ms", 500),
    ("grpc.max_reconnect_backoff_ms", 2000),
    ("grpc.enable_retries", 0),  # grpc's own retries know nothing of what is repeatable
    ("grpc.enable_http_proxy", 0),
    ("grpc.use_local_subchannel_pool", 1),
)

Q = TypeVar("Q", bound=message.Message)
A = TypeVar("A", bound=message.Message)


class Method(NamedTuple, Generic[Q, A]):
    """One method of etcd's API: its path and the types of question and answer."""

    path: str
    question: type[Q]
    answer: type[A]


RANGE = Method("/etcdserverpb.KV/Range", pb.RangeRequest, pb.RangeResponse)
TXN = Method("/etcdserverpb.KV/Txn", pb.TxnRequest, pb.TxnResponse)
COMPACT = Method("/etcdserverpb.KV/Compact", pb.CompactionRequest, pb.CompactionResponse)
WATCH = Method("/etcdserverpb.Watch/Watch", pb.WatchRequest, pb.WatchResponse)
GRANT = Method("/etcdserverpb.Lease/LeaseGrant", pb.LeaseGrantRequest, pb.LeaseGrantResponse)
REVOKE = Method("/etcdserverpb.Lease/LeaseRevoke", pb.LeaseRevokeRequest, pb.LeaseRevokeResponse)
KEEP_ALIVE = Method("/etcdserverpb.Lease/LeaseKeepAlive", pb.LeaseKeepAliveRequest, pb.LeaseKeepAliveResponse)
AUTHENTICATE = Method("/etcdserverpb.Auth/Authenticate", pb.AuthenticateRequest, pb.AuthenticateResponse)

Metadata = tuple[tuple[str, str], ...]


class Tls(NamedTuple):
    """PEM texts. Empty `ca`: the roots that come with grpc. `cert` and `key`: what we show (mutual TLS)."""

    ca: bytes = b""
    cert: bytes = b""
    key: bytes = b""
    server_name: str = ""  # when the members' certificates name something else than their addresses


class Login(NamedTuple):
    user: str
    password: str


class Address(NamedTuple):
    target: str  # host:port
    secure: bool


def parse(endpoints: Sequence[str], *, secure: bool) -> list[Address]:
    """Addresses from items that may be comma lists, with or without scheme and port; without a scheme `secure` holds.
    Raises SettingError."""
    found = []
    for text in (part.strip() for item in endpoints for part in item.split(",")):
        if not text:
            continue
        scheme, mark, rest = text.partition("://")
        if mark and scheme not in ("http", "https"):
            raise errors.SettingError(f"etcd endpoint {text!r}: the scheme is http or https")
        target = (rest if mark else text).rstrip("/")
        host, colon, port = target.rpartition(":")
        if not colon or target.endswith("]"):
            host, port = target, str(DEFAULT_PORT)
        if not host or not port.isdigit() or not 0 < int(port) < 65536 or set("/?#@") & set(host):
            raise errors.SettingError(f"etcd endpoint {text!r}: expected [http[s]://]host[:port]")
        found.append(Address(f"{host}:{port}", scheme == "https" if mark else secure))
    if not found:
        raise errors.SettingError("no etcd endpoint is given")
    return list(dict.fromkeys(found))


class Endpoint:
    """One member. Its channel is opened at the first use, in the loop that then runs."""

    def __init__(self, address: Address, tls: Tls | None) -> None:
        self.address = address.target
        self.avoid_until_ns = 0
        self._secure = address.secure
        self._tls = tls or Tls()
        self._opened: grpc.aio.Channel | None = None
        self._calls: dict[str, grpc.aio.UnaryUnaryMultiCallable[Any, Any]] = {}

    @property
    def channel(self) -> grpc.aio.Channel:
        if self._opened is None:
            self._opened = self._open()
        return self._opened

    def _open(self) -> grpc.aio.Channel:
        if not self._secure:
            return grpc.aio.insecure_channel(self.address, options=_OPTIONS)
        tls = self._tls
        credentials = grpc.ssl_channel_credentials(tls.ca or None, tls.key or None, tls.cert or None)
        named = (("grpc.ssl_target_name_override", tls.server_name),) if tls.server_name else ()
        return grpc.aio.secure_channel(self.address, credentials, options=_OPTIONS + named)

    async def connected(self, timeout_s: float) -> bool:
        """Wait while the channel connects. False when that takes too long; a refused connection is left to the call,
        which fails at once and says why."""
        waiting = (grpc.ChannelConnectivity.IDLE, grpc.ChannelConnectivity.CONNECTING)
        if (state := self.channel.get_state(try_to_connect=True)) not in waiting:
            return True
        try:
            async with asyncio.timeout(timeout_s):
                while state in waiting:
                    await self.channel.wait_for_state_change(state)
                    state = self.channel.get_state(try_to_connect=True)
        except TimeoutError:
            return False
        return True

    async def ask(self, method: Method[Q, A], question: Q, timeout_s: float, metadata: Metadata) -> A:
        """One attempt of a call with one answer."""
        call = self._calls.get(method.path)
        if call is None:
            call = self._calls[method.path] = self.channel.unary_unary(
                method.path, method.question.SerializeToString, method.answer.FromString
            )
        answer: A = await call(question, timeout=timeout_s, metadata=metadata)
        return answer

    def stream(self, method: Method[Q, A], metadata: Metadata) -> "grpc.aio.StreamStreamCall[Q, A]":
        """A stream both ways."""
        call: grpc.aio.StreamStreamMultiCallable[Q, A] = self.channel.stream_stream(
            method.path, method.question.SerializeToString, method.answer.FromString
        )
        return call(metadata=metadata)

    def download(self, method: Method[Q, A], question: Q, metadata: Metadata) -> "grpc.aio.UnaryStreamCall[Q, A]":
        """One question, many answers."""
        call: grpc.aio.UnaryStreamMultiCallable[Q, A] = self.channel.unary_stream(
            method.path, method.question.SerializeToString, method.answer.FromString
        )
        return call(question, metadata=metadata)

    async def close(self) -> None:
        if self._opened is not None:
            await self._opened.close()


class Pool:
    """All members, and the login that they share."""

    def __init__(
        self,
        endpoints: Sequence[str],
        *,
        world: world.World,
        attempt_s: float,
        timeout_s: float,
        tls: Tls | None = None,
        login: Login | None = None,
    ) -> None:
        self.world = world
        self.attempt_s = attempt_s
        self.timeout_s = timeout_s
        self.endpoints = [Endpoint(address, tls) for address in parse(endpoints, secure=tls is not None)]
        self.given = tuple(endpoint.address for endpoint in self.endpoints)  # those of the settings, which stay
        self._tls = tls
        self._gone: list[Endpoint] = []  # members that are no more; calls to them may still be under way
        self.closed = asyncio.Event()
        self.watched: Endpoint | None = None  # where the last watch was opened
        self.leader: Endpoint | None = None  # as somebody saw last: a hint
        self._present = int(self.chance() * len(self.endpoints))  # spreads the controllers over the members
        self._login = login
        self._token = ""
        self._logging_in = asyncio.Lock()

    def endpoint(self, url: str) -> Endpoint:
        """The member at `url`, known or not."""
        address = parse([url], secure=self._tls is not None)[0]
        return next((one for one in self.endpoints if one.address == address.target), Endpoint(address, self._tls))

    def learn(self, endpoint: Endpoint) -> None:
        """Take calls to one more member."""
        if endpoint not in self.endpoints:
            self.endpoints.append(endpoint)
            _log.info("a member was learnt of", member=endpoint.address)

    def forget(self, endpoint: Endpoint) -> None:
        """Take no more calls to a member that was learnt of."""
        if endpoint in self.endpoints and endpoint.address not in self.given:
            present = self.endpoints[self._present % len(self.endpoints)]
            self.endpoints.remove(endpoint)
            self._present = self.endpoints.index(present) if present in self.endpoints else 0
            self._gone.append(endpoint)
            _log.info("a member is no more", member=endpoint.address)

    def now_ns(self) -> int:
        return self.world.boot_ns()

    def chance(self) -> float:
        """A number from [0, 1) by the world's chance."""
        return zlib.crc32(self.world.token().encode()) / 2**32

    def pick(self, *, other_than: Endpoint | None = None) -> Endpoint:
        """The present member while it is well, else the next one that is, else the one to be tried again soonest.
        `other_than` is taken only when nobody else is well, and does not move the present one."""
        now = self.now_ns()
        count = len(self.endpoints)
        row = [self.endpoints[(self._present + step) % count] for step in range(count)]
        well = [one for one in row if one.avoid_until_ns <= now and one is not other_than]
        chosen = well[0] if well else min(row, key=lambda one: (one.avoid_until_ns, one is other_than))
        if other_than is None:
            self._present = self.endpoints.index(chosen)
        return chosen

    def pick_leader(self) -> Endpoint:
        """The leader, if one is known and well, for what every other member would only pass on to it."""
        leads = self.leader
        if leads is None or leads not in self.endpoints or leads.avoid_until_ns > self.now_ns():
            return self.pick()
        return leads

    def avoid(self, endpoint: Endpoint, reason: str, seconds: float = AVOID_S) -> None:
        """Prefer the others for a while."""
        now = self.now_ns()
        if endpoint.avoid_until_ns <= now:
            _log.info("a member is avoided for a while", member=endpoint.address, reason=reason)
        endpoint.avoid_until_ns = now + int(seconds * 1e9)

    def all_avoided(self) -> bool:
        now = self.now_ns()
        return all(one.avoid_until_ns > now for one in self.endpoints)

    async def call(
        self,
        method: Method[Q, A],
        question: Q,
        *,
        repeatable: bool,
        timeout_s: float | None = None,
        attempt_s: float | None = None,
        at: Endpoint | None = None,
        leader: bool = True,
    ) -> A:
        """Ask until there is an answer. Raises Unavailable, Unsure (never when `repeatable`), Rejected or NoSpace.
        `at`: this member and no other; `leader`: a member that has none refuses at once."""
        row = Attempts(self, method.path, timeout_s, attempt_s, at=at)
        while True:
            endpoint, left_s = await row.next()
            metadata = await self.metadata(leader=leader, timeout_s=left_s)
            try:
                return await endpoint.ask(method, question, left_s, metadata)
            except grpc.aio.AioRpcError as error:
                verdict = await row.failed(endpoint, error, metadata)
                if verdict is etcd_errors.Verdict.LOST and not repeatable:
                    raise errors.Unsure(f"{row.name} at {endpoint.address}: {etcd_errors.describe(error)}") from None

    async def metadata(self, *, leader: bool = True, timeout_s: float | None = None) -> Metadata:
        """What goes with every attempt; logs in first when that is due."""
        wanted: Metadata = (("hasleader", "true"),) if leader else ()
        if self._login is None:
            return wanted
        if not self._token:
            await self._log_in("", timeout_s)
        return (*wanted, ("token", self._token))

    async def log_in_again(self, metadata: Metadata) -> None:
        """After the token in `metadata` was refused. Raises Rejected when there is no login to try."""
        if self._login is None:
            raise errors.Rejected("etcd asks for a user and a password")
        await self._log_in(dict(metadata)["token"], None)

    async def _log_in(self, stale: str, timeout_s: float | None) -> None:
        async with self._logging_in:
            if self._token != stale or self._login is None:
                return  # somebody else was faster
            question = pb.AuthenticateRequest(name=self._login.user, password=self._login.password)
            row = Attempts(self, AUTHENTICATE.path, timeout_s, None)
            while True:
                endpoint, left_s = await row.next()
                try:
                    self._token = (await endpoint.ask(AUTHENTICATE, question, left_s, ())).token
                except grpc.aio.AioRpcError as error:
                    await row.failed(endpoint, error, ())
                else:
                    return

    async def sleep(self, seconds: float) -> None:
        """Wait; ends with CancelledError when the store is closed meanwhile."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self.closed.wait()
                raise asyncio.CancelledError

    async def close(self) -> None:
        self.closed.set()
        for endpoint in (*self.endpoints, *self._gone):
            await endpoint.close()


class Attempts:
    """The attempts of one call."""

    def __init__(
        self,
        pool: Pool,
        path: str,
        timeout_s: float | None = None,
        attempt_s: float | None = None,
        *,
        at: Endpoint | None = None,
        leading: bool = False,
    ) -> None:
        """`at`: this member and no other; `leading`: the leader first."""
        self.name = path.rpartition("/")[2]
        self._pool = pool
        self._timeout_s = pool.timeout_s if timeout_s is None else timeout_s
        self._attempt_s = pool.attempt_s if attempt_s is None else attempt_s
        self._deadline_ns = pool.now_ns() + int(self._timeout_s * 1e9)
        self._at = at
        self._pick = pool.pick_leader if leading else pool.pick
        self._last = ""
        self._rounds = 0

    async def next(self) -> tuple[Endpoint, float]:
        """A connected member to try, and how long. Raises Unavailable when the call's time is over."""
        while True:
            if self._pool.closed.is_set():
                raise errors.Unavailable("the store is closed")
            if self._last and (self._at is not None or self._pool.all_avoided()):
                await self._pause()
            if (left_s := self._left_s()) <= 0:
                last = f"; last: {self._last}" if self._last else ""
                raise errors.Unavailable(f"{self.name}: no answer within {self._timeout_s:g} s{last}")
            endpoint = self._at or self._pick()
            if await endpoint.connected(left_s):
                return endpoint, max(self._left_s(), 0.001)
            self._last = f"{endpoint.address} does not accept connections"
            self._pool.avoid(endpoint, self._last)

    async def failed(self, endpoint: Endpoint, error: grpc.aio.AioRpcError, metadata: Metadata) -> etcd_errors.Verdict:
        """Take note of a failed attempt; raises what is the server's last word."""
        if self._pool.closed.is_set():
            return etcd_errors.Verdict.LOST
        verdict = etcd_errors.judge(error)
        self._last = f"{endpoint.address}: {etcd_errors.describe(error)}"
        if verdict is etcd_errors.Verdict.LOGIN:
            await self._pool.log_in_again(metadata)
            self._rounds += 1
            await asyncio.sleep(PAUSES_S[0] * self._rounds)  # a token that is refused again and again
        else:
            self._pool.avoid(endpoint, etcd_errors.describe(error))
        return verdict

    def hung(self, endpoint: Endpoint) -> None:
        """Take note that nothing came within the attempt's time."""
        self._last = f"{endpoint.address} does not answer"
        self._pool.avoid(endpoint, "it does not answer")

    def _left_s(self) -> float:
        return min(self._attempt_s, (self._deadline_ns - self._pool.now_ns()) / 1e9)

    async def _pause(self) -> None:
        pause_s = PAUSES_S[min(self._rounds, len(PAUSES_S) - 1)]
        self._rounds += 1
        await asyncio.sleep(pause_s * (0.5 + self._pool.chance() / 2))
