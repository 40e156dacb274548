"""What the agent has to say, said until it is settled (safety S3, S10, S26).

Each fact is an item with a sequence number within (session, instance, epoch); it is sent again until the answer lists
it as settled, so a lost reply costs a repeat and nothing else. A new session says everything anew: `said` is empty
then, and convergence draws the facts from the records. Progress is the exception: only the newest counts, at most one
a second per VM. The node's word travels along when capacity changed, a few seconds after VMs did, or every 60 s. When
nothing was sent for `heartbeat_s`, an empty report keeps the lease alive.

A report rides along with the node's next poll where one is about to be sent: `gathered` before it goes, `ride` when it
does, `rode` when it was answered. A poll waits a little for the outcome of work that was just begun (`expect`, until
`expect_no_more`): a message that is not sent is the cheapest. Its answer may take as long as a poll may wait. So what
has not been settled for a second goes again, in a report of its own, which finds out whether the controller is there
at all. Where things take long, for there is much to do, both wait longer: overload must not feed itself.
"""

import asyncio
from collections.abc import Callable, Container, Sequence
from enum import StrEnum
from typing import Any, NamedTuple

import msgspec

from covey import errors, model, observe, wire, world
from covey.agent import bell, records, session
from covey.decide import heartbeat

_PROGRESS_NS = 1_000_000_000
_PROGRESS_STEP = 0.01
_WORD_NS = int(wire.WORD_S * 1e9)
_WORD_LEAST_NS = 1_000_000_000
_WORD_VMS_NS = 5_000_000_000  # for VMs alone: that they booted or are gone is reported for itself, at once
_WORD_ALONE_NS = 12_000_000_000  # … and no message is sent only for that before a poll has ended by itself
_ITEMS = 100  # per report
_BYTES = 2_000_000  # of output per report
_RETRY_S = 0.25
_RETRY_LIMIT_S = 2.0
_RIDE_S = 1.0  # a rider without an answer for so long is reported …
_RIDE_LIMIT_S = 4.0
_RIDE_TIMES = 5.0  # … or for so many times as long as answers take lately
_GATHER_S = 0.25  # a poll waits so long for the outcome of new work …
_GATHER_TIMES = 1.5  # … or so many times as long as such work takes lately …
_GATHER_LIMIT_S = 1.5  # … unless that is longer: another placement waits to be acknowledged meanwhile (safety S10)
_QUICKER = 0.1  # by such a part it follows work that is quicker than the slowest was lately
_BESIDE_S = 0.03  # with something to say already, a poll waits so long for the outcome of other work
_RIDE_BYTES = 100_000  # of output along with a poll

_log = observe.log("agent")
Said = wire.ReportEvent


class _News(StrEnum):
    """What of the word the controllers do not know."""

    NONE = "none"
    VMS = "vms"  # nothing else: that VMs booted or are gone is reported for itself
    ALL = "all"


class Load(NamedTuple):
    """What rides along with a poll."""

    items: tuple[wire.Item, ...] = ()
    word: model.Word | None = None


class Outbox:
    """All unsettled items of one node, and the loop that sends them. `word` says how the node is now."""

    def __init__(self, standing: session.Session, clock: world.World, word: Callable[[], model.Word]) -> None:
        self._session = standing
        self._clock = clock
        self._word = word
        self._items: list[wire.Item] = []
        self._sequence = 0  # one for all: it must go on for each VM, also for one that comes back
        self._said: dict[records.Key, set[Said]] = {}
        self._progress: dict[records.Key, tuple[int, float]] = {}  # when, and how much, was said last
        self._woken = bell.Bell()
        self._last_word: model.Word | None = None
        self._word_ns = 0
        self._doubted = True  # since the word was compared with the last one that was sent
        self._news = _News.ALL
        self._vms_ns = 0  # since when it is only VMs
        self._reported = Load()  # what the report carries that is on its way
        self._riders = Load()
        self._ride_until_ns = 0  # then they are overdue
        self._overdue: asyncio.TimerHandle | None = None  # rings when they have gone without an answer for long
        self._soon: set[model.InstanceId] = set()  # of which something will be said shortly
        self._begun_ns: dict[model.InstanceId, int] = {}  # since when
        self._quick_s = 0.0  # how long it takes lately, at most, until it is said
        self._gathering = False  # a poll is about to go, and waits for something to carry
        self._load = bell.Bell()
        self.on_settled: Callable[[wire.Item], None] = lambda _: None

    def say(self, key: records.Key, event: Said, **fields: Any) -> None:
        """Queue one fact."""
        if event is not Said.PROGRESS:
            self._said.setdefault(key, set()).add(event)
        if event not in (Said.ACKNOWLEDGED, Said.INFO):
            self._items = [item for item in self._items if not _overtaken(item, key)]
        self._sequence += 1
        self._items.append(wire.Item(instance=key[0], epoch=key[1], seq=self._sequence, event=event, **fields))
        self._came_to_something(key[0])
        (self._load if self._gathering else self._woken).ring()

    def expect(self, instance: model.InstanceId) -> None:
        """Work was begun that is likely to come to something shortly."""
        self._soon.add(instance)
        self._begun_ns[instance] = self._clock.boot_ns()

    def expect_no_more(self, instance: model.InstanceId) -> None:
        """It takes its time."""
        self._soon.discard(instance)
        self._begun_ns.pop(instance, None)
        if self._gathering and not self._soon:
            self._load.ring()

    def _came_to_something(self, instance: model.InstanceId) -> None:
        self._soon.discard(instance)
        begun_ns = self._begun_ns.pop(instance, None)
        if begun_ns is not None:
            took_s = (self._clock.boot_ns() - begun_ns) / 1e9
            self._quick_s = max(took_s, self._quick_s + _QUICKER * (took_s - self._quick_s))

    def progress(self, key: records.Key, fraction: float) -> None:
        """Say how far a preparation is, if that is news and not too soon."""
        at_ns, before = self._progress.get(key, (0, 0.0))
        now_ns = self._clock.boot_ns()
        if now_ns - at_ns >= _PROGRESS_NS and fraction - before >= _PROGRESS_STEP:
            self._progress[key] = (now_ns, fraction)
            self.say(key, Said.PROGRESS, progress=fraction)

    def said(self, key: records.Key) -> tuple[Said, ...]:
        said = self._said.get(key)
        return tuple(sorted(said)) if said else ()

    def has_said(self, key: records.Key, event: Said) -> bool:
        return event in self._said.get(key, ())

    def unsay(self, key: records.Key, event: Said) -> None:
        """It is asked for anew: what was said of it before is of no use to who asks."""
        self._said.get(key, set()).discard(event)

    def waits_for(self, instance: model.InstanceId) -> bool:
        """Whether something about the instance is not settled yet."""
        return any(item.instance == instance for item in self._items)

    def keep(self, instances: Container[model.InstanceId]) -> None:
        """Forget what was said of all others: nothing of them is here or asked for."""
        self._said = {key: said for key, said in self._said.items() if key[0] in instances}
        self._progress = {key: told for key, told in self._progress.items() if key[0] in instances}

    def begin(self) -> None:
        """A new session: everything is said again."""
        self._items.clear()
        self._sequence = 0
        self._said.clear()
        self._progress.clear()
        self._last_word = None
        self._riders = Load()
        self._woken.ring()

    def changed(self) -> None:
        """VMs or capacity may have changed: see whether the word has."""
        self._doubted = True
        self._woken.ring()

    # ---- along with a poll -----------------------------------------------------------------------------------------

    async def gathered(self) -> None:
        """Wait until a poll has all to carry that is to be expected shortly. Until then nothing else is sent."""
        loop = asyncio.get_running_loop()
        until_s = loop.time() + self._gather_s()
        self._gathering = True
        try:
            while self._soon and loop.time() < until_s:
                if self._fit_to_ride(_RIDE_BYTES):
                    until_s = min(until_s, loop.time() + _BESIDE_S)
                self._load.clear()
                await self._load.wait(until_s - loop.time())
        finally:
            self._gathering = False
            self._soon.clear()

    def _gather_s(self) -> float:
        if self._quick_s > _GATHER_LIMIT_S:
            return _GATHER_S
        return min(max(_GATHER_S, _GATHER_TIMES * self._quick_s), _GATHER_LIMIT_S)

    def ride(self) -> Load:
        """What goes along with a poll that is sent now; `rode` must follow. Nothing while a word is on its way: it may
        name a VM of which this would say that it is gone."""
        if self._reported.word is not None:
            return Load()
        word = self._due_word()
        if word is not None:
            word = msgspec.structs.replace(word, messages=self._session.messages)
        self._riders = Load(tuple(self._fit_to_ride(_RIDE_BYTES)), word)
        if self._riders.items:
            late_s = min(max(_RIDE_S, _RIDE_TIMES * self._session.usual_s), _RIDE_LIMIT_S)
            self._ride_until_ns = self._clock.boot_ns() + int(late_s * 1e9)
            self._overdue = asyncio.get_running_loop().call_later(late_s + 0.01, self._woken.ring)
        if self._to_report() or (word is None and self._may_be_news()):
            self._woken.ring()
        return self._riders

    def _fit_to_ride(self, limit_bytes: int) -> list[wire.Item]:
        """The oldest items, less those of VMs that a report speaks of which is on its way: they stay in order."""
        told = {item.instance for item in self._reported.items}
        return _batch([item for item in self._items if item.instance not in told], limit_bytes)

    def rode(self, load: Load, settled: Sequence[int] | None = None) -> None:
        """The poll was answered; without `settled` it was not, or the controller does not take reports so."""
        if self._riders is load:
            self._riders = Load()
        if self._overdue is not None:
            self._overdue.cancel()
            self._overdue = None
        if settled is None:
            self._woken.ring()  # to be reported
            return
        if load.word is not None:
            self._told(load.word)
        self._settle(load.items, settled)

    # ---- by themselves ---------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Send what there is, for ever."""
        pause_s = _RETRY_S
        refused = ""
        while True:
            await self._session.good.wait()
            try:
                settled = await self._turn()
            except session.SessionLost:
                continue
            except errors.RemoteError as error:  # that nobody answers is the poll's to tell
                _log.debug("a report was not taken; it is sent again", error=str(error))
                settled = False
            except errors.Refused as error:
                if str(error) != refused:
                    _log.warning("a report was refused; it is sent again", error=str(error))
                settled, refused = False, str(error)
            else:
                refused = ""
            pause_s = _RETRY_S if settled else min(2 * pause_s, _RETRY_LIMIT_S)
            if not settled:
                await asyncio.sleep(pause_s)

    async def _turn(self) -> bool:
        """Wait until something is to be sent, and send it. False when something remained unsettled."""
        self._woken.clear()
        batch = _batch(self._to_report(), _BYTES)
        silent_s = (self._clock.boot_ns() - self._session.sent_ns) / 1e9
        sends = bool(batch) or silent_s >= self._session.heartbeat_s
        may_tell = not self._gathering and self._riders.word is None
        word = self._due_word(alone=not sends) if may_tell else None
        if not sends and word is None:
            await self._woken.wait(self._pause_s(silent_s))
            return True
        return await self._send(batch, word)

    def _pause_s(self, silent_s: float) -> float:
        """Until the next heartbeat, or until a word that was held back may be sent."""
        until_s = self._session.heartbeat_s - silent_s
        if self._gathering or self._riders.word is not None or not (self._doubted or self._news is not _News.NONE):
            return until_s
        due_ns = self._word_ns + _WORD_LEAST_NS
        if not self._may_be_news():
            due_ns = max(self._word_ns + _WORD_VMS_NS, self._vms_ns + _WORD_ALONE_NS)
        return min(until_s, max(due_ns - self._clock.boot_ns(), 0) / 1e9)

    def _may_be_news(self) -> bool:
        """Whether the word may say more that is new than how VMs are."""
        return self._doubted or self._news is _News.ALL

    def _to_report(self) -> list[wire.Item]:
        """Items to be sent now: all of a VM in their order, so with its riders that are not settled yet."""
        if not self._items or self._gathering:
            return []
        if not self._riders.items or self._clock.boot_ns() >= self._ride_until_ns:
            return self._items
        ride = set(map(id, self._riders.items))
        left = {item.instance for item in self._items if id(item) not in ride}
        return [item for item in self._items if item.instance in left]

    async def _send(self, batch: Sequence[wire.Item], word: model.Word | None) -> bool:
        number = self._session.count()
        if word is not None:
            word = msgspec.structs.replace(word, messages=number)
        report = wire.Report(seen=self._session.seen, messages=number, items=tuple(batch), word=word)
        self._reported = Load(report.items, word)
        try:
            answer = await self._session.call("report", wire.Reported, report)
        finally:
            self._reported = Load()
        self._session.learn(answer.seen)
        if word is not None:
            self._told(word)
        return self._settle(batch, answer.settled) == len(batch)

    def _told(self, word: model.Word) -> None:
        self._last_word, self._word_ns = heartbeat.figureless(word), self._clock.boot_ns()
        self._doubted = True

    def _settle(self, batch: Sequence[wire.Item], indexes: Sequence[int]) -> int:
        """These items need not be said again; how many."""
        done = {id(batch[index]) for index in indexes if 0 <= index < len(batch)}
        settled = [item for item in self._items if id(item) in done]  # not those that another call has settled
        self._items = [item for item in self._items if id(item) not in done]
        for item in settled:
            self.on_settled(item)
        return len(done)

    def _due_word(self, *, alone: bool = False) -> model.Word | None:
        """The node's word, when it is news or 60 s old. `alone`: nothing else would be sent."""
        age_ns = self._clock.boot_ns() - self._word_ns
        if self._last_word is None or age_ns >= _WORD_NS:
            return self._word()
        if age_ns < _WORD_LEAST_NS or not (self._doubted or self._is_due_after(age_ns, alone)):
            return None
        word = self._word()
        self._compare(word)
        return word if self._is_due_after(age_ns, alone) else None

    def _is_due_after(self, age_ns: int, alone: bool) -> bool:
        """Whether what is news may be told when the last word is so old."""
        if self._news is _News.VMS:
            waited_ns = self._clock.boot_ns() - self._vms_ns
            return age_ns >= _WORD_VMS_NS and (waited_ns >= _WORD_ALONE_NS or not alone)
        return self._news is _News.ALL

    def _compare(self, word: model.Word) -> None:
        told, new = self._last_word, heartbeat.figureless(word)
        self._doubted = False
        if told is None or _vmless(new) != _vmless(told):
            self._news = _News.ALL
        elif new == told:
            self._news = _News.NONE
        elif self._news is not _News.VMS:
            self._news, self._vms_ns = _News.VMS, self._clock.boot_ns()


def _batch(items: Sequence[wire.Item], limit_bytes: int) -> list[wire.Item]:
    """The oldest items that fit one report, in their order."""
    batch: list[wire.Item] = []
    size = 0
    for item in items[:_ITEMS]:
        size += len(item.stdout) + len(item.stderr)
        if size > limit_bytes and (batch or limit_bytes < _BYTES):
            break
        batch.append(item)
    return batch


def _overtaken(item: wire.Item, key: records.Key) -> bool:
    return item.event is Said.PROGRESS and (item.instance, item.epoch) == key


def _vmless(word: model.Word) -> model.Word:
    return msgspec.structs.replace(word, vms=())
