"""The agent: what a node shall run (wanted) → what to do next (convergence) → verbs → reports.

    join ─► poll wanted ─► one worker per instance ─► hypervisor's verbs
                                    │ says
    look now and then ─► word ─► outbox ─► reports, heartbeats

Rules: a fault of one VM, of one call or of one controller ends nothing here. VMs do not depend on the agent: when it
ends, by SIGTERM or kill -9, they run on, and the next agent on the same data directory adopts them from its records and
from what the hypervisor shows. Absence from an answer is never an order (safety S2). Several agents may run in one
process, so nothing is global.
"""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Iterable, Mapping
from pathlib import Path

import msgspec

import covey
from covey import errors, model, observe, wire, world
from covey.agent import (
    adoption,
    bell,
    contact,
    host,
    hypervisor,
    identity,
    images,
    look,
    neighbours,
    parts,
    questions,
    records,
    reports,
    session,
    verbs,
    worker,
)
from covey.client import http
from covey.decide import abridged

_PAUSE_S = 0.2
_PAUSE_LIMIT_S = 3.0
_REFUSED_PAUSE_S = 5.0
_POLL_GRACE_S = 5.0
_LOOK_LEAST_S = 0.1
_LOOK_AFTER_S = 2.0  # after a step of a worker: a word tells of VMs some seconds later anyway
_FACTS_S = 60.0
_SETTLE_LOOK_S = 0.02

_log = observe.log("agent")


class Config(model.Noun, frozen=True, kw_only=True):
    """One node. `data_dir` empty: nothing survives this process (synthetic nodes in numbers)."""

    data_dir: str = ""
    sync: bool = True  # False: what is on disk survives this process, not the host
    name: str = ""  # "": the host's
    ip: str = ""  # "": as the hypervisor's facts say; "" there too: as the controller sees it
    max_vms: int = 0  # 0: judged by the host
    explicit: bool = False  # an operator typed `covey join`
    limits: parts.Limits = parts.Limits()


class Agent:
    """One node's agent. `use` tells how busy the host is, `place` under which name and address it is reached. `touch`
    and `door` are shared by a process's agents; so many join at a time. `near`: other nodes that help."""

    def __init__(
        self,
        config: Config,
        clock: world.World,
        driver: hypervisor.Hypervisor,
        cache: images.Images,
        endpoints: http.Endpoints,
        *,
        use: Callable[[], tuple[float, float]] = host.idle,
        place: Callable[[], Awaitable[host.Place]] = host.nowhere,
        touch: contact.Contact | None = None,
        door: asyncio.Semaphore | None = None,
        near: neighbours.Neighbours | None = None,
    ) -> None:
        data = Path(config.data_dir) if config.data_dir else None
        self._config = config
        self._clock = clock
        self._driver = driver
        self._images = cache
        self._near = near
        self._use = use
        self._place = place
        self._contact = touch or contact.Contact()
        self._door = door or asyncio.Semaphore(1)
        self._records = records.Records(data, sync=config.sync)
        self._records.load(clock.wall_ns())
        self.session = session.Session(identity.File(data, clock, sync=config.sync), endpoints, clock)
        self.session.acted_on(self._records.newest_seen(self.session.seen.history))
        self._outbox = reports.Outbox(self.session, clock, self._word)
        self._look = look.Look(driver)
        self._ip = config.ip
        self._parts = parts.Parts(
            clock=clock,
            driver=driver,
            images=cache,
            records=self._records,
            session=self.session,
            outbox=self._outbox,
            look=self._look,
            limits=config.limits,
            changed=self._changes,
            host_ip=lambda: self._ip,
            suspect=self._suspect,
        )
        self._questions = questions.Questions(self._parts)
        self._adoption = adoption.Adoption(clock, self.session, self._records, self._look, config.limits.told_at_once)
        self._workers: dict[model.InstanceId, worker.Worker] = {}
        self._group: asyncio.TaskGroup | None = None
        self._found: look.Found = {}
        self._changed = bell.Bell()
        self._due: asyncio.TimerHandle | None = None  # when a look follows what workers have done
        self._tag = ""
        self._wants: tuple[wire.Wanted, ...] = ()  # by the last answer, less the orders that are known to be done
        self._after: tuple[tuple[wire.Wanted, ...], str] = ((), wire.tag((), ()))  # what was to be left last; its tag
        self._known = wire.Seen()  # the view in which they were all; of none: the next answer must name everything
        self._takes_reports = False  # the controller that answered last
        self._explicit = config.explicit
        self._joined_at = host.Place()
        self._moved = False  # since it joined: name or address
        self._trouble = ""
        self._suspected = False
        self._outbox.on_settled = self._settled

    def wake(self) -> None:
        """A VM may have changed by itself: the hypervisor's `Wake`."""
        if self._due is not None:
            self._due.cancel()
            self._due = None
        self._changed.ring()

    def _changes(self) -> None:
        """A worker has changed a VM, and knows of it; the next look, for the word, need not be at once."""
        if self._due is None:
            self._due = asyncio.get_running_loop().call_later(_LOOK_AFTER_S, self.wake)

    def _suspect(self) -> None:
        """A VM could not be prepared by this host's fault: look at once, so that the node is offered no more."""
        self._suspected = True
        self.wake()

    async def run(self) -> None:
        """For ever; end it by cancelling. VMs run on. Raises, in a group of one, HypervisorError with the remedy when
        this host cannot run VMs and never was a node, and SettingError when an operator's join is refused for good."""
        for record in self._records.all():
            self._images.pin(verbs.holder_of(record.key), record.spec.digest)
        try:
            async with asyncio.TaskGroup() as group:
                self._group = group
                for record in self._records.all():
                    self._worker(record.instance)
                for loop in (self._polling, self._outbox.run, self._watching):
                    group.create_task(self._keeping(loop))
        finally:
            self._group = None
            if self._due is not None:
                self._due.cancel()

    async def settle(self, limit_s: float) -> None:
        """Before an end in good order: ask for no launch any more, and use those that were asked for. One that is
        granted to a process which ends is lost, and its instance fails (safety S4)."""
        self.session.ending = True
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(limit_s):
                while any(one.launches for one in self._workers.values()):
                    await asyncio.sleep(_SETTLE_LOOK_S)

    async def _keeping(self, loop: Callable[[], Awaitable[None]]) -> None:
        """A loop that stumbles over a fault of ours is logged and begins again: the node must not fall silent."""
        while True:
            try:
                await loop()
            except (errors.HypervisorError, errors.SettingError):
                raise  # see `run`
            except Exception:
                _log.exception("the agent stumbled; it goes on", loop=loop.__name__)
            await asyncio.sleep(_REFUSED_PAUSE_S)

    # ---- join and poll ---------------------------------------------------------------------------------------------

    async def _polling(self) -> None:
        pause_s = _PAUSE_S
        complained = ""
        while True:
            trouble = away = ""
            try:
                if self._may_move() or self.session.standing in (session.Standing.OUTSIDE, session.Standing.STALE):
                    await self._join()
                await self._ask()
            except session.SessionLost:
                if self.session.standing is session.Standing.REMOVED:
                    pause_s = _REFUSED_PAUSE_S
                self._wake_all()
                trouble = "this session is no longer good"
            except errors.Refused as error:
                if self._explicit and not isinstance(error, session.NotYet):
                    raise errors.SettingError(f"the cloud refuses this node: {error}") from error
                self.session.left_for_another()  # it may be of another cloud, at an address that was used again
                trouble, pause_s = f"the cloud refuses this node: {error}", _REFUSED_PAUSE_S
            except errors.HypervisorError as error:
                if not self.session.node:
                    raise
                trouble, pause_s = f"this host cannot run VMs now: {error}", _REFUSED_PAUSE_S
            except errors.RemoteError as error:
                away = f"no controller answers: {error}"
                pause_s = max(pause_s, error.retry_after_s)
            except OSError as error:
                trouble, pause_s = f"this node's files cannot be written: {error}", _REFUSED_PAUSE_S
            self._contact.lost(self, away) if away else self._contact.found(self)
            complained = complained if away else _complain_once(trouble, complained)
            if not (trouble or away):
                pause_s = _PAUSE_S
                continue
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, _PAUSE_LIMIT_S)

    def _may_move(self) -> bool:
        """Whether to tell another name or address, in a session of its own. Not while a launch is under way: one that
        was granted to a session which has ended is lost, and its VM fails (safety S4). The next poll ends soon."""
        return self._moved and not any(one.launches for one in self._workers.values())

    async def _join(self) -> None:
        facts = await self._facts()
        async with self._door:
            joined = await self.session.join(facts, explicit=self._explicit)
        self._explicit = self._moved = False
        self._joined_at = host.Place(facts.name, facts.ip)
        self._ip = facts.ip or self._ip
        self._tag, self._wants, self._known = "", (), wire.Seen()
        self._outbox.begin()
        self._images.from_registries(joined.registries)
        self._wake_all()
        _log.info("joined", node=joined.node, session=joined.session, name=joined.name)

    async def _facts(self) -> model.Facts:
        facts = await self._driver.facts()
        name, ip = await self._place()
        return msgspec.structs.replace(
            facts,
            agent_version=facts.agent_version or covey.__version__,
            name=self._config.name or name or facts.name,
            ip=self._config.ip or ip or self._joined_at.ip or facts.ip,
            slots=self._config.max_vms or facts.slots,
            share_port=0 if self._near is None else self._near.port,
        )

    async def _ask(self) -> None:
        """One long poll, and what follows from it."""
        standing = self.session
        if self._takes_reports and not standing.hold:
            await self._outbox.gathered()
        number = standing.count()
        load = self._outbox.ride() if self._takes_reports and not standing.hold else reports.Load()
        ask = wire.Ask(
            seen=standing.seen,
            messages=number,
            tag=self._tag_after(load.items) if not standing.hold else "",
            known=self._known if not standing.hold else wire.Seen(),
            wait_s=wire.POLL_LIMIT_S,
            items=load.items,
            word=load.word,
        )
        limit_s = wire.POLL_LIMIT_S + _POLL_GRACE_S
        settled: tuple[int, ...] | None = None
        try:
            answer = await standing.call("wanted", wire.WantedState, ask, timeout_s=limit_s, parks=bool(ask.tag))
            self._takes_reports = answer.takes_reports
            settled = answer.settled if answer.takes_reports and not answer.hold else None
        except session.OnHold:
            await self._on_hold()
            return
        finally:
            self._outbox.rode(load, settled)
        standing.heartbeat_s = answer.heartbeat_s
        if answer.hold:
            await self._on_hold()
            return
        self._adoption.over()
        if not standing.learn(answer.seen):
            return  # an answer from an older view than one seen since: ask again
        if standing.hold:
            standing.hold = False
            self._wake_all()
        if self._near is not None:
            self._near.heard(answer.seen.history)
        standing.told_of_controllers(answer.controllers)
        self._apply(answer)
        if self._group is not None:
            self._questions.take(answer.questions, self._group)

    async def _on_hold(self) -> None:
        """A poll was answered from another history: nothing is begun or ended here (safety S18, S19)."""
        self.session.hold = True
        self._known = wire.Seen()
        try:
            await self._adoption.held()
        finally:  # also when this one cannot take what is told
            if self.session.standing is session.Standing.GOOD:
                self.session.left_for_another()
        if self.session.standing is session.Standing.GOOD:
            await asyncio.sleep(min(self.session.heartbeat_s, adoption.PAUSE_S))

    def _apply(self, answer: wire.WantedState) -> None:
        """Tell the workers. An answer that leaves out what is known counts only if nothing else is missing."""
        wanted, told = answer.wanted, {want.instance for want in answer.wanted}
        if answer.since:
            wanted = abridged.whole(self._wants, answer.wanted)
            if answer.since != self._known.revision or not abridged.is_all(wanted, answer.tag):
                self._tag, self._known = "", wire.Seen()
                return
            told |= {want.instance for want in self._wants} - {want.instance for want in wanted}
        else:
            told |= self._workers.keys()
        told |= {want.instance for want in wanted} - self._workers.keys()
        wants: dict[model.InstanceId, list[wire.Wanted]] = {}
        for want in wanted:
            if want.instance in told:
                wants.setdefault(want.instance, []).append(want)
            if want.neighbours and want.spec is not None and self._near is not None:
                self._near.told(want.spec.digest, want.neighbours)
        self._tag, self._wants, self._known = answer.tag, wanted, answer.seen
        for instance in told:
            self._worker(instance).told(tuple(wants.get(instance, ())), answer.seen)

    def _tag_after(self, items: Iterable[wire.Item]) -> str:
        """The tag of what is wanted once these were taken: an order is done when what it names is gone."""
        gone = {item.instance: item.epoch for item in items if item.event is wire.ReportEvent.GONE}
        if not gone:
            return self._tag
        rest = self._left(gone)
        if not self._tag or len(rest) == len(self._wants):
            return self._tag
        if rest != self._after[0]:
            self._after = rest, wire.tag(rest, ())
        return wire.retag(self._after[1], wire.untag(self._tag)[1])

    def _left(self, gone: Mapping[model.InstanceId, int]) -> tuple[wire.Wanted, ...]:
        destroy = wire.Verb.DESTROY
        return tuple(
            [want for want in self._wants if want.verb is not destroy or want.epoch > gone.get(want.instance, -1)]
        )

    def _settled(self, item: wire.Item) -> None:
        """The cloud knows it. An order that it ends is done; if it is given again, that is news."""
        key = (item.instance, item.epoch)
        if item.event is wire.ReportEvent.GONE and self._outbox.has_said(key, item.event):
            rest = self._left({item.instance: item.epoch})
            if len(rest) < len(self._wants):
                self._tag, self._wants = self._tag_after((item,)), rest
        one = self._workers.get(item.instance)
        if one is not None:
            one.settled(item)

    # ---- workers ---------------------------------------------------------------------------------------------------

    def _worker(self, instance: model.InstanceId) -> worker.Worker:
        known = self._workers.get(instance)
        if known is None:
            known = self._workers[instance] = worker.Worker(self._parts, instance)
            if self._group is not None:
                self._group.create_task(self._working(known))
        return known

    async def _working(self, one: worker.Worker) -> None:
        """A worker that stumbles over a fault of ours is logged and goes on: the other VMs must not suffer."""
        while True:
            try:
                await one.run()
                break
            except Exception:
                _log.exception("a worker stumbled; it begins again", instance=one.instance)
                await asyncio.sleep(_REFUSED_PAUSE_S)
        del self._workers[one.instance]
        self._outbox.expect_no_more(one.instance)

    def _wake_all(self) -> None:
        for one in self._workers.values():
            one.wake()

    # ---- what runs here --------------------------------------------------------------------------------------------

    async def _watching(self) -> None:
        """Look at the VMs when told that something changed, and once a heartbeat; wake whom it concerns."""
        checked_ns = self._clock.boot_ns()
        while True:
            self._changed.clear()
            try:
                checked_s = (self._clock.boot_ns() - checked_ns) / 1e9
                if self._suspected or checked_s > (_FACTS_S if not self._trouble else self.session.heartbeat_s):
                    self._suspected = False
                    checked_ns = self._clock.boot_ns()
                    facts = await self._facts()
                    self._moved = self._joined_at not in (host.Place(), host.Place(facts.name, facts.ip))
                    self._trouble = ""
                self._notice(await self._look.fresh())
            except errors.HypervisorError as error:
                self._trouble = str(error)
            self._outbox.changed()
            await asyncio.sleep(_LOOK_LEAST_S)
            await self._changed.wait(self.session.heartbeat_s)

    def _notice(self, found: look.Found) -> None:
        before, self._found = self._found, found
        changed = [key for key, vm in found.items() if before.get(key) != vm]
        for key in (*changed, *(before.keys() - found.keys())):
            if key[0] in self._workers:
                self._workers[key[0]].noticed(key[1], found.get(key))
        self._outbox.keep(self._workers.keys() | {instance for instance, _ in found})

    def _word(self) -> model.Word:
        """How the node is now. VMs of another cloud are counted, never named (safety S12)."""
        cloud, shown = self.session.cloud, self._look.shown
        own = {key: vm for key, vm in shown.items() if vm.cloud == cloud}
        cpu, ram = self._use()
        free = self._images.free_bytes()
        return model.Word(
            node=self.session.node,
            session=self.session.counter,
            messages=0,
            at_ns=self._clock.wall_ns(),
            vms=tuple(
                model.VmSeen(
                    instance=vm.instance,
                    epoch=vm.epoch,
                    running=vm.phase is hypervisor.Phase.RUNNING,
                    cloud=vm.cloud,
                )
                for _, vm in sorted(own.items())
            ),
            images=self._images.held(),
            free_disk_bytes=max(free, 0),
            image_bytes=self._images.size_bytes(),
            cpu_util=cpu,
            ram_util=ram,
            foreign_vms=len(shown) - len(own),
            trouble=self._trouble or ("the disk is full" if free <= 0 else ""),
        )


def _complain_once(trouble: str, before: str) -> str:
    """One line when a thing goes away, and one when it is back; what was complained of last."""
    if trouble and not before:
        _log.warning("this node takes no part in the cloud; VMs run on", why=trouble)
    elif before and not trouble:
        _log.info("this node takes part in the cloud again")
    return trouble
