"""The steps of one VM's life, each safe to repeat after a crash at any line. Called by the VM's one worker (safety S6).

    prepare      image pulled and pinned, directory made; nothing runs
    ask_launch   leave to run guest code, by a commit of the control plane (safety S1)
    start        record made durable; tombstone, session and clock looked at; then the fork
    follow       the guest answers, its script ends, it is booted
    stop, destroy

What a step cannot do by the fault of this host is REFUSED, so that the next node may; what would fail anywhere, or
after launch, is FAILED. A fork is never cut short: whoever cancels waits for it to end.
"""

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

import msgspec

from covey import errors, failpoint, model, observe, wire
from covey.agent import bell, hypervisor, images, parts, records, script, session
from covey.client import packing
from covey.decide import convergence

T = TypeVar("T")
Stage = convergence.Stage
_LOOK_S = 0.05  # between two looks at a booting guest, growing to
_LOOK_LIMIT_S = 1.0
_RETRY_S = 0.2
_RETRY_LIMIT_S = 2.0

_log = observe.log("agent")


class Grant(model.Noun, frozen=True, kw_only=True):
    """A launch in hand: when it was asked for, in which session, the script that came with it, and the view in which
    the store knows of it."""

    nonce: str
    session: int
    asked_ns: int
    script: str
    seen: wire.Seen


class Verbs:
    """Steps of the VMs of one node."""

    def __init__(self, shared: parts.Parts) -> None:
        self._parts = shared

    async def prepare(self, record: records.Record, *, acknowledged: bool) -> records.Record:
        """Make everything ready. The answer is the record as it came out: REFUSED or FAILED leaves nothing behind."""
        key, shared = record.key, self._parts
        holder = holder_of(key)
        failpoint.reach("agent.accepted")
        acknowledges = None if acknowledged else self._acknowledging(key)
        try:
            image = await shared.images.get(
                holder,
                record.spec.template,
                record.spec.digest,
                lambda fraction: shared.outbox.progress(key, fraction),
            )
            failpoint.reach("agent.pulled")
            plan = hypervisor.Plan(
                instance=record.instance,
                epoch=record.epoch,
                cloud=record.cloud,
                name=record.vm_name or record.instance,
                spec=record.spec,
                image=image,
                host_ip=shared.host_ip(),
            )
            await to_its_end(shared.driver.prepare(plan))
        except (images.NoRoom, OSError, errors.RemoteError) as error:
            return await self._could_not(record, Stage.REFUSED, _text(error))
        except packing.Damaged as error:  # on every node, and for ever
            return await self._could_not(record, Stage.FAILED, str(error))
        except errors.Refused as error:  # the registry's word, or a template that cannot be read
            return await self._could_not(record, Stage.REFUSED, str(error))
        except errors.HypervisorError as error:
            stage = Stage.REFUSED if await self._host_trouble() else Stage.FAILED
            return await self._could_not(record, stage, str(error))
        finally:
            if acknowledges is not None:
                acknowledges.cancel()
        failpoint.reach("agent.prepared")
        return record

    async def ask_launch(self, record: records.Record, nonce: str) -> Grant | None:
        """Ask until there is a definite answer; None: not granted. The nonce makes a repeat the same request."""
        standing = self._parts.session
        pause_s = _RETRY_S
        while True:
            asked_ns, counter = self._parts.clock.boot_ns(), standing.counter
            ask = wire.LaunchAsk(
                instance=record.instance,
                epoch=record.epoch,
                nonce=nonce,
                seen=standing.seen,
                messages=standing.count(),
            )
            try:
                answer = await standing.call("launch", wire.Launched, ask)
            except session.SessionLost:
                return None
            except (errors.RemoteError, errors.Refused) as error:
                if pause_s == _RETRY_S:
                    _log.info("launch was not answered; it is asked again", instance=record.instance, error=str(error))
                await asyncio.sleep(pause_s)
                pause_s = min(2 * pause_s, _RETRY_LIMIT_S)
                continue
            if not answer.granted:
                _log.info("launch was not granted", instance=record.instance, epoch=record.epoch, why=answer.why)
                return None
            standing.learn(answer.seen)
            failpoint.reach("agent.granted")
            return Grant(nonce=nonce, session=counter, asked_ns=asked_ns, script=answer.script, seen=answer.seen)

    def still_fresh(self, grant: Grant) -> bool:
        """Whether a launch may be used as it is, or must be asked for again (safety S7, S8, S9)."""
        standing = self._parts.session
        age_s = (self._parts.clock.boot_ns() - grant.asked_ns) / 1e9
        return age_s <= self._parts.limits.jump_s and standing.lease_holds()

    async def start(self, record: records.Record, grant: Grant) -> records.Record | None:
        """Use a launch. None: it may not be used now; nothing was done that counts as a start."""
        launched = msgspec.structs.replace(record, stage=Stage.LAUNCHED, script=grant.script, seen=grant.seen)
        launched = msgspec.structs.replace(launched, launched_ns=self._parts.clock.boot_ns())
        try:
            self._parts.records.save(launched)
        except OSError as error:
            return self._failed(record, _text(error))
        failpoint.reach("agent.launched")
        buried = self._parts.records.tombstone(record.instance)
        standing = self._parts.session
        if (
            (buried is not None and buried.epoch >= record.epoch)
            or grant.session != standing.counter
            or not standing.may_act
            or not self.still_fresh(grant)
        ):
            self._parts.records.save(record)
            return None
        try:
            await to_its_end(self._parts.driver.start(record.instance, record.epoch))
        except (errors.HypervisorError, OSError) as error:
            return self._failed(launched, _text(error))
        failpoint.reach("agent.started")
        return launched

    async def follow(self, record: records.Record, woken: bell.Bell) -> records.Record:
        """Until the guest answers and a monitored script has ended: BOOTED or FAILED."""
        try:
            vm = await self._guest(record, woken)
            record = msgspec.structs.replace(record, vm=vm)
            failpoint.reach("agent.answered")
            if script.monitored(record):
                record = await self._scripted(record)
                vm = await self._parts.driver.info(*record.key) or vm
                record = msgspec.structs.replace(record, vm=vm)
        except (errors.HypervisorError, OSError) as error:
            return self._failed(record, _text(error))
        if record.stage is not Stage.FAILED:
            record = msgspec.structs.replace(record, stage=Stage.BOOTED)
        self._parts.records.save(record)
        failpoint.reach("agent.booted")
        return record

    async def run_in_background(self, record: records.Record) -> None:
        """An unmonitored script: nobody waits for it, no result is kept."""
        if record.spec.script is None:
            return
        try:
            await self._parts.driver.run(*record.key, script.job(record, record.spec.script))
        except (errors.HypervisorError, OSError) as error:
            _log.info("an unmonitored script did not end well", instance=record.instance, error=str(error))
        newest = self._parts.records.get(record.key)
        if newest is not None:
            self._parts.records.save(msgspec.structs.replace(newest, script_ended=True))

    async def stop(self, record: records.Record) -> records.Record:
        """Stopped, disk kept. A failed VM stays failed."""
        try:
            await to_its_end(self._parts.driver.stop(*record.key))
        except errors.HypervisorError as error:
            return self._failed(record, f"it could not be stopped: {error}")
        stage = record.stage if record.stage is Stage.FAILED else Stage.STOPPED
        vm = None if record.vm is None else msgspec.structs.replace(record.vm, status="stopped")
        record = msgspec.structs.replace(record, stage=stage, vm=vm, after=convergence.After.KEEP)
        self._parts.records.save(record)
        if stage is Stage.FAILED and vm is not None:
            self._parts.outbox.say(record.key, wire.ReportEvent.INFO, vm=vm)
        return record

    async def destroy(self, key: records.Key) -> None:
        """Nothing is left when it returns: process, overlay, directory, pin. Raises HypervisorError."""
        failpoint.reach("agent.destroying")
        await to_its_end(self._parts.driver.destroy(*key))
        self._parts.look.removed(key)
        self._parts.images.release(holder_of(key))
        failpoint.reach("agent.destroyed")

    # ---- parts of the steps ----------------------------------------------------------------------------------------

    def _acknowledging(self, key: records.Key) -> asyncio.TimerHandle:
        """Say that the placement is known here when its preparation is not quick; a quick one is acknowledged by the
        launch that follows at once (safety S10)."""
        say = self._parts.outbox.say
        return asyncio.get_running_loop().call_later(
            self._parts.limits.quick_s, say, key, wire.ReportEvent.ACKNOWLEDGED
        )

    async def _could_not(self, record: records.Record, stage: Stage, why: str) -> records.Record:
        """A preparation that failed was never launched: what it left is removed before it is told."""
        await self.destroy(record.key)
        record = msgspec.structs.replace(record, stage=stage, message=why)
        self._parts.records.save_if_possible(record)
        return record

    async def _host_trouble(self) -> bool:
        """Whether it is this host that cannot run VMs now (no hypervisor, no room), rather than this VM's fault."""
        if self._parts.images.free_bytes() <= 0:
            return True
        try:
            await self._parts.driver.facts()
        except errors.HypervisorError:
            self._parts.suspect()
            return True
        return False

    async def _guest(self, record: records.Record, woken: bell.Bell) -> model.VmInfo:
        """The vminfo once the guest answers. Raises HypervisorError when it ended, or does not answer in time."""
        pause_s = _LOOK_S
        while True:
            vm = await self._parts.driver.info(*record.key)
            if vm is not None:
                return vm
            waited_s = (self._parts.clock.boot_ns() - record.launched_ns) / 1e9
            if record.launched_ns and waited_s > self._parts.limits.boot_s:
                raise errors.HypervisorError(f"the guest did not answer within {self._parts.limits.boot_s:g} s")
            woken.clear()
            await woken.wait(pause_s)
            self._parts.outbox.expect_no_more(record.instance)
            pause_s = min(1.5 * pause_s, _LOOK_LIMIT_S)

    async def _scripted(self, record: records.Record) -> records.Record:
        """Run the monitored script, or follow the run that an earlier life of this agent began."""
        if record.spec.script is None:
            return record
        if not record.script:
            raise errors.HypervisorError("the start script of this VM is not known here any more")
        result = await self._parts.driver.run(*record.key, script.job(record, record.spec.script))
        return script.ended(record, record.spec.script, result)

    def _failed(self, record: records.Record, why: str) -> records.Record:
        record = msgspec.structs.replace(record, stage=Stage.FAILED, message=why)
        self._parts.records.save_if_possible(record)
        return record


def holder_of(key: records.Key) -> str:
    """The name under which a VM pins its template."""
    return f"{key[0]}.{key[1]}"


async def to_its_end(verb: Coroutine[Any, Any, T]) -> T:
    """Await a verb that must not be cut short: a cancel is raised only after it has ended (safety S6)."""
    task = asyncio.get_running_loop().create_task(verb)
    try:
        await bell.end_of(task)
    except asyncio.CancelledError:
        await asyncio.wait({task})
        if not task.cancelled() and task.exception() is not None:
            _log.info("a step ended badly after it was cancelled", error=str(task.exception()))
        raise
    return task.result()


def _text(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}{f': {error.filename}' if error.filename else ''}"
    return str(error) or type(error).__name__
