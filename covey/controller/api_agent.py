"""/agent/v1/: the agents' side (docs/agent-protocol.md; nouns in `covey.wire`).

Every call but `join` names its session and is answered from a view at least as new as what the agent has seen (safety
S22). A session that is not the newest gets 409, one of a removed node 410, and 503 means: ask another controller,
nothing was decided. Each message renews the node's lease, or rests on a renewal of seconds ago (safety S8); when this
controller is not ready it renews none. A poll parks for at most a third of the lease's life, and is answered at once
when what the node shall do may have changed, when the controller goes down, and when it turns red (safety S25). A
report may ride along with a poll: it is taken before the poll parks, and settled by its answer.
"""

import asyncio
import contextlib
import hashlib
import hmac
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import msgspec

from covey import answer, errors, model, observe, serve, wire
from covey.controller import api_adopt, figures, naming, neighbours, parking, renewals, wanted
from covey.decide import heartbeat, permission
from covey.store import (
    codec,
    commit,
    commit_instances,
    commit_nodes,
    commit_questions,
    commit_reports,
    mirror,
    schema,
    view,
)

_REPORT_LIMIT_BYTES = 16 * serve.MIB
_PIECE_BYTES = 500_000  # of a report, that goes into one transaction
_PIECE_ITEMS = 20
_PAUSE_S = 0.05
_STALE = api_adopt.STALE
_GONE = "the node was removed from the cloud"

log = observe.log("agents")


class Terms(NamedTuple):
    """What agents are told. `heartbeat_s`: at least, see `decide.heartbeat`."""

    heartbeat_s: float
    registries: tuple[str, ...]


class _Caller(NamedTuple):
    """An authenticated session."""

    life: codec.Kept[model.Session]
    arrived_ns: int

    @property
    def node(self) -> model.NodeId:
        return self.life.noun.node

    @property
    def session(self) -> int:
        return self.life.noun.counter


class AgentApi:
    """`parking` is where polls wait; its alarm is on while they must be answered."""

    def __init__(
        self,
        mirror: mirror.Mirror,
        writer: commit.Writer,
        renewals: renewals.Renewals,
        terms: Terms,
        parking: parking.Parking,
        trouble: Callable[[], str],
    ) -> None:
        self._mirror = mirror
        self._writer = writer
        self._renewals = renewals
        self._terms = terms
        self._parking = parking
        self._trouble = trouble
        self._figures = figures.Figures(writer, mirror.snapshot)

    def routes(self) -> Sequence[serve.Route]:
        return [
            serve.Route("POST", "/agent/v1/join", self.join),
            serve.Route(
                "POST", "/agent/v1/wanted", self.wanted, time_limit_s=None, body_limit_bytes=_REPORT_LIMIT_BYTES
            ),
            serve.Route("POST", "/agent/v1/launch", self.launch),
            serve.Route("POST", "/agent/v1/report", self.report, body_limit_bytes=_REPORT_LIMIT_BYTES),
            serve.Route("POST", "/agent/v1/answer", self.answer),
            serve.Route("POST", "/agent/v1/adopt", self.adopt, body_limit_bytes=_REPORT_LIMIT_BYTES),
            serve.Route("POST", "/agent/v1/leave", self.leave),
        ]

    # ---- join and leave --------------------------------------------------------------------------------------------

    async def join(self, call: serve.Call) -> wire.Joined:
        arrived_ns = self._writer.world.boot_ns()
        asked = await call.json(wire.Join)
        if not asked.facts.ip:
            asked = msgspec.structs.replace(asked, facts=msgspec.structs.replace(asked.facts, ip=call.client))
        self._check_ready()
        snapshot = await self._mirror.fresh()
        call.still_fresh()
        joined = await commit_nodes.join(self._writer, snapshot, asked, call.until_ns)
        if isinstance(joined, commit_nodes.JoinRefused):
            raise _join_fault(joined.why)
        session = joined.session.noun
        if not joined.repeated:
            log.info("a node joined", node=session.node, session=session.counter, name=session.facts.name)
        # A repeat's lease was granted at the first one, whoever knows when.
        lease = (
            await self._renew(_Caller(joined.session, arrived_ns), snapshot) if joined.repeated else wire.LeaseTerms()
        )
        return wire.Joined(
            node=session.node,
            session=session.counter,
            cloud=snapshot.cloud,
            seen=snapshot.seen,
            lease=lease,
            heartbeat_s=self._heartbeat_s(snapshot),
            registries=self._terms.registries,
            name=joined.node.noun.name or session.facts.name,
        )

    async def leave(self, call: serve.Call) -> None:
        asked = await call.json(wire.Leave)
        self._check_ready()
        snapshot = await self._mirror.fresh()
        node = _credentials(call)[0]
        if snapshot.session(node) is None and snapshot.removed(node) is None:
            return  # it has left: the answer to an earlier request was lost
        caller = _authenticate(call, snapshot, self._writer.world.boot_ns())
        if snapshot.held(caller.node) and not asked.force:
            raise errors.Refused("the node has not yet told what it runs, since the store was restored; wait a moment")
        who = f"agent of node {caller.node}"
        call.still_fresh()
        left = await commit_nodes.leave(
            self._writer, snapshot, caller.node, caller.session, force=asked.force, who=who, until_ns=call.until_ns
        )
        match left:
            case commit_nodes.StillClaimed(instances=instances):
                text = f"the node still holds {len(instances)} VMs; terminate them, or leave with force"
                raise errors.Refused(text)
            case commit.Lost():
                raise answer.Fault(409, _STALE)
            case commit.Missing():
                raise answer.Fault(410, _GONE)
        log.info("a node left", node=caller.node)

    # ---- wanted ----------------------------------------------------------------------------------------------------

    async def wanted(self, call: serve.Call) -> wire.WantedState:
        arrived_ns = self._writer.world.boot_ns()
        ask = await call.json(wire.Ask)
        find = self._writing_caller if ask.items else self._caller
        caller, snapshot, hold = await find(call, ask.seen, arrived_ns)
        lease = await self._renew(caller, snapshot)
        until_ns = arrived_ns + int(min(max(ask.wait_s, 0.0), wire.POLL_LIMIT_S) * 1e9)
        settled: tuple[int, ...] = ()
        if not hold and (ask.items or ask.word is not None):
            settled, revision = await self._take(call, caller, snapshot, ask)
            if ask.items:  # the tag is of what the node shall do after that
                snapshot = await self._after(revision)
                _authenticate(call, snapshot, arrived_ns)
                hold = await api_adopt.must_hold(self._writer, snapshot, caller.node, ask.seen)
        wants = wanted.for_node(snapshot, caller.node)
        while not hold and not wants.news_for(ask.tag) and self._writer.world.boot_ns() < until_ns:
            if call.draining.is_set():  # what is short is still served; who waits shall wait elsewhere
                raise errors.Unavailable("this controller is going down; ask another controller")
            if not await self._park(call, caller.node, snapshot.revision, until_ns):
                break
            self._check_ready()
            call.still_here()
            snapshot = self._newer(snapshot)
            _authenticate(call, snapshot, arrived_ns)
            hold = await api_adopt.must_hold(self._writer, snapshot, caller.node, ask.seen)
            wants = wanted.for_node(snapshot, caller.node)
        since = 0 if hold else wanted.known_since(snapshot, ask.known)
        return wire.WantedState(
            seen=snapshot.seen,
            tag=wants.tag,
            wanted=() if hold else tuple(_named(wants.since(since), snapshot, caller.node)),
            since=since,
            lease=lease,
            heartbeat_s=self._heartbeat_s(snapshot),
            hold=bool(hold),
            questions=wants.questions,
            controllers=tuple(sorted(one.noun.url for one in snapshot.controllers() if one.noun.url)),
            settled=settled,
            takes_reports=True,
        )

    async def _after(self, revision: int) -> view.Snapshot:
        """A view that shows what a transaction of this call wrote or found, and so all that was answered before it."""
        await self._mirror.seen_at(revision)
        self._check_ready()
        return self._mirror.snapshot()

    async def _park(self, call: serve.Call, node: model.NodeId, revision: int, until_ns: int) -> bool:
        """Until the node's wanted state may have changed, time is up, or the alarm is raised. False: this poll gives
        way to a newer one of the node."""
        if self._parking.alarmed:  # about to be lowered: this controller is ready again
            await asyncio.sleep(_PAUSE_S)
            return True
        left_s = (until_ns - self._writer.world.boot_ns()) / 1e9
        with self._parking.spot(node) as spot, call.aside():
            if not self._mirror.has_node_changed(node, revision):
                await spot.wait(left_s)
            elif self._mirror.revision <= revision:
                await asyncio.sleep(_PAUSE_S)  # a restored store was read directly, and its copy is not that far yet
            return not spot.gives_way

    async def _caller(self, call: serve.Call, seen: wire.Seen, arrived_ns: int) -> tuple[_Caller, view.Snapshot, str]:
        """Who calls, a view at least as new as what it has seen, and why it must hold; "" if not. What cannot have been
        seen here is answered 409 at once (safety S22)."""
        caller, snapshot = await self._named_caller(call, arrived_ns)
        hold = await api_adopt.must_hold(self._writer, snapshot, caller.node, seen)
        if seen.revision > snapshot.revision:
            await self._renew(caller, snapshot)
            raise answer.Fault(409, f"hold: revision {seen.revision} is in this store's future: {hold}")
        return caller, snapshot, hold

    async def _writing_caller(
        self, call: serve.Call, seen: wire.Seen, arrived_ns: int
    ) -> tuple[_Caller, view.Snapshot, str]:
        """As `_caller`, for what a transaction carries or proves that compares the session: from a view that may lack
        the newest writes, unless that shows anything against the caller."""
        self._check_ready()
        snapshot = await self._mirror.current()
        kin = snapshot.kinship(seen) if seen.revision else permission.Kinship.OWN
        if kin is permission.Kinship.OWN and seen.revision <= snapshot.revision:
            with contextlib.suppress(answer.Fault):
                caller = _authenticate(call, snapshot, arrived_ns)
                if not snapshot.held(caller.node):
                    return caller, snapshot, ""
        return await self._caller(call, seen, arrived_ns)

    async def _named_caller(self, call: serve.Call, arrived_ns: int) -> tuple[_Caller, view.Snapshot]:
        self._check_ready()
        snapshot = await self._mirror.fresh()
        return _authenticate(call, snapshot, arrived_ns), snapshot

    def _newer(self, snapshot: view.Snapshot) -> view.Snapshot:
        """The mirror's view, unless a direct one was ahead of it (safety S21). A break makes others count no more."""
        mirrored = self._mirror.snapshot()
        newer = mirrored.revision > snapshot.revision or snapshot.is_shut_out_from(mirrored)
        return mirrored if newer else snapshot

    # ---- launch ----------------------------------------------------------------------------------------------------

    async def launch(self, call: serve.Call) -> wire.Launched:
        """Leave to run guest code: the start script travels only with it (safety S1)."""
        arrived_ns = self._writer.world.boot_ns()
        ask = await call.json(wire.LaunchAsk)
        caller, snapshot, hold = await self._writing_caller(call, ask.seen, arrived_ns)
        lease = await self._renew(caller, snapshot)
        if hold:
            return wire.Launched(granted=False, lease=lease, seen=snapshot.seen, why=f"hold: {hold}")
        call.still_fresh()
        outcome = await commit_instances.launch(
            self._writer, snapshot, caller.node, caller.session, ask.instance, ask.epoch, ask.nonce, call.until_ns
        )
        if isinstance(outcome, commit_instances.Denied):
            if outcome.stale_session:
                raise answer.Fault(409, _STALE)
            return wire.Launched(granted=False, lease=lease, seen=snapshot.seen, why=outcome.why)
        seen = await self._mirror.seen_at(max(snapshot.revision, outcome.instance.revision))
        script = await self._script(outcome.instance.noun)
        return wire.Launched(granted=True, lease=lease, seen=seen, script=script)

    async def _script(self, instance: model.Instance) -> str:
        """The start script, base64."""
        if instance.spec.script is None:
            return ""
        page = await self._writer.store.range(schema.script(instance.spec.script.key))
        return page.kvs[0].value.decode("ascii") if page.kvs else ""

    # ---- report ----------------------------------------------------------------------------------------------------

    async def report(self, call: serve.Call) -> wire.Reported:
        arrived_ns = self._writer.world.boot_ns()
        report = await call.json(wire.Report)
        find = self._writing_caller if report.items else self._caller
        caller, snapshot, hold = await find(call, report.seen, arrived_ns)
        if hold:
            raise answer.Fault(409, f"hold: {hold}")
        lease = await self._renew(caller, snapshot)
        settled, _ = await self._take(call, caller, snapshot, report)
        return wire.Reported(lease=lease, seen=snapshot.seen, settled=settled)

    async def _take(
        self, call: serve.Call, caller: _Caller, snapshot: view.Snapshot, told: wire.Report | wire.Ask
    ) -> tuple[tuple[int, ...], int]:
        """What is settled of a report, and the revision of the last transaction for its items (0: it has none)."""
        settled: list[int] = []
        revision = 0
        for start, piece in _pieces(told.items):
            call.still_fresh()
            applied = await commit_reports.report(
                self._writer, snapshot, caller.node, caller.session, piece, call.until_ns
            )
            if isinstance(applied, commit_reports.StaleSession):
                raise answer.Fault(409, _STALE)
            settled += [start + index for index in applied.settled]
            revision = max(revision, applied.revision)
        if told.word is not None:
            await self._say(caller, snapshot, _without_gone(told.word, told.items), told.messages)
        return tuple(settled), revision

    async def _say(self, caller: _Caller, snapshot: view.Snapshot, word: model.Word, messages: int) -> None:
        """The node's last word, in its own name only. A lost one comes again within the minute."""
        own = msgspec.structs.replace(
            word,
            node=caller.node,
            session=caller.session,
            messages=messages,
            at_ns=self._writer.world.wall_ns(),
        )
        known = snapshot.word(caller.node)
        if not heartbeat.is_news(own, None if known is None else known.noun):
            self._figures.later(own)
            return
        said = await commit_nodes.say(self._writer, snapshot, caller.node, caller.session, own)
        if isinstance(said, commit.Lost):
            raise answer.Fault(409, _STALE)

    # ---- answer ----------------------------------------------------------------------------------------------------

    async def answer(self, call: serve.Call) -> wire.Answered:
        """What the node keeps of a VM's output, for a reader who waits at whatever controller."""
        arrived_ns = self._writer.world.boot_ns()
        given = await call.json(wire.Answer)
        if given.output is not None and len(given.output.data) > schema.ANSWER_LIMIT_BYTES:
            raise errors.Refused(f"output: at most {schema.ANSWER_LIMIT_BYTES} bytes are taken at once")
        caller, snapshot, hold = await self._caller(call, given.seen, arrived_ns)
        lease = await self._renew(caller, snapshot)
        if hold:
            return wire.Answered(lease=lease, seen=snapshot.seen)
        call.still_fresh()
        outcome = await commit_questions.answer(
            self._writer,
            snapshot,
            caller.node,
            caller.session,
            given.nonce,
            given.output,
            given.fault,
            call.until_ns,
        )
        if isinstance(outcome, commit_reports.StaleSession):
            raise answer.Fault(409, _STALE)
        return wire.Answered(lease=lease, seen=snapshot.seen, taken=outcome.taken)

    # ---- adopt -----------------------------------------------------------------------------------------------------

    async def adopt(self, call: serve.Call) -> wire.Adopted:
        """What a held node has (safety S19). It is released by the part marked `last`."""
        arrived_ns = self._writer.world.boot_ns()
        told = await call.json(wire.Adopt)
        caller, snapshot = await self._named_caller(call, arrived_ns)
        await api_adopt.must_hold(self._writer, snapshot, caller.node, told.seen)
        lease = await self._renew(caller, snapshot)
        call.still_fresh()
        snapshot = self._newer(snapshot)  # a break may have been entered just now
        await api_adopt.adopt(self._writer, snapshot, caller.life.noun, told, call.until_ns)
        return wire.Adopted(lease=lease, seen=snapshot.seen)

    def _heartbeat_s(self, snapshot: view.Snapshot) -> float:
        return heartbeat.interval_s(snapshot.alive_count(), snapshot.controller_count(), self._terms.heartbeat_s)

    # ---- what all calls share --------------------------------------------------------------------------------------

    def _check_ready(self) -> None:
        trouble = self._trouble()
        if trouble:
            raise errors.Unavailable(f"{trouble}; ask another controller")

    async def _renew(self, caller: _Caller, snapshot: view.Snapshot) -> wire.LeaseTerms:
        """Of a node that seems lost nothing is taken for granted for long: its lease may have ended early."""
        lives = snapshot.alive(caller.node) is not None
        told_s = self._heartbeat_s(snapshot) if lives else heartbeat.MOST_S
        try:
            return await self._renewals.renewed(caller.life.noun.lease, caller.arrived_ns, told_s)
        except renewals.LeaseGone as error:
            raise answer.Fault(409, "the node's lease has ended: join again") from error


def _credentials(call: serve.Call) -> tuple[str, str, str]:
    """Node id, session counter and secret, as the caller says."""
    scheme, _, credentials = call.headers.get("Authorization", "").partition(" ")
    parts = credentials.strip().split(".")
    if scheme.lower() != "covey" or len(parts) != 3:
        raise answer.Fault(400, "Authorization: send Covey <node id>.<session>.<secret>")
    return parts[0], parts[1], parts[2]


def _authenticate(call: serve.Call, snapshot: view.Snapshot, arrived_ns: int) -> _Caller:
    """The session named by ``Authorization: Covey <node>.<counter>.<secret>``, if it is the newest (safety S7)."""
    node, counter, secret = _credentials(call)
    if snapshot.removed(node) is not None:
        raise answer.Fault(410, _GONE)
    life = snapshot.session(node)
    digest = hashlib.sha256(secret.encode()).hexdigest()
    if life is None or counter != str(life.noun.counter):
        raise answer.Fault(409, _STALE)
    if not hmac.compare_digest(digest, life.noun.secret_sha256):
        raise answer.Fault(409, _STALE)
    return _Caller(life, arrived_ns)


def _named(wants: Sequence[wire.Wanted], snapshot: view.Snapshot, node: model.NodeId) -> Iterator[wire.Wanted]:
    """With the VMs' names filled in, and with whom to fetch their templates from."""
    kept, session = snapshot.node(node), snapshot.session(node)
    node_name = (kept.noun.name if kept else "") or (session.noun.facts.name if session else "")
    for want in wants:
        instance = snapshot.instance(want.instance)
        if want.spec is None or instance is None:
            yield want
        else:
            name = naming.vm_name(instance.noun, node_name)
            pulls = want.verb is wire.Verb.RUN and not want.launched
            near = neighbours.of(snapshot, node, want.spec.digest) if pulls else ()
            yield msgspec.structs.replace(want, vm_name=name, neighbours=near)


def _without_gone(word: model.Word, items: Sequence[wire.Item]) -> model.Word:
    """The word without VMs that the same report says are gone: it was looked up a moment before, and would bring back
    the claims that they had."""
    gone = {(item.instance, item.epoch) for item in items if item.event is wire.ReportEvent.GONE}
    return msgspec.structs.replace(word, vms=tuple(vm for vm in word.vms if (vm.instance, vm.epoch) not in gone))


def _pieces(items: Sequence[wire.Item]) -> Iterator[tuple[int, Sequence[wire.Item]]]:
    """The report in parts that each fit one transaction, with the index of their first item."""
    start = size = 0
    for index, item in enumerate(items):
        more = len(item.stdout) + len(item.stderr) + len(item.message) + 1000
        if index > start and (size + more > _PIECE_BYTES or index - start == _PIECE_ITEMS):
            yield start, items[start:index]
            start, size = index, 0
        size += more
    if items:
        yield start, items[start:]


def _join_fault(why: commit_nodes.Why) -> errors.CoveyError:
    match why:
        case commit_nodes.Why.REMOVED:
            return answer.Fault(410, _GONE)
        case commit_nodes.Why.SECRET | commit_nodes.Why.ALIVE:
            return answer.Fault(409, str(why))
    return errors.Refused(str(why))
