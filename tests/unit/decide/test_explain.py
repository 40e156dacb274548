"""Why an instance stands where it stands: sentences with numbers, the same from whoever has the same snapshot."""

import random

import msgspec
import pytest

from covey import model
from covey.decide import explain, pauses, placement, rooms
from tests.support import nouns
from tests.unit.decide import fleet

RESOURCE = model.CapacityMode.RESOURCE
State = model.State
host = nouns.host
IMAGE = nouns.spec().digest
ONE = model.InstanceId("one")
A = model.NodeId("a")


def told(
    node: rooms.Host,
    instance: model.Instance | None = None,
    *before: model.Instance,
    seen: explain.Observed | None = None,
    **cloud: object,
) -> str:
    """The verdict of the only node."""
    one = instance or nouns.instance(id=ONE)
    of = placement.Cloud([node], **cloud)  # type: ignore[arg-type]
    story = explain.waiting(one, [*before, one], of, seen or explain.Observed())
    (verdict,) = story.verdicts
    return f"{verdict.reason.name.lower() if verdict.reason else 'free'}: {verdict.text}"


def sized(vcpu: int, ram_mb: int = 1, **changes: object) -> model.Instance:
    return nouns.instance(id=ONE, spec=nouns.spec(vcpu=vcpu, vram_mb=ram_mb, **changes))


def by_size(*claims: tuple[int, int], **changes: object) -> rooms.Host:
    """16 processors and 64 GiB, with claims of so much."""
    held = tuple(
        model.Claim(instance=nouns.instance_id(), epoch=1, vcpu=vcpu, vram_mb=ram_mb) for vcpu, ram_mb in claims
    )
    values = {"cpu_count": 16, "ram_mb": 65536, "capacity_mode": RESOURCE, "claims": held}
    return host("a", **(values | changes))  # type: ignore[arg-type]


def pinned() -> model.Instance:
    return nouns.instance(id=ONE, spec=nouns.spec(node="b"))


@pytest.mark.parametrize(
    ("node", "instance", "text"),
    [
        (host("a", slots=4, held=4), None, "full: 4 of 4 slots are taken"),
        (host("a", slots=1, held=1), None, "full: its only slot is taken"),
        (by_size((10, 1), (3, 1)), sized(8), "full: needs 8 processors, 3 of 16 are free"),
        (by_size((1, 60_000)), sized(1, 8192), "full: needs 8192 MiB of memory, 5536 of 65536 are free"),
        (
            by_size((15, 65_000)),
            sized(2, 4096),
            "full: needs 2 processors, 1 of 16 are free; needs 4096 MiB of memory, 536 of 65536 are free",
        ),
        (by_size(), sized(32), "too_large: needs 32 processors, it has 16"),
        (by_size(), sized(1, 70_000), "too_large: needs 70000 MiB of memory, it has 65536"),
        (host("a", drain=True, held=1), None, "draining: takes nothing new; 1 VM still there"),
        (host("a", trouble="disk full"), None, "trouble: disk full"),
        (
            host("a", owed=True),
            None,
            "trouble: still has to remove a placement that it did not acknowledge; it gets nothing new before",
        ),
        (msgspec.structs.replace(host("a"), held="has not reported"), None, "held: has not reported"),
        (host("a", alive=False), None, "not_alive: no word since before this controller started"),
        (host("a", arch=model.Arch.ARM64), None, "no_arch: its architecture is arm64, the template's is amd64"),
        (host("a"), pinned(), "unknown_node: the start asks for node b"),
        (
            host("a", groups=("x", "y")),
            nouns.instance(id=ONE, spec=nouns.spec(group="mac")),
            "no_group: is not in the group mac, but in x, y",
        ),
        (
            host("a", claims=(model.Claim(instance=ONE, epoch=1),)),
            None,
            "cleaning: still has to remove an earlier VM of this instance",
        ),
        (host("a", images=frozenset({IMAGE})), None, "free: 2 of 2 slots free"),
        (host("a"), None, "free: 2 of 2 slots free; would pull the template first"),
        (
            by_size((4, 1024), images=frozenset({IMAGE})),
            sized(1),
            "free: 12 of 16 processors and 64512 of 65536 MiB of memory free",
        ),
    ],
    ids=lambda value: value.split(":")[0] if isinstance(value, str) else "",
)
def test_each_verdict_in_words(node: rooms.Host, instance: model.Instance | None, text: str) -> None:
    assert told(node, instance) == text


def test_silence_is_told_in_the_tellers_own_time() -> None:
    spans = {30.0: "30 s", 119.4: "119 s", 600.0: "10 min", 7300.0: "2 h", 0.2: "1 s"}
    for silent_s, text in spans.items():
        seen = explain.Observed(silent_s=lambda _, silent_s=silent_s: silent_s)  # type: ignore[misc]
        assert told(host("a", alive=False), seen=seen) == f"not_alive: no word for {text}"


def test_who_refused_is_asked_again_and_when() -> None:
    one = nouns.instance(id=ONE, refused=(A, A), message="disk full")
    seen = explain.Observed(left_ns={A: 1_600_000_000})
    paused = {ONE: (A,)}
    assert told(host("a"), one, seen=seen, paused=paused) == (
        "refused: refused it twice: disk full; asked again in 2 s"
    )
    many = nouns.instance(id=ONE, refused=(A, A, A), message="no registry")
    seen = explain.Observed(left_ns={pauses.EVERYWHERE: 12_000_000_000})
    paused = {ONE: (pauses.EVERYWHERE,)}
    assert told(host("b"), many, seen=seen, paused=paused) == (
        "refused: 3 refusals in all point to a common cause; asked again in 12 s"
    )
    assert told(host("a", images=frozenset({IMAGE})), many) == ("free: 2 of 2 slots free; has refused it 3 times")


def test_what_those_before_it_will_take_is_not_called_full() -> None:
    others = [nouns.instance(), nouns.instance()]
    node = host("a", slots=2, images=frozenset({IMAGE}))
    text = "full: 2 of 2 slots free, which instances before this one in the queue will take"
    assert told(node, None, *others) == text


def test_for_whom_a_node_is_kept() -> None:
    big = nouns.instance(id=model.InstanceId("big"), spec=nouns.spec(vcpu=16, vram_mb=1))
    births = {model.InstanceId("big"): 1}
    text = told(by_size((4, 1)), sized(1), big, births=lambda id: births.get(id, 9))
    assert text == "reserved: is kept free for instance big, which stands before this one in the queue"


def test_the_place_in_the_queue_and_who_competes() -> None:
    arm = nouns.instance(spec=nouns.spec(arch=model.Arch.ARM64))
    elsewhere = nouns.instance(spec=nouns.spec(node="z"))
    rivals = [nouns.instance() for _ in range(12)]
    one, later = nouns.instance(spec=nouns.spec(node="a")), nouns.instance()
    queue = [arm, *rivals, elsewhere, one, later]
    story = explain.waiting(one, queue, placement.Cloud([host("a", held=2)]), explain.Observed())
    assert (story.position, story.waiting, story.competitors) == (15, 16, 12)
    assert story.before == tuple(rival.id for rival in rivals[: explain.NAMED])


def test_one_that_may_not_begin_has_the_reason_and_no_node_claims_to_be_the_cause() -> None:
    barred = {ONE: "Waiting: until node a has reported"}
    one, cloud = nouns.instance(id=ONE), placement.Cloud([host("a")], barred=barred)
    story = explain.waiting(one, [one], cloud, explain.Observed())
    assert (story.text, story.verdicts[0].reason) == (barred[ONE], placement.Reason.HELD)
    assert told(host("a"), barred=barred) == "held: has room, but the instance may not begin anywhere yet"


@pytest.mark.parametrize("seed", range(20))
def test_the_story_is_that_of_the_plan(seed: int) -> None:
    """Of random fleets: who is told that a node is free is placed, and the reason is the plan's own."""
    chance = random.Random(seed)
    modes = [model.CapacityMode.NUMBER, RESOURCE]
    trial = fleet.Fleet(chance, {f"n{n}": (chance.choice(modes), chance.randint(0, 3), 8) for n in range(5)})
    for _ in range(15):
        for _ in range(chance.randint(0, 6)):
            trial.arrives(chance.choice((1, 2, 4, 8, 9)), chance.randint(1, 30), priority=chance.choice((1, 1000)))
        cloud = trial.cloud()
        queue = placement.queue((job.instance for job in trial.waiting.values()), cloud.births)
        for decision in placement.plan(queue, cloud):
            one = trial.waiting[decision.instance].instance
            story = explain.waiting(one, queue, cloud, explain.Observed())
            free = [verdict.node for verdict in story.verdicts if verdict.reason is None]
            if isinstance(decision, placement.Place):
                assert decision.node in free
                assert story.text == f"Waiting: it is being placed on {trial.host(decision.node).name}"
            else:
                assert free == []
                assert story.text == decision.text
        trial.turn()


# ---- those that do not wait for a node ---------------------------------------------------------------------------


def placed(state: State, *, talking: bool = True, silent_s: float | None = 40.0, **changes: object) -> str:
    values: dict[str, object] = {"node": "n", "epoch": 1, "state": state}
    instance = nouns.instance(**(values | changes))
    story = explain.placed(instance, "mac-1", talking=talking, silent_s=silent_s)
    assert (story.position, story.verdicts) == (0, ())
    return story.text


LAUNCH = model.Launch(node=model.NodeId("n"), session=1, epoch=1, nonce="")
SCRIPT = model.Script(key="k", monitored=True)


@pytest.mark.parametrize(
    ("state", "changes", "text"),
    [
        (
            State.PULLING,
            {},
            "Placed on node mac-1, which has not acknowledged it yet; if it does not, another node gets it",
        ),
        (State.PULLING, {"acknowledged": True}, "Node mac-1 has acknowledged it and prepares its VM"),
        (State.PULLING, {"acknowledged": True, "progress": 0.43}, "Node mac-1 pulls the template: 43%"),
        (State.PULLING, {"launch": LAUNCH}, "Node mac-1 has leave to boot it: waits for the guest to answer"),
        (
            State.PULLING,
            {"launch": LAUNCH, "spec": nouns.spec(script=SCRIPT)},
            "Node mac-1 has leave to boot it: waits for the guest to answer and its start script to end",
        ),
        (State.STARTED, {}, "It runs on node mac-1 and waits for nothing"),
        (State.STOPPING, {}, "Waits for node mac-1 to say that the VM has stopped"),
        (State.STOPPED, {}, "It is stopped on node mac-1 and waits for a start"),
        (State.PUSHING, {}, "Waits for node mac-1 to push it to the registry"),
        (
            State.TERMINATING,
            {"ended": model.Decision(who="API client x", why="terminate request")},
            "Waits for node mac-1 to say that nothing of the VM is left (API client x: terminate request)",
        ),
        (State.TERMINATED, {"released": True}, "It is over; its record goes in a while"),
        (
            State.ERROR,
            {"message": "no kernel"},
            "It failed: no kernel; node mac-1 keeps its VM for inspection. It is terminated after a day",
        ),
    ],
)
def test_what_is_waited_for_in_each_state(state: State, changes: dict[str, object], text: str) -> None:
    assert placed(state, **changes) == text  # type: ignore[arg-type]


@pytest.mark.parametrize("state", [state for state in State if state not in (State.SCHEDULING, State.TERMINATED)])
def test_a_silent_node_is_named_with_what_it_means(state: State) -> None:
    text = placed(state, talking=False)
    assert ". Node mac-1 has been silent for 40 s: " in text
    assert placed(state, talking=False, silent_s=None).count("for longer than this controller runs") == 1
    if state is State.PULLING:
        assert "another node as soon as its lease has ended" in text
        assert "started nowhere else" in placed(state, talking=False, launch=LAUNCH)
