"""Group commit (safety S23), rule by rule, over a store that writes down what it is sent."""

import asyncio
from collections.abc import Callable, Sequence

import pytest

from covey import errors
from covey.store import base, batch, limits
from tests.support import virtual


class Recorder:
    """The store behind the queue: answers when it is let, and refuses or loses what it is told to."""

    def __init__(self) -> None:
        self.sent: list[list[str]] = []
        self.budgets_s: list[float] = []
        self.gate = asyncio.Event()
        self.gate.set()
        self.takes_s = 0.0
        self.fault: Callable[[Sequence[str]], errors.StoreError | None] = lambda names: None

    async def __call__(self, txns: Sequence[base.Txn], timeout_s: float) -> list[base.Outcome]:
        names = [name_of(txn) for txn in txns]
        self.sent.append(names)
        self.budgets_s.append(timeout_s)
        await self.gate.wait()
        if self.takes_s:
            await asyncio.sleep(self.takes_s)
        if fault := self.fault(names):
            raise fault
        return [base.Outcome(True, len(self.sent)) for _ in txns]


class Clock:
    def __init__(self) -> None:
        self.ns = 0

    def now_ns(self) -> int:
        return self.ns


def name_of(txn: base.Txn) -> str:
    return txn.then[0].key


def write(key: str, *, reads: Sequence[str] = (), size: int = 0, more: int = 0) -> base.Txn:
    puts = (base.Put(key, b"x" * size), *(base.Put(f"{key}+{n}", b"") for n in range(more)))
    return base.Txn(tuple(base.absent(name) for name in reads), puts)


@pytest.fixture
def recorder() -> Recorder:
    return Recorder()


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def batcher(recorder: Recorder, clock: Clock) -> batch.Batcher:
    return batch.Batcher(recorder, now_ns=clock.now_ns, timeout_s=10, attempt_s=2, in_flight=2)


async def settle() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


async def commit_all(batcher: batch.Batcher, *txns: base.Txn) -> list[base.Outcome | BaseException]:
    return await asyncio.gather(*map(batcher.commit, txns), return_exceptions=True)


async def test_what_is_ready_at_once_travels_together(batcher: batch.Batcher, recorder: Recorder) -> None:
    await commit_all(batcher, write("a"), write("b"), write("c"))
    assert recorder.sent == [["a", "b", "c"]]


@pytest.mark.parametrize(
    ("first", "second"),
    [
        pytest.param(write("a"), write("a"), id="both write a key"),
        pytest.param(write("a"), write("b", reads=["a"]), id="the second compares what the first writes"),
        pytest.param(write("a", reads=["b"]), write("b"), id="the first compares what the second writes"),
        pytest.param(
            write("a"), base.Txn((), (base.Put("b", b""),), (base.Get("a"),)), id="the second reads it when it fails"
        ),
        pytest.param(write("a/1"), base.Txn((), (base.Delete("a/", "a0"),)), id="a range deletes it"),
        pytest.param(base.Txn((), (base.Delete("a/", "a0"),)), write("b", reads=["a/1"]), id="a range it compares"),
    ],
)
async def test_conflicting_ones_do_not(
    batcher: batch.Batcher, recorder: Recorder, first: base.Txn, second: base.Txn
) -> None:
    await commit_all(batcher, first, second)
    assert recorder.sent == [[name_of(first)], [name_of(second)]]


async def test_two_may_read_the_same(batcher: batch.Batcher, recorder: Recorder) -> None:
    await commit_all(batcher, write("a", reads=["format"]), write("b", reads=["format"]))
    assert recorder.sent == [["a", "b"]]


def test_small_batches_wait_for_company_when_many_come(recorder: Recorder, clock: Clock) -> None:
    """A steady stream makes batches of several, although the store would take each at once; a lonely one just goes."""

    async def story() -> None:
        recorder.takes_s = batch.LINGER_S / 2
        many = batch.Batcher(recorder, now_ns=clock.now_ns, timeout_s=10, attempt_s=2)
        tasks: list[asyncio.Task[base.Outcome]] = []
        for n in range(10):  # it is seen how slow the store is
            await many.commit(write(f"early {n}"))
        recorder.sent.clear()

        async def come(*names: str) -> None:
            tasks.extend(asyncio.create_task(many.commit(write(name))) for name in names)
            await settle()

        await come("lonely")
        assert len(recorder.sent) == 1
        await come(*(f"{n}" for n in range(2 * batch.COMPANY)))
        assert len(recorder.sent) == 2, "they were many enough already"
        await come("a")
        await come("b")
        assert len(recorder.sent) == 2, "more are to be expected"
        await come(*(f"later {n}" for n in range(batch.COMPANY)))
        assert len(recorder.sent) == 3 and recorder.sent[2][:2] == ["a", "b"], "they have come"
        await come("c")
        await asyncio.sleep(2 * batch.LINGER_S)
        assert recorder.sent[3:] == [["c"]], "nobody came"
        await asyncio.sleep(1)
        await come("d")
        assert recorder.sent[4:] == [["d"]], "that was long ago"
        await asyncio.gather(*tasks)

    virtual.run(story())


@pytest.mark.parametrize(
    ("per_s", "takes_s", "company"),
    [
        pytest.param(200, 0.003, False, id="a quick store, some work"),
        pytest.param(1000, 0.001, False, id="a very quick one, much work"),
        pytest.param(100, 0.03, False, id="a slow one, little work"),
        pytest.param(800, 0.03, True, id="a slow one, much work"),
        pytest.param(800, 0.5, True, id="a very slow one"),
    ],
)
def test_company_is_worth_what_the_store_takes(
    recorder: Recorder, clock: Clock, per_s: int, takes_s: float, company: bool
) -> None:
    """Where the store is quick, nobody waits for anybody: what follows one upon the other is quick as well. Where it is
    slow since there is much to do, they travel together, and wait for that no longer than agreed."""

    async def story() -> None:
        recorder.takes_s = takes_s
        many = batch.Batcher(recorder, now_ns=clock.now_ns, timeout_s=10, attempt_s=5, in_flight=1000)
        waited: list[float] = []
        loop = asyncio.get_running_loop()

        async def one(name: str) -> None:
            come_s = loop.time()
            await many.commit(write(name))
            waited.append(loop.time() - come_s - takes_s)

        async with asyncio.TaskGroup() as group:
            for n in range(4 * per_s):
                group.create_task(one(str(n)))
                await asyncio.sleep(1 / per_s)
        late = [names for names in recorder.sent if int(names[0]) > 2 * per_s]
        if company:
            assert sum(map(len, late)) / len(late) > batch.COMPANY / 2
            assert max(waited) < batch.LINGER_S + 0.01
        else:
            assert all(len(names) == 1 for names in late)
            assert max(waited) < 0.001

    virtual.run(story())


async def test_nothing_overtakes_what_it_conflicts_with(batcher: batch.Batcher, recorder: Recorder) -> None:
    """`c` fits the first batch but for `b`, which waits before it and reads it."""
    await commit_all(batcher, write("a"), write("b", reads=["a", "c"]), write("c"), write("d"))
    assert recorder.sent == [["a", "d"], ["b"], ["c"]]


async def test_what_is_under_way_is_not_overtaken_either(batcher: batch.Batcher, recorder: Recorder) -> None:
    recorder.gate.clear()
    first = asyncio.create_task(batcher.commit(write("a")))
    await settle()
    later = asyncio.create_task(commit_all(batcher, write("a"), write("b")))
    await settle()
    assert recorder.sent == [["a"], ["b"]]
    recorder.gate.set()
    await asyncio.gather(first, later)
    assert recorder.sent == [["a"], ["b"], ["a"]]


async def test_no_more_than_agreed_are_under_way(batcher: batch.Batcher, recorder: Recorder) -> None:
    recorder.gate.clear()
    tasks = []
    for name in "abcd":
        tasks.append(asyncio.create_task(batcher.commit(write(name))))
        await settle()
    assert recorder.sent == [["a"], ["b"]]
    recorder.gate.set()
    await asyncio.gather(*tasks)
    assert recorder.sent == [["a"], ["b"], ["c", "d"]]


async def test_a_batch_keeps_to_what_etcd_takes(batcher: batch.Batcher, recorder: Recorder) -> None:
    """etcd counts the batch's members and the widest of them together."""
    await commit_all(batcher, *(write(f"{n:03}", more=27) for n in range(150)))
    assert [len(names) for names in recorder.sent] == [100, 50]


async def test_a_batch_keeps_to_the_size_of_a_request(batcher: batch.Batcher, recorder: Recorder) -> None:
    await commit_all(batcher, *(write(f"{n}", size=400_000) for n in range(7)))
    assert [len(names) for names in recorder.sent] == [3, 3, 1]


async def test_a_large_one_travels_alone(batcher: batch.Batcher, recorder: Recorder) -> None:
    await commit_all(batcher, write("a"), write("large", more=limits.MAX_OPS), write("b"))
    assert recorder.sent == [["a"], ["large"], ["b"]]


async def test_a_lost_reply_is_unsure_for_each(batcher: batch.Batcher, recorder: Recorder) -> None:
    recorder.fault = lambda names: errors.Unsure("lost")
    ends = await commit_all(batcher, write("a"), write("b"))
    assert [type(end) for end in ends] == [errors.Unsure, errors.Unsure]
    assert ends[0] is not ends[1], "one exception in two tasks would mix their tracebacks"
    assert recorder.sent == [["a", "b"]], "and it is not sent again"


async def test_unavailable_is_so_for_each(batcher: batch.Batcher, recorder: Recorder) -> None:
    recorder.fault = lambda names: errors.Unavailable("nobody there")
    ends = await commit_all(batcher, write("a"), write("b"))
    assert [type(end) for end in ends] == [errors.Unavailable, errors.Unavailable]
    assert len(recorder.sent) == 1


@pytest.mark.parametrize("fault", [errors.Rejected, errors.NoSpace])
async def test_a_refused_batch_is_split_until_the_guilty_is_alone(
    batcher: batch.Batcher, recorder: Recorder, fault: type[errors.StoreError]
) -> None:
    recorder.fault = lambda names: fault("no") if "5" in names else None
    ends = await commit_all(batcher, *(write(str(n)) for n in range(8)))
    assert [n for n, end in enumerate(ends) if isinstance(end, fault)] == [5]
    assert all(isinstance(end, base.Outcome) for n, end in enumerate(ends) if n != 5)
    assert sum("5" in names for names in recorder.sent) == 4, "8, 4, 2, 1"


async def test_a_part_that_is_lost_after_a_split_is_unsure(batcher: batch.Batcher, recorder: Recorder) -> None:
    def fault(names: Sequence[str]) -> errors.StoreError | None:
        return errors.Rejected("no") if "0" in names else errors.Unsure("lost") if "3" in names else None

    recorder.fault = fault
    ends = await commit_all(batcher, *(write(str(n)) for n in range(4)))
    assert [type(end) for end in ends] == [errors.Rejected, base.Outcome, errors.Unsure, errors.Unsure]


async def test_who_is_cancelled_while_waiting_is_not_sent(batcher: batch.Batcher, recorder: Recorder) -> None:
    tasks = [asyncio.create_task(batcher.commit(write(name))) for name in "abc"]
    await asyncio.sleep(0)
    tasks[1].cancel()
    await asyncio.wait(tasks)
    assert recorder.sent == [["a", "c"]]


async def test_who_waits_too_long_is_certainly_not_applied(
    batcher: batch.Batcher, recorder: Recorder, clock: Clock
) -> None:
    recorder.gate.clear()
    first = asyncio.create_task(batcher.commit(write("a")))
    await settle()
    second = asyncio.create_task(batcher.commit(write("a")))
    await settle()
    clock.ns += 11 * 10**9
    recorder.gate.set()
    await first
    with pytest.raises(errors.Unavailable):
        await second
    assert recorder.sent == [["a"]]


async def test_nothing_is_sent_for_a_caller_who_asked_too_long_ago(
    batcher: batch.Batcher, recorder: Recorder, clock: Clock
) -> None:
    """(safety S24) The caller's own limit counts, not only the store's."""
    recorder.gate.clear()
    first = asyncio.create_task(batcher.commit(write("a")))
    await settle()
    second = asyncio.create_task(batcher.commit(write("a"), 1.0))
    await settle()
    clock.ns += 2 * 10**9
    recorder.gate.set()
    await first
    with pytest.raises(errors.Unavailable):
        await second
    assert recorder.sent == [["a"]]


async def test_no_part_of_a_split_batch_is_sent_too_late(
    batcher: batch.Batcher, recorder: Recorder, clock: Clock
) -> None:
    """(safety S24) Splitting takes time: what is due meanwhile was refused with all others, and is not sent again."""

    def refused(names: Sequence[str]) -> errors.StoreError | None:
        clock.ns += 2 * 10**9
        return errors.Rejected("one of them is guilty") if len(names) > 1 else None

    recorder.fault = refused
    fates = await asyncio.gather(batcher.commit(write("a")), batcher.commit(write("b"), 1.0), return_exceptions=True)
    assert isinstance(fates[0], base.Outcome)
    assert isinstance(fates[1], errors.Unavailable)
    assert recorder.sent == [["a", "b"], ["a"]]


async def test_what_waited_long_still_gets_one_attempt(
    batcher: batch.Batcher, recorder: Recorder, clock: Clock
) -> None:
    recorder.gate.clear()
    tasks = [asyncio.create_task(batcher.commit(write("a"))) for _ in range(2)]
    await settle()
    clock.ns += 9 * 10**9
    recorder.gate.set()
    await asyncio.gather(*tasks)
    assert recorder.budgets_s == [10, 2]


async def test_closing_tells_the_truth(batcher: batch.Batcher, recorder: Recorder) -> None:
    recorder.gate.clear()
    flying = asyncio.create_task(batcher.commit(write("a")))
    await settle()
    waiting = asyncio.create_task(batcher.commit(write("a")))
    await settle()
    await batcher.close()
    with pytest.raises(errors.Unsure):
        await flying
    with pytest.raises(errors.Unavailable):
        await waiting
    with pytest.raises(errors.Unavailable):
        await batcher.commit(write("b"))


async def test_what_no_store_takes_is_not_sent_at_all(batcher: batch.Batcher, recorder: Recorder) -> None:
    ends = await commit_all(batcher, write("a", size=2_000_000), write("b"))
    assert isinstance(ends[0], errors.Rejected) and isinstance(ends[1], base.Outcome)
    assert recorder.sent == [["b"]]


@pytest.mark.parametrize(("size", "fit"), [(0, batch.QUEUE_LIMIT), (1 << 20, batch.QUEUE_BYTES >> 20)])
async def test_what_a_slow_store_cannot_take_is_refused_at_once(
    batcher: batch.Batcher, recorder: Recorder, clock: Clock, size: int, fit: int
) -> None:
    recorder.gate.clear()
    first = []
    for n in range(2):  # one batch each: no more can be under way
        first.append(asyncio.create_task(batcher.commit(write(f"first{n}"))))
        await settle()
    waiting = [asyncio.create_task(batcher.commit(write(f"k{n}", size=size))) for n in range(fit + 10)]
    await settle()
    refused = [task for task in waiting if task.done()]
    assert 10 <= len(refused) <= 12
    assert all(isinstance(task.exception(), errors.Unavailable) for task in refused)

    clock.ns += 11_000_000_000  # their time is up: they are told when somebody wants the room
    newcomer = asyncio.create_task(batcher.commit(write("newcomer", size=size)))
    await settle()
    assert all(isinstance(task.exception(), errors.Unavailable) for task in waiting if task.done())
    assert [task.done() for task in waiting] == [True] * len(waiting)
    recorder.gate.set()
    assert (await newcomer).succeeded
    await asyncio.gather(*first)
