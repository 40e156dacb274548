"""The agent's standing with the cloud: joining, calls in the session's name, the lease, the newest view seen.

Rules (safety S7, S8, S18, S22):

* Every call carries the session. 409 → the session is stale: nothing is started or destroyed until a new one is
  joined. 410 → the node was removed: the agent holds for good, and its VMs stay.
* The lease is believed in until (our clock when we sent) + ttl − age − margin. A late answer extends nothing.
* `seen` only grows. An answer that says `hold` teaches nothing: its view is not ours. Only an adoption (safety S19)
  puts another history in its place.
* A new session's secret is on disk before it is sent. After a lost answer any secret that may be the current one is
  shown, newest first.
"""

import asyncio
from enum import StrEnum
from typing import TypeVar

import msgspec

from covey import errors, model, observe, ticket, wire, world
from covey.agent import identity
from covey.client import http

T = TypeVar("T")
_log = observe.log("agent")
_S = 1_000_000_000
_NEWEST = 0.3  # weight of the newest answer time
_HOLD = "hold"  # a 409 that starts so says: our view is of another history, not: our session is stale


class Standing(StrEnum):
    """May this agent act?"""

    OUTSIDE = "outside"  # not joined yet
    GOOD = "good"
    STALE = "stale"  # another session of this node is newer
    REMOVED = "removed"  # an operator removed the node


class NotYet(errors.Refused):
    """A join was refused for a reason that may pass: ask again."""


class SessionLost(errors.RemoteError):
    """The call was answered 409 or 410: see the session's standing."""


class OnHold(errors.RemoteError):
    """The store's history is not the one that this node knows: see `agent.adoption`."""


class Session:
    """One agent's session, renewed by `join`."""

    def __init__(self, file: identity.File, endpoints: http.Endpoints, clock: world.World) -> None:
        self._file = file
        self._endpoints = endpoints
        self._clock = clock
        self.standing = Standing.OUTSIDE
        self.hold = False
        self.ending = False  # this process is about to end: no launch is asked for that nobody would use
        self.seen = file.now.seen
        self.heartbeat_s = wire.HEARTBEAT_S
        self.lease_until_ns = 0
        self.sent_ns = 0  # when the last message was sent: a heartbeat is due after a silence only
        self.messages = 0
        self.usual_s = 0.0  # how long answers take lately that do not wait on purpose
        self.good = asyncio.Event()
        self._learnt: tuple[str, ...] = ()
        self._offered = ""  # the secret of the session that is being joined

    @property
    def node(self) -> model.NodeId:
        return self._file.now.node

    @property
    def cloud(self) -> str:
        return self._file.now.cloud

    @property
    def counter(self) -> int:
        return self._file.now.counter

    @property
    def ticket_key(self) -> bytes:
        """To the tickets that controllers give for this node; b"" before it joined."""
        return ticket.key_of(self._file.now.secret) if self._file.now.secret else b""

    @property
    def may_act(self) -> bool:
        """Whether something may be started, stopped or destroyed now."""
        return self.standing is Standing.GOOD and not self.hold

    def lease_holds(self) -> bool:
        return self._clock.boot_ns() < self.lease_until_ns

    async def join(self, facts: model.Facts, *, explicit: bool = False) -> wire.Joined:
        """Begin a new session. Raises Refused (the cloud's own words), NotYet or RemoteError (ask again)."""
        if not self._offered:
            self._offered = self._clock.secret()
        candidates = self._file.pend(self._offered)
        refusal: errors.CoveyError | None = None
        for last in candidates or ("",):
            ask = wire.Join(
                host_key=self._file.now.host_key,
                secret=self._offered,
                facts=facts,
                node=self.node,
                last_secret=last,
                explicit=explicit,
                cloud=self.cloud,
                last_session=self.counter,
            )
            sent_ns = self._clock.boot_ns()
            try:
                answer = await self._endpoints.ask("POST", "/agent/v1/join", wire.Joined, ask, repeatable=True)
            except errors.Refused as error:
                refusal = error
            except errors.RemoteError as error:
                if error.status == 410 and not explicit:  # with the operator's word it may be taken back in a moment
                    self._lose(Standing.REMOVED)
                    raise SessionLost(str(error), 410) from error
                if error.status not in (409, 410):
                    raise
                remedy = "" if explicit else "; unless one does run elsewhere, `covey join` on this host"
                refusal = NotYet(f"this node may not join now: {error}{remedy}")
            else:
                self._begin(answer, sent_ns)
                return answer
        raise refusal if isinstance(refusal, NotYet) else errors.Refused(f"this node may not join: {refusal}")

    async def call(
        self, path: str, kind: type[T], body: msgspec.Struct, *, timeout_s: float = 10.0, parks: bool = False
    ) -> T:
        """One call in the session's name; `parks` when the cloud may wait with its answer. Any call may be repeated
        (promise I7). Raises SessionLost, Refused, or RemoteError (ask again)."""
        counter = self.counter
        headers = {"Authorization": f"Covey {self.node}.{counter}.{self._file.now.secret}"}
        sent_ns = self.sent_ns = self._clock.boot_ns()
        try:
            answer = await self._endpoints.ask(
                "POST",
                f"/agent/v1/{path}",
                kind,
                body,
                repeatable=True,
                parks=parks,
                headers=headers,
                timeout_s=timeout_s,
            )
        except errors.RemoteError as error:
            if error.status not in (409, 410):
                raise
            if error.status == 409 and str(error).startswith(_HOLD):
                self.hold = self.hold or counter == self.counter  # else it was said of a view that is given up
                raise OnHold(str(error), 409) from error
            if counter == self.counter:
                self._lose(Standing.STALE if error.status == 409 else Standing.REMOVED)
            raise SessionLost(str(error), error.status) from error
        if not parks:
            took_s = (self._clock.boot_ns() - sent_ns) / _S
            self.usual_s = self.usual_s + _NEWEST * (took_s - self.usual_s) if self.usual_s else took_s
        if counter != self.counter or self.standing is Standing.STALE:
            raise SessionLost("the answer is for an earlier session", 409)
        lease = getattr(answer, "lease", None)
        if isinstance(lease, wire.LeaseTerms):
            self._renewed(lease, sent_ns)
        return answer

    def count(self) -> int:
        """The number of the next message of this session."""
        self.messages += 1
        return self.messages

    def acted_on(self, revision: int) -> None:
        """An act of an earlier life rests on this revision of the history last seen (safety S2)."""
        self.seen = wire.Seen(history=self.seen.history, revision=max(self.seen.revision, revision))

    def learn(self, seen: wire.Seen) -> bool:
        """Take note of the view that an answer rests on; False when the answer is older than what was seen before.
        Whatever is no hold is of one history, in which revisions compare whatever nonce was the newest then."""
        if seen.revision < self.seen.revision:
            return False
        if seen.history != self.seen.history:
            self._file.remember(seen)
        self.seen = seen
        return True

    def left_for_another(self) -> None:
        """The server that answered last is of a foreign history, or of another cloud: others are asked first."""
        if len(self._endpoints.urls) > 1:
            self._endpoints.mark_bad(self._endpoints.pick())

    def adopted(self, seen: wire.Seen) -> None:
        """A restored store knows all of this node: go on from its view, durably, in a new session (safety S19)."""
        self._file.remember(seen)
        self.seen = seen
        self.hold = False
        self._lose(Standing.STALE)

    def told_of_controllers(self, urls: tuple[str, ...]) -> None:
        """Where the cloud's controllers are now. An empty list teaches nothing: a controller that enters the cloud is
        not listed yet, and those that are known may be all there is."""
        if urls and urls != self._learnt:
            self._endpoints.learn(urls)
            self._file.learn(urls)
            self._learnt = urls

    async def leave(self, *, force: bool = False) -> None:
        """The operator takes this node out of the cloud. Raises Refused while it holds claims, unless `force`."""
        await self.call("leave", type(None), wire.Leave(force=force))
        self._lose(Standing.OUTSIDE)

    def _begin(self, answer: wire.Joined, sent_ns: int) -> None:
        if not self.seen.history:
            self.seen = answer.seen  # else the next poll shows what we saw, and the controller judges whether to hold
        self._file.joined(answer, self._offered, self.seen)
        self._offered = ""
        self.messages = 0
        self.sent_ns = sent_ns
        self.lease_until_ns = 0
        self._renewed(answer.lease, sent_ns)
        self.heartbeat_s = answer.heartbeat_s
        self.standing = Standing.GOOD  # a hold goes on: no answer of the own history has ended it
        self.good.set()

    def _renewed(self, lease: wire.LeaseTerms, sent_ns: int) -> None:
        until_ns = sent_ns + round((lease.ttl_s - lease.age_s - lease.margin_s) * _S)
        self.lease_until_ns = max(self.lease_until_ns, until_ns)

    def _lose(self, standing: Standing) -> None:
        if self.standing is not standing:
            _log.warning("the session is no longer good; nothing is started or destroyed", standing=str(standing))
        self.standing = standing
        self.good.clear()
