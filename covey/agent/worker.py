"""One worker per instance: it alone calls the hypervisor's verbs for the instance's VMs, one after the other.

A turn: let `decide.convergence` name the next step by what is there, do it, and go on from what it has made of the VM.
What is there is looked at again after a step that did not end well, and when the node's look shows it differently.
An order to destroy is entered as a durable tombstone by `told` before anything else happens; it cancels the step under
way, the worker waits for that step to end, and only then removes the VM and says `gone` (safety S6).
"""

import asyncio
import contextlib
from collections.abc import Mapping
from typing import Any

import msgspec

from covey import errors, model, observe, wire
from covey.agent import bell, hypervisor, look, parts, records, script, verbs
from covey.decide import convergence

Body = convergence.Body
Do = convergence.Do
Stage = convergence.Stage
Said = wire.ReportEvent

_BEGINNING = (Do.PREPARE, Do.ASK_LAUNCH, Do.START, Do.FOLLOW)  # what an order to destroy cuts short
_BODIES = {phase: Body(phase.value) for phase in hypervisor.Phase}
_PAUSE_S = 1.0  # after a step that could not be done
_ASK_AGAIN_S = 2.0  # after a launch that was not granted

_log = observe.log("agent")


class Worker:
    """`run` it as a task; it ends when nothing of the instance is here, wanted or unsaid."""

    def __init__(self, shared: parts.Parts, instance: model.InstanceId) -> None:
        self.instance = instance
        self._parts = shared
        self._verbs = verbs.Verbs(shared)
        self._told = False  # in this life of the agent; until then nobody knows what is wanted, and whether to hold
        self._wants: tuple[wire.Wanted, ...] = ()
        self._seen = wire.Seen()
        self._woken = bell.Bell()
        self._bodies = shared.look.last(instance)  # by epoch; None: look first
        self._doubted = False  # a VM may have changed by itself
        self._nonces: dict[int, tuple[int, str]] = {}  # epoch -> (session, nonce) of a launch asked for
        self._grants: dict[int, verbs.Grant] = {}
        self._step: convergence.Step | None = None
        self._task: asyncio.Task[Any] | None = None  # this worker's own
        self._cut = False  # an order to destroy has cancelled the step under way
        self._background: dict[int, asyncio.Task[None]] = {}
        self._ask_after_ns: dict[int, int] = {}  # epoch -> when a launch that was not granted may be asked for again

    def told(self, wants: tuple[wire.Wanted, ...], seen: wire.Seen) -> None:
        """A new answer; an order to destroy in it is on disk when this returns. Never called while on hold."""
        if self._told and wants == self._wants:
            return
        self._told = True
        known = {(want.epoch, want.verb) for want in self._wants}
        if any((want.epoch, want.verb) not in known for want in wants):
            self._parts.outbox.expect(self.instance)
        self._wants, self._seen = wants, seen
        for want in wants:
            if want.verb is wire.Verb.DESTROY and want.decision is not None:
                self._bury(want, want.decision)
        self._woken.ring()

    def settled(self, item: wire.Item) -> None:
        """The cloud knows it. An order to destroy what is gone is done, unless it was given anew since."""
        if item.event is Said.GONE and self._parts.outbox.has_said((self.instance, item.epoch), Said.GONE):
            self._wants = tuple(
                want for want in self._wants if want.verb is not wire.Verb.DESTROY or want.epoch > item.epoch
            )
        if not self._wants:
            self._woken.ring()

    def noticed(self, epoch: int, vm: hypervisor.Vm | None) -> None:
        """A look shows a VM differently; that is no news where a step of this worker has made it so."""
        known = None if self._bodies is None else self._bodies.get(epoch)
        if self._bodies is None or (known and known.phase) != (vm and vm.phase):
            self.wake()

    def wake(self) -> None:
        """Something about the instance may have changed: look again."""
        self._doubted = True
        self._woken.ring()

    @property
    def launches(self) -> bool:
        """Whether launch is asked for, or granted and not used yet."""
        return bool(self._grants) or (self._step is not None and self._step.do is Do.ASK_LAUNCH)

    async def run(self) -> None:
        self._task = asyncio.current_task()
        self._only_cut()
        try:
            while True:
                self._woken.clear()
                if self._doubted:  # also when that was during a step
                    self._doubted, self._bodies = False, None
                step = await self._next()
                if step is not None:
                    await self._carry_out(step)
                elif self._over():
                    return
                else:
                    await self._rest()
        finally:
            self._bodies = None
            self._parts.look.left(self.instance)
            await self._end_tasks(list(self._background.values()))

    async def _rest(self) -> None:
        """Until something may have changed: told, seen by a look, or, where one must ask oneself, after a while."""
        self._parts.outbox.expect_no_more(self.instance)
        now_ns = self._parts.clock.boot_ns()
        waits = any(after_ns > now_ns for after_ns in self._ask_after_ns.values())
        waits = waits or any(_addressless(one) for one in self._here())
        await self._woken.wait(_ASK_AGAIN_S if waits else None)
        self._doubted = self._doubted or waits

    # ---- deciding --------------------------------------------------------------------------------------------------

    async def _next(self) -> convergence.Step | None:
        """The first step that does something; None: nothing to do now."""
        if self._bodies is None:
            self._bodies = look.of(await self._parts.look.fresh(), self.instance)
        tombstone = self._parts.records.tombstone(self.instance)
        here = self._here()
        if here:
            self._run_scripts(here)
            await self._learn_addresses(here)
        steps = convergence.of_instance(
            self._wants,
            self._locals(self._bodies),
            None if tombstone is None else tombstone.grave(),
            cloud=self._parts.session.cloud,
            hold=not self._parts.session.may_act,
        )
        for step in steps:
            if step.do is not Do.NOTHING and not self._too_soon(step):
                return step
        return None

    def _too_soon(self, step: convergence.Step) -> bool:
        """A launch is not asked for twice in a row; one that was not granted says nothing about a newer epoch's. Nor is
        one asked for that this process would not live to use."""
        if step.do is not Do.ASK_LAUNCH:
            return False
        return self._parts.session.ending or self._parts.clock.boot_ns() < self._ask_after_ns.get(step.epoch, 0)

    def _locals(self, bodies: Mapping[int, hypervisor.Vm]) -> list[convergence.Local]:
        """Every epoch that is on record, here or named in the answer: of the last too it counts what was said."""
        known = self._parts.records.by_epoch(self.instance)
        epochs = {want.epoch for want in self._wants}.union(known, bodies)
        return [self._local(epoch, known.get(epoch), bodies.get(epoch)) for epoch in sorted(epochs)]

    def _local(self, epoch: int, record: records.Record | None, vm: hypervisor.Vm | None) -> convergence.Local:
        standing = self._parts.session
        asked = self._nonces.get(epoch)
        grant = self._grants.get(epoch)
        return convergence.Local(
            instance=self.instance,
            epoch=epoch,
            cloud=vm.cloud if vm is not None else record.cloud if record is not None else standing.cloud,
            stage=Stage.ACCEPTED if record is None else record.stage,
            body=Body.ABSENT if vm is None else _BODIES[vm.phase],
            asked=asked is not None and asked[0] == standing.counter,
            granted=grant is not None and grant.session == standing.counter,
            after=convergence.After.KEEP if record is None else record.after,
            said=self._parts.outbox.said((self.instance, epoch)),
        )

    def _over(self) -> bool:
        """Nothing wanted, nothing here, nothing unsaid: what is on record is of no use to anybody any more. Not before
        the first answer: a restored store must be told of a VM that is on record alone (safety S19)."""
        if not self._told or self._wants or self._bodies or self._parts.outbox.waits_for(self.instance):
            return False
        if not self._parts.session.may_act:
            return False
        for record in list(self._parts.records.by_epoch(self.instance).values()):
            self._parts.records.forget(record.key)
            self._parts.images.release(verbs.holder_of(record.key))
        return True

    # ---- doing -----------------------------------------------------------------------------------------------------

    async def _carry_out(self, step: convergence.Step) -> None:
        """One step to its end, or to the end that an order to destroy makes of it by cutting it short."""
        if step.do is Do.REPORT and step.event is not None:
            self._report((self.instance, step.epoch), step.event)
            return
        _log.debug("next step", step=str(step.do), instance=step.instance, epoch=step.epoch, why=step.why)
        self._step = step
        failed: Exception | None = None
        try:
            await self._do(step)
        except asyncio.CancelledError:
            self._bodies = None
            if not self._only_cut():
                raise
        except Exception as error:
            self._bodies = None
            if not isinstance(error, errors.CoveyError | OSError):
                raise
            failed = error
        finally:
            self._step = None
        self._only_cut()  # a cut that came too late is of no consequence
        if failed is not None:
            what = "a step could not be done; it is tried again"
            _log.error(what, step=str(step.do), instance=self.instance, error=str(failed))
            await asyncio.sleep(_PAUSE_S)

    def _only_cut(self) -> bool:
        """Whether an order to destroy has cancelled the step, and nobody has cancelled this worker."""
        if not self._cut or self._task is None:
            return False
        self._cut = False
        return self._task.uncancel() == 0

    async def _do(self, step: convergence.Step) -> None:
        key = (self.instance, step.epoch)
        if step.do is Do.DESTROY and step.decision is not None:
            await self._destroy(key, step.decision)
        elif step.do is Do.FAIL:
            self._fail(key, step.why)
        else:
            record = self._record(step.epoch)
            if record is None:
                raise errors.HypervisorError(f"{step.do}: nothing is known of epoch {step.epoch}")
            await self._on_record(step.do, record)

    async def _on_record(self, do: Do, record: records.Record) -> None:
        if do is Do.PREPARE:
            self._parts.records.save(record)
            want = self._want(record.epoch)
            after = await self._verbs.prepare(record, acknowledged=want is not None and want.acknowledged)
            self._stands(after, Body.PREPARED if after.stage is Stage.ACCEPTED else Body.ABSENT)
        elif do is Do.ASK_LAUNCH:
            await self._ask_launch(record)
        elif do is Do.START:
            await self._start(record)
        elif do is Do.FOLLOW:
            if self._parts.records.get(record.key) is None:  # just made anew: its time to boot begins only once
                self._parts.records.save_if_possible(record)
            after = await self._verbs.follow(record, self._woken)
            if after.stage is not Stage.BOOTED:
                self._bodies = None
        elif do is Do.STOP:
            await self._end_script(record.epoch)
            after = await self._verbs.stop(record)
            self._bodies = None

    async def _ask_launch(self, record: records.Record) -> None:
        counter = self._parts.session.counter
        known = self._nonces.get(record.epoch)
        nonce = known[1] if known is not None and known[0] == counter else self._parts.clock.token()
        self._nonces[record.epoch] = (counter, nonce)
        grant = await self._verbs.ask_launch(record, nonce)
        if grant is not None:
            self._grants[record.epoch] = grant
        else:
            self._nonces.pop(record.epoch, None)
            self._ask_after_ns[record.epoch] = self._parts.clock.boot_ns() + round(_ASK_AGAIN_S * 1e9)
            if not self._parts.outbox.has_said(record.key, Said.ACKNOWLEDGED):  # the launch did not do it (safety S10)
                self._parts.outbox.say(record.key, Said.ACKNOWLEDGED)

    async def _start(self, record: records.Record) -> None:
        grant = self._grants[record.epoch]
        if not self._verbs.still_fresh(grant):
            del self._grants[record.epoch]  # asked for again, with the same nonce: the same request
            return
        after = await self._verbs.start(record, grant)
        del self._grants[record.epoch]
        if after is None:
            return
        self._nonces.pop(record.epoch, None)
        if after.stage is Stage.LAUNCHED:
            self._stands(after, Body.RUNNING)
        else:
            self._bodies = None

    async def _destroy(self, key: records.Key, decision: model.Decision) -> None:
        await self._end_script(key[1])
        await self._verbs.destroy(key)
        _log.info("a VM was destroyed", instance=key[0], epoch=key[1], who=decision.who, why=decision.why)
        if decision.who != convergence.SCRIPT_HANDLER:
            self._parts.records.forget(key)
        if self._bodies is not None:
            self._bodies.pop(key[1], None)
        self._parts.outbox.say(key, Said.GONE)
        self._parts.changed()

    def _fail(self, key: records.Key, why: str) -> None:
        record = self._record(key[1])
        vm = (self._bodies or {}).get(key[1])
        told = f"{why}: {vm.why}" if vm is not None and vm.why else why
        if record is None:
            self._parts.outbox.say(key, Said.FAILED, message=told)
            return
        info = None if record.vm is None else msgspec.structs.replace(record.vm, status="stopped")
        record = msgspec.structs.replace(record, stage=Stage.FAILED, message=told, vm=info)
        self._parts.records.save_if_possible(record)

    def _report(self, key: records.Key, event: Said) -> None:
        record = self._parts.records.get(key)
        if event is Said.GONE:
            self._parts.images.release(verbs.holder_of(key))
        if record is None or event is Said.GONE:
            self._parts.outbox.say(key, event)
            return
        self._parts.outbox.say(
            key,
            event,
            message=record.message,
            vm=record.vm,
            script=record.result,
            stdout=record.stdout if event is not Said.STOPPED else "",
            stderr=record.stderr if event is not Said.STOPPED else "",
        )

    # ---- what is known ---------------------------------------------------------------------------------------------

    def _want(self, epoch: int) -> wire.Wanted | None:
        for want in self._wants:
            if want.epoch == epoch:
                return want
        return None

    def _record(self, epoch: int) -> records.Record | None:
        """The record, or one made of the answer: of a new placement, or of a VM found running whose record is lost."""
        record = self._parts.records.get((self.instance, epoch))
        want = self._want(epoch)
        if record is not None or want is None or want.spec is None:
            return record
        found = (self._bodies or {}).get(epoch)
        runs = found is not None and found.phase is hypervisor.Phase.RUNNING
        return records.Record(
            instance=self.instance,
            epoch=epoch,
            cloud=self._parts.session.cloud,
            seen=self._seen,
            spec=want.spec,
            vm_name=want.vm_name,
            stage=Stage.LAUNCHED if runs else Stage.ACCEPTED,
            launched_ns=self._parts.clock.boot_ns() if runs else 0,  # no earlier one is known to count from
        )

    def _stands(self, record: records.Record, body: Body) -> None:
        """What the step that just ended has made of the VM: saves a look."""
        if self._bodies is None:
            return
        if body is Body.ABSENT:
            self._bodies.pop(record.epoch, None)
            return
        self._bodies[record.epoch] = hypervisor.Vm(
            instance=record.instance, epoch=record.epoch, phase=hypervisor.Phase(body.value), cloud=record.cloud
        )
        self._parts.changed()

    def _bury(self, want: wire.Wanted, decision: model.Decision) -> None:
        self._parts.records.bury(
            records.Tombstone(
                instance=self.instance,
                epoch=want.epoch,
                decision=decision,
                seen=self._seen,
                at_ns=self._parts.clock.wall_ns(),
                final=want.final,
            )
        )
        self._parts.outbox.unsay((self.instance, want.epoch), Said.GONE)  # the order may be younger than that word
        step = self._step
        begins = step is not None and step.epoch <= want.epoch and step.do in _BEGINNING
        if begins and self._task is not None and not self._cut:
            self._cut = True
            self._task.cancel()

    def _here(self) -> list[records.Record]:
        """Records of VMs that have booted and run."""
        bodies = self._bodies
        if not bodies:
            return []
        return [
            record
            for epoch, record in self._parts.records.by_epoch(self.instance).items()
            if record.stage is Stage.BOOTED and epoch in bodies and bodies[epoch].phase is hypervisor.Phase.RUNNING
        ]

    async def _learn_addresses(self, here: list[records.Record]) -> None:
        """A guest may get its address after it booted: that is told when it comes."""
        for record in filter(_addressless, here):
            with contextlib.suppress(errors.HypervisorError):
                vm = await self._parts.driver.info(*record.key)
                if vm is not None and vm.ip:
                    self._parts.records.save_if_possible(msgspec.structs.replace(record, vm=vm))
                    self._parts.outbox.say(record.key, Said.INFO, vm=vm)

    # ---- unmonitored scripts ---------------------------------------------------------------------------------------

    def _run_scripts(self, here: list[records.Record]) -> None:
        """A booted VM's unmonitored script runs beside everything else; after a restart its run is followed again."""
        for record in here:
            if script.due_in_background(record) and record.epoch not in self._background:
                self._background[record.epoch] = asyncio.create_task(self._verbs.run_in_background(record))

    async def _end_script(self, epoch: int) -> None:
        task = self._background.pop(epoch, None)
        if task is not None:
            await self._end_tasks([task])

    async def _end_tasks(self, tasks: list[asyncio.Task[None]]) -> None:
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)


def _addressless(record: records.Record) -> bool:
    return record.vm is not None and not record.vm.ip
