"""The rules of convergence, one test each, and what no history of answers may ever lead to."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from covey import model, wire
from covey.decide import convergence

Body = convergence.Body
Do = convergence.Do
Stage = convergence.Stage
After = convergence.After
Said = wire.ReportEvent
Verb = wire.Verb
CLOUD = "cloud-1"
VM = model.InstanceId("vm")
WHO = model.Decision(who="ann", why="no longer needed")


def want(verb: Verb, epoch: int = 1, *, launched: bool = False, instance: str = VM) -> wire.Wanted:
    decision = WHO if verb is Verb.DESTROY else None
    return wire.Wanted(
        instance=model.InstanceId(instance), epoch=epoch, verb=verb, launched=launched, decision=decision
    )


def local(epoch: int = 1, *, instance: str = VM, cloud: str = CLOUD, **facts: Any) -> convergence.Local:
    return convergence.Local(instance=model.InstanceId(instance), epoch=epoch, cloud=cloud, **facts)


def grave(epoch: int = 1) -> convergence.Grave:
    return convergence.Grave(instance=VM, epoch=epoch, decision=WHO)


def step(
    *wants: wire.Wanted,
    of: convergence.Local | None = None,
    buried: convergence.Grave | None = None,
    hold: bool = False,
) -> tuple[Do, Said | None]:
    """The one step that follows."""
    graves = [] if buried is None else [buried]
    (only,) = convergence.converge(wants, [] if of is None else [of], graves, cloud=CLOUD, hold=hold)
    return only.do, only.event


RUN, RAN, STOP, KEEP, DESTROY = (
    want(Verb.RUN),
    want(Verb.RUN, launched=True),
    want(Verb.STOP),
    want(Verb.KEEP),
    want(Verb.DESTROY),
)
NOTHING = (Do.NOTHING, None)


def test_a_start_goes_step_by_step() -> None:
    assert step(RUN) == (Do.PREPARE, None)
    assert step(RUN, of=local(body=Body.PREPARED)) == (Do.ASK_LAUNCH, None)
    assert step(RUN, of=local(body=Body.PREPARED, asked=True)) == (Do.ASK_LAUNCH, None)
    assert step(RUN, of=local(body=Body.PREPARED, asked=True, granted=True)) == (Do.START, None)
    assert step(RAN, of=local(body=Body.RUNNING, stage=Stage.LAUNCHED)) == (Do.FOLLOW, None)
    assert step(RAN, of=local(body=Body.RUNNING, stage=Stage.BOOTED)) == (Do.REPORT, Said.BOOTED)
    assert step(RAN, of=local(body=Body.RUNNING, stage=Stage.BOOTED, said=(Said.BOOTED,))) == NOTHING


@pytest.mark.parametrize("body", [Body.ABSENT, Body.PREPARED, Body.ENDED, Body.STOPPED])
def test_launched_by_the_stores_word_and_not_running_is_failed_never_booted_again(body: Body) -> None:
    """Safety S4: reboot, crash or restore; the grant, if there was one, died with its process."""
    assert step(RAN, of=local(body=body)) == (Do.FAIL, None)


@pytest.mark.parametrize("stage", [Stage.LAUNCHED, Stage.BOOTED, Stage.STOPPED])
def test_launched_by_our_own_record_and_not_running_is_failed(stage: Stage) -> None:
    for body in (Body.ABSENT, Body.PREPARED, Body.ENDED):
        assert step(RUN, of=local(body=body, stage=stage)) == (Do.FAIL, None)


def test_a_guest_that_ends_by_itself_is_failed() -> None:
    assert step(RAN, of=local(body=Body.ENDED, stage=Stage.BOOTED, said=(Said.BOOTED,))) == (Do.FAIL, None)


def test_a_running_vm_without_a_record_is_adopted() -> None:
    assert step(RAN, of=local(body=Body.RUNNING)) == (Do.FOLLOW, None)


def test_absence_is_never_an_order() -> None:
    """Safety S2."""
    for body in Body:
        assert step(of=local(body=body)) == NOTHING


def test_an_order_destroys_whatever_state_the_vm_is_in() -> None:
    for body in set(Body) - {Body.ABSENT}:
        for stage in Stage:
            assert step(DESTROY, of=local(body=body, stage=stage)) == (Do.DESTROY, None)


def test_an_order_covers_every_older_epoch_and_no_newer_one() -> None:
    order = want(Verb.DESTROY, 2)
    steps = convergence.converge(
        [order, want(Verb.RUN, 3)], [local(1, body=Body.RUNNING), local(2, body=Body.PREPARED)], cloud=CLOUD
    )
    assert [(one.epoch, one.do) for one in steps] == [(1, Do.DESTROY), (2, Do.DESTROY), (3, Do.NOTHING)]


def test_gone_is_said_when_nothing_is_left_and_only_once() -> None:
    assert step(DESTROY) == (Do.REPORT, Said.GONE)
    assert step(DESTROY, of=local()) == (Do.REPORT, Said.GONE)
    assert step(DESTROY, of=local(said=(Said.GONE,))) == NOTHING


def test_a_tombstone_outlives_the_answer_that_ordered_it() -> None:
    assert step(RUN, of=local(body=Body.PREPARED, granted=True), buried=grave()) == (Do.DESTROY, None)
    assert step(want(Verb.RUN, 2), of=local(2, body=Body.PREPARED), buried=grave(1)) == (Do.ASK_LAUNCH, None)


def test_an_order_without_who_and_why_is_none() -> None:
    nameless = wire.Wanted(instance=VM, epoch=1, verb=Verb.DESTROY)
    assert step(nameless, of=local(body=Body.RUNNING)) == NOTHING


def test_on_hold_nothing_is_begun_or_destroyed() -> None:
    """Safety S18."""
    for wanted in (RUN, RAN, STOP, KEEP, DESTROY):
        for body in Body:
            assert step(wanted, of=local(body=body, granted=True), hold=True) == NOTHING


def test_vms_of_another_cloud_are_never_touched() -> None:
    """Safety S12."""
    for wanted in (RUN, STOP, DESTROY):
        assert step(wanted, of=local(body=Body.RUNNING, cloud="other")) == NOTHING


def test_a_stale_epoch_is_not_started() -> None:
    steps = convergence.converge([want(Verb.RUN, 1)], [local(2, body=Body.RUNNING)], cloud=CLOUD)
    assert [(one.epoch, one.do) for one in steps] == [(1, Do.NOTHING), (2, Do.NOTHING)]


def test_stop_then_stopped() -> None:
    assert step(STOP, of=local(body=Body.RUNNING, stage=Stage.BOOTED)) == (Do.STOP, None)
    assert step(STOP, of=local(body=Body.ENDED, stage=Stage.BOOTED)) == (Do.STOP, None)
    assert step(STOP, of=local(body=Body.STOPPED, stage=Stage.STOPPED)) == (Do.REPORT, Said.STOPPED)
    assert step(STOP) == (Do.FAIL, None)


def test_what_is_kept_stays_and_what_is_lost_is_told() -> None:
    assert step(KEEP, of=local(body=Body.STOPPED, stage=Stage.STOPPED)) == NOTHING
    assert step(KEEP, of=local(body=Body.ENDED, stage=Stage.FAILED, said=(Said.FAILED,))) == NOTHING
    assert step(KEEP) == (Do.FAIL, None)
    assert step(KEEP, of=local(stage=Stage.FAILED, said=(Said.FAILED,))) == (Do.REPORT, Said.GONE)


@pytest.mark.parametrize(
    ("after", "body", "then"),
    [
        (After.STOP, Body.RUNNING, (Do.STOP, None)),
        (After.STOP, Body.STOPPED, NOTHING),
        (After.KEEP, Body.RUNNING, NOTHING),
        (After.DELETE, Body.RUNNING, (Do.DESTROY, None)),
        (After.DELETE, Body.ABSENT, (Do.REPORT, Said.GONE)),
    ],
)
def test_a_failed_script_is_told_first_and_then_handled(after: After, body: Body, then: tuple[Do, Said | None]) -> None:
    failed = local(body=body, stage=Stage.FAILED, after=after)
    assert step(RAN, of=failed) == (Do.REPORT, Said.FAILED)
    told = local(body=body, stage=Stage.FAILED, after=after, said=(Said.FAILED,))
    assert step(KEEP, of=told) == then


def test_what_was_refused_is_told_and_never_tried_again() -> None:
    assert step(RUN, of=local(stage=Stage.REFUSED)) == (Do.REPORT, Said.REFUSED)
    assert step(RUN, of=local(stage=Stage.REFUSED, said=(Said.REFUSED, Said.GONE))) == NOTHING


# ---- what never happens --------------------------------------------------------------------------------------------

epochs = st.integers(1, 4)
names = st.sampled_from(["a", "b"])
wants_drawn = st.lists(
    st.builds(want, st.sampled_from(Verb), epochs, launched=st.booleans(), instance=names), max_size=6
)
locals_drawn = st.lists(
    st.builds(
        local,
        epochs,
        instance=names,
        cloud=st.sampled_from([CLOUD, CLOUD, "other"]),
        stage=st.sampled_from(Stage),
        body=st.sampled_from(Body),
        asked=st.booleans(),
        granted=st.booleans(),
        after=st.sampled_from(After),
        said=st.lists(st.sampled_from(Said), unique=True).map(tuple),
    ),
    max_size=6,
    unique_by=lambda one: (one.instance, one.epoch),
)


@given(wants_drawn, locals_drawn, st.booleans())
def test_nothing_is_destroyed_without_an_order(
    wants: list[wire.Wanted], locals_: list[convergence.Local], hold: bool
) -> None:
    known = {(one.instance, one.epoch): one for one in locals_}
    for one in convergence.converge(wants, locals_, cloud=CLOUD, hold=hold):
        if one.do is not Do.DESTROY:
            continue
        ordered = any(
            given_.verb is Verb.DESTROY and given_.instance == one.instance and given_.epoch >= one.epoch
            for given_ in wants
        )
        vm = known[one.instance, one.epoch]
        by_script = vm.stage is Stage.FAILED and vm.after is After.DELETE
        refused = vm.stage is Stage.REFUSED and vm.after is After.DELETE
        assert (ordered or by_script or refused) and not hold
        assert vm.cloud == CLOUD
        assert one.decision is not None and one.decision.who and one.decision.why


@given(wants_drawn, locals_drawn, st.booleans())
def test_only_what_was_just_granted_starts_and_at_most_one_epoch_of_an_instance(
    wants: list[wire.Wanted], locals_: list[convergence.Local], hold: bool
) -> None:
    known = {(one.instance, one.epoch): one for one in locals_}
    starts = [one for one in convergence.converge(wants, locals_, cloud=CLOUD, hold=hold) if one.do is Do.START]
    for one in starts:
        vm = known[one.instance, one.epoch]
        assert vm.granted and vm.body is Body.PREPARED and vm.cloud == CLOUD and not hold
        assert all(other.epoch <= vm.epoch for other in locals_ if other.instance == vm.instance)
    assert len({one.instance for one in starts}) == len(starts)


@given(wants_drawn, locals_drawn)
def test_every_vm_gets_exactly_one_step_with_a_reason(
    wants: list[wire.Wanted], locals_: list[convergence.Local]
) -> None:
    steps = convergence.converge(wants, locals_, cloud=CLOUD)
    keys = [(one.instance, one.epoch) for one in steps]
    assert len(set(keys)) == len(keys)
    assert set(keys) == {(one.instance, one.epoch) for one in wants} | {(one.instance, one.epoch) for one in locals_}
    assert all(one.why for one in steps)
