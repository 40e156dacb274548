"""Convergence: from what a node shall run and what it finds on itself to the next step for each VM. Pure.

The agent asks again after every step, so each VM gets at most one step that acts per turn, and restart, lost reply and
double run are the same case as the normal one. The rules, in the order in which they are tried:

1. A VM of another cloud is never touched (safety S12).
2. On hold nothing is prepared, launched, stopped or destroyed (safety S18).
3. A VM is destroyed on an explicit order only: DESTROY in an answer, the tombstone of such an order, or the start
   script's fail handler 2, which the user gave with the start. Absence from an answer is never an order (safety S2).
4. What a record says has happened (failed, refused) is reported and never undone.
5. Only an epoch for which this very process was just granted launch is started; one that is launched by the store's
   word and does not run is failed, and never booted again (safety S4).
6. An epoch older than one that this node already knows of is stale: nothing starts for it.
"""

from collections.abc import Iterable, Sequence
from enum import StrEnum

from covey import model, wire


class Body(StrEnum):
    """How a VM stands, by what is on the node's disk and what runs there."""

    ABSENT = "absent"
    PREPARED = "prepared"
    RUNNING = "running"
    STOPPED = "stopped"
    ENDED = "ended"  # guest code ran, and runs no more, though nobody stopped it


class Stage(StrEnum):
    """How far a VM came, by the agent's own durable record."""

    ACCEPTED = "accepted"
    LAUNCHED = "launched"  # launch was granted: guest code may have run
    BOOTED = "booted"
    STOPPED = "stopped"
    FAILED = "failed"
    REFUSED = "refused"  # never launched, and this node cannot


class After(StrEnum):
    """What becomes of a VM whose monitored script failed (`script_fail_handler` 0, 1, 2)."""

    STOP = "stop"
    KEEP = "keep"
    DELETE = "delete"


class Local(model.Noun, frozen=True, kw_only=True):
    """What this node knows of one (instance, epoch).

    `asked` and `granted` are facts of this process: it has asked for launch without a definite answer yet; it holds a
    launch that it has not used. `said` are the events queued or settled for this epoch in the present session.
    """

    instance: model.InstanceId
    epoch: int
    cloud: str = ""
    stage: Stage = Stage.ACCEPTED
    body: Body = Body.ABSENT
    asked: bool = False
    granted: bool = False
    after: After = After.KEEP
    said: tuple[wire.ReportEvent, ...] = ()


class Grave(model.Noun, frozen=True, kw_only=True):
    """A durable tombstone: this epoch of the instance, and every older one, was ordered destroyed."""

    instance: model.InstanceId
    epoch: int
    decision: model.Decision


class Do(StrEnum):
    """What the agent can do about a VM."""

    PREPARE = "prepare"
    ASK_LAUNCH = "ask launch"
    START = "start"
    FOLLOW = "follow"  # wait for the guest, run its script, then it is booted
    STOP = "stop"
    DESTROY = "destroy"
    FAIL = "fail"  # enter it as failed, durably; the report follows
    REPORT = "report"
    NOTHING = "nothing"


class Step(model.Noun, frozen=True, kw_only=True):
    """One decision about one VM, with its reason. `event` belongs to REPORT, `decision` to DESTROY."""

    do: Do
    instance: model.InstanceId
    epoch: int
    why: str
    event: wire.ReportEvent | None = None
    decision: model.Decision | None = None


SCRIPT_HANDLER = "script_fail_handler"


def converge(
    wanted: Iterable[wire.Wanted],
    found: Iterable[Local],
    graves: Iterable[Grave] = (),
    *,
    cloud: str,
    hold: bool = False,
) -> list[Step]:
    """The next step for every VM that is wanted, ordered away or found; the VMs of one instance oldest epoch first."""
    wants: dict[model.InstanceId, list[wire.Wanted]] = {}
    for want in wanted:
        wants.setdefault(want.instance, []).append(want)
    locals_: dict[model.InstanceId, list[Local]] = {}
    for local in found:
        locals_.setdefault(local.instance, []).append(local)
    buried = {grave.instance: grave for grave in graves}
    steps: list[Step] = []
    for instance in sorted(wants.keys() | locals_.keys()):
        steps += of_instance(
            wants.get(instance, []), locals_.get(instance, []), buried.get(instance), cloud=cloud, hold=hold
        )
    return steps


def of_instance(
    wants: Sequence[wire.Wanted], locals_: Sequence[Local], buried: Grave | None, *, cloud: str, hold: bool
) -> list[Step]:
    """Steps for the epochs of one instance, oldest first: what is ordered away goes before a newer epoch comes."""
    order = _newest_order(wants, buried)
    if len(locals_) == 1 and (not wants or (len(wants) == 1 and wants[0].epoch == locals_[0].epoch)):  # the usual case
        (only,), asked = locals_, None if not wants or wants[0].verb is wire.Verb.DESTROY else wants[0]
        return [_of_vm(asked, only, order, newest=only.epoch, cloud=cloud, hold=hold)]
    asked_for = {want.epoch: want for want in wants if want.verb is not wire.Verb.DESTROY}
    by_epoch = {local.epoch: local for local in locals_}
    named = {want.epoch for want in wants}
    newest = max(by_epoch, default=0)
    instance = (wants or locals_)[0].instance if wants or locals_ else model.InstanceId("")
    steps: list[Step] = []
    for epoch in sorted(by_epoch.keys() | named):
        local = by_epoch.get(epoch) or Local(instance=instance, epoch=epoch, cloud=cloud)
        steps.append(_of_vm(asked_for.get(epoch), local, order, newest=newest, cloud=cloud, hold=hold))
    return _oldest_destroyed_first(steps)


def _oldest_destroyed_first(steps: list[Step]) -> list[Step]:
    """Behind the first step that destroys nothing else is begun or said: `gone` speaks for every older epoch."""
    destroying = False
    ordered: list[Step] = []
    for step in steps:
        if destroying and step.do not in (Do.DESTROY, Do.NOTHING):
            step = nothing(step.instance, step.epoch, "waits until an older epoch is destroyed")
        destroying = destroying or step.do is Do.DESTROY
        ordered.append(step)
    return ordered


def _newest_order(wants: Iterable[wire.Wanted], buried: Grave | None) -> Grave | None:
    """The order that reaches furthest: it covers its epoch and every older one."""
    newest = buried
    for want in wants:
        if want.verb is not wire.Verb.DESTROY or want.decision is None:
            continue
        if newest is None or want.epoch > newest.epoch:
            newest = Grave(instance=want.instance, epoch=want.epoch, decision=want.decision)
    return newest


def _of_vm(want: wire.Wanted | None, local: Local, order: Grave | None, *, newest: int, cloud: str, hold: bool) -> Step:
    if local.cloud != cloud:
        return nothing(local.instance, local.epoch, "belongs to another cloud")
    if hold:
        return nothing(local.instance, local.epoch, "on hold")
    if order is not None and local.epoch <= order.epoch:
        return _buried(local, order.decision)
    if local.stage in (Stage.FAILED, Stage.REFUSED):
        return _ended_badly(local)
    if want is None:
        return nothing(local.instance, local.epoch, "not named in the answer, which is no order")
    if want.verb is wire.Verb.RUN:
        return _run(want, local, stale=local.epoch < newest)
    if want.verb is wire.Verb.STOP:
        return _stop(local)
    if want.verb is wire.Verb.KEEP:
        return _keep(local)
    return nothing(local.instance, local.epoch, "an order to destroy without who and why is none")


def _buried(local: Local, decision: model.Decision) -> Step:
    if local.body is not Body.ABSENT:
        return _step(Do.DESTROY, local, f"ordered by {decision.who}: {decision.why}", decision=decision)
    return _say(local, wire.ReportEvent.GONE, "nothing is left of it")


def _ended_badly(local: Local) -> Step:
    event = wire.ReportEvent.REFUSED if local.stage is Stage.REFUSED else wire.ReportEvent.FAILED
    if event not in local.said:
        return _say(local, event, f"it is {local.stage}")
    if local.after is After.DELETE and local.body is not Body.ABSENT:
        decision = model.Decision(who=SCRIPT_HANDLER, why="the start script failed and its fail handler says delete")
        return _step(Do.DESTROY, local, decision.why, decision=decision)
    if local.after is After.STOP and local.body is Body.RUNNING:
        return _step(Do.STOP, local, "the start script failed and its fail handler says stop")
    if local.body is Body.ABSENT:
        return _say(local, wire.ReportEvent.GONE, "nothing is left of it")
    return nothing(local.instance, local.epoch, f"it is {local.stage}, and stays for inspection")


def _run(want: wire.Wanted, local: Local, *, stale: bool) -> Step:
    if stale:
        return nothing(local.instance, local.epoch, "a newer epoch is known here")
    if local.body is Body.RUNNING:
        if local.stage is not Stage.BOOTED:
            return _step(Do.FOLLOW, local, "it runs and is not known to have booted")
        return _say(local, wire.ReportEvent.BOOTED, "it runs")
    if local.stage in (Stage.LAUNCHED, Stage.BOOTED, Stage.STOPPED) and not local.granted:
        return _step(Do.FAIL, local, f"its guest was launched here before, and is {local.body} now")
    if local.body in (Body.STOPPED, Body.ENDED):
        return _step(
            Do.FAIL, local, "its guest ended by itself" if want.launched else "its guest ran before its launch"
        )
    return _not_running(want, local)


def _not_running(want: wire.Wanted, local: Local) -> Step:
    """Wanted to run, and its guest code never ran here: the way to its start."""
    if local.body is Body.ABSENT and (local.granted or local.asked or want.launched):
        return _step(Do.FAIL, local, "launched, and nothing of it is here: it is never booted again")
    if local.body is Body.ABSENT:
        return _step(Do.PREPARE, local, "placed here")
    if local.granted:
        return _step(Do.START, local, "launch was just granted")
    if want.launched and not local.asked:
        return _step(Do.FAIL, local, "launched for an earlier life of this agent, which did not start it")
    return _step(Do.ASK_LAUNCH, local, "prepared")


def _stop(local: Local) -> Step:
    if local.body in (Body.RUNNING, Body.ENDED):
        return _step(Do.STOP, local, "asked to stop")
    if local.body is Body.ABSENT:
        return _step(Do.FAIL, local, "asked to stop, and nothing of it is here")
    return _say(local, wire.ReportEvent.STOPPED, "it is stopped")


def _keep(local: Local) -> Step:
    if local.body is Body.ABSENT:
        return _step(Do.FAIL, local, "nothing of it is here any more")
    return nothing(local.instance, local.epoch, "to be kept as it is")


def nothing(instance: model.InstanceId, epoch: int, why: str) -> Step:
    """Leave it alone; `why` is for logs and tests."""
    return Step(do=Do.NOTHING, instance=instance, epoch=epoch, why=why)


def _step(do: Do, local: Local, why: str, decision: model.Decision | None = None) -> Step:
    return Step(do=do, instance=local.instance, epoch=local.epoch, why=why, decision=decision)


def _say(local: Local, event: wire.ReportEvent, why: str) -> Step:
    if event in local.said:
        return nothing(local.instance, local.epoch, f"{why}, and that was said")
    return Step(do=Do.REPORT, instance=local.instance, epoch=local.epoch, why=why, event=event)
