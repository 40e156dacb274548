"""What the agent has to say, said until it is settled (safety S3, S10, S26).

Each fact is an item with a sequence number within (session, instance, epoch); it is sent again until the answer lists
it as settled, so a lost reply costs a repeat and nothing else. A new session says everything anew: `said` is empty
then, and convergence draws the facts from the records. Progress is the exception: only the newest counts, at most one
a second per VM. The node's word travels along when capacity changed, a few seconds after VMs did, or every 60 s. When
nothing was sent for `heartbeat_s`, an empty report keeps the lease alive.

A report rides along with the node's next poll where one is about to be sent: `expected` from when the poll is known to
come, `ride` when it goes, `rode` when it was answered. The answer may take as long as a poll may wait. So what has not
been settled for a second goes again, in a report of its own, which finds out whether the controller is there at all.
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
_ITEMS = 100  # per report
_BYTES = 2_000_000  # of output per report
_RETRY_S = 0.25
_RETRY_LIMIT_S = 2.0
_RIDE_NS = 1_000_000_000  # a rider without an answer for so long is reported
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
        self._reporting = False  # a report is on its way
        self._riders = Load()
        self._rides_ns = 0  # since when
        self._overdue: asyncio.TimerHandle | None = None  # rings when they have gone without an answer for long
        self._expected = False  # a poll is about to go, and waits for something to carry
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
        (self._load if self._expected else self._woken).ring()

    def progress(self, key: records.Key, fraction: float) -> None:
        """Say how far a preparation is, if that is news and not too soon."""
        at_ns, before = self._progress.get(key, (0, 0.0))
        now_ns = self._clock.boot_ns()
        if now_ns - at_ns >= _PROGRESS_NS and fraction - before >= _PROGRESS_STEP:
            self._progress[key] = (now_ns, fraction)
            self.say(key, Said.PROGRESS, progress=fraction)

    def said(self, key: records.Key) -> tuple[Said, ...]:
        return tuple(sorted(self._said.get(key, ())))

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

    async def expected(self, limit_s: float) -> None:
        """A poll goes as soon as there is something to say, or after `limit_s`: until then nothing else is sent."""
        if self._items:
            return
        self._load.clear()
        self._expected = True
        try:
            await self._load.wait(limit_s)
        finally:
            self._expected = False

    def ride(self) -> Load:
        """What goes along with a poll that is sent now; `rode` must follow. Nothing while a report is on its way."""
        if self._reporting:
            return Load()
        word = self._due_word()
        if word is not None:
            word = msgspec.structs.replace(word, messages=self._session.messages)
        self._riders = Load(tuple(self._batch(_RIDE_BYTES)), word)
        if self._riders.items:
            self._rides_ns = self._clock.boot_ns()
            self._overdue = asyncio.get_running_loop().call_later(_RIDE_NS / 1e9 + 0.01, self._woken.ring)
        if len(self._riders.items) < len(self._items) or (word is None and self._may_be_news()):
            self._woken.ring()
        return self._riders

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
        word = None if self._expected or self._riders.word is not None else self._due_word()
        if not self._is_due() and word is None:
            silent_s = (self._clock.boot_ns() - self._session.sent_ns) / 1e9
            if silent_s < self._session.heartbeat_s:
                await self._woken.wait(self._pause_s(silent_s))
                return True
        return await self._send(self._batch(), word)

    def _pause_s(self, silent_s: float) -> float:
        """Until the next heartbeat, or until a word that was held back may be sent."""
        until_s = self._session.heartbeat_s - silent_s
        if self._expected or self._riders.word is not None or not (self._doubted or self._news is not _News.NONE):
            return until_s
        least_ns = _WORD_LEAST_NS if self._may_be_news() else _WORD_VMS_NS
        return min(until_s, max(self._word_ns + least_ns - self._clock.boot_ns(), 0) / 1e9)

    def _may_be_news(self) -> bool:
        """Whether the word may say more that is new than how VMs are."""
        return self._doubted or self._news is _News.ALL

    def _is_due(self) -> bool:
        """Whether there are items to be sent now: in their order, so with the riders that are not settled yet."""
        if not self._items or self._expected:
            return False
        if not self._riders.items or self._items[-1] is not self._riders.items[-1]:
            return True
        return self._clock.boot_ns() - self._rides_ns >= _RIDE_NS

    async def _send(self, batch: Sequence[wire.Item], word: model.Word | None) -> bool:
        number = self._session.count()
        if word is not None:
            word = msgspec.structs.replace(word, messages=number)
        report = wire.Report(seen=self._session.seen, messages=number, items=tuple(batch), word=word)
        self._reporting = True
        try:
            answer = await self._session.call("report", wire.Reported, report)
        finally:
            self._reporting = False
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

    def _batch(self, limit_bytes: int = _BYTES) -> list[wire.Item]:
        """The oldest items that fit one report, in their order."""
        batch: list[wire.Item] = []
        size = 0
        for item in self._items[:_ITEMS]:
            size += len(item.stdout) + len(item.stderr)
            if size > limit_bytes and (batch or limit_bytes < _BYTES):
                break
            batch.append(item)
        return batch

    def _due_word(self) -> model.Word | None:
        """The node's word, when it is news or 60 s old."""
        age_ns = self._clock.boot_ns() - self._word_ns
        if self._last_word is None or age_ns >= _WORD_NS:
            return self._word()
        if age_ns < _WORD_LEAST_NS or not self._is_due_after(age_ns):
            return None
        word = self._word()
        self._compare(word)
        return word if self._is_due_after(age_ns) else None

    def _is_due_after(self, age_ns: int) -> bool:
        """Whether what is news may be told when the last word is so old. To see what is news costs a whole word."""
        if self._doubted:
            self._compare(self._word())
        return self._news is _News.ALL or (self._news is _News.VMS and age_ns >= _WORD_VMS_NS)

    def _compare(self, word: model.Word) -> None:
        told, new = self._last_word, heartbeat.figureless(word)
        self._doubted = False
        if told is None or _vmless(new) != _vmless(told):
            self._news = _News.ALL
        else:
            self._news = _News.NONE if new == told else _News.VMS


def _overtaken(item: wire.Item, key: records.Key) -> bool:
    return item.event is Said.PROGRESS and (item.instance, item.epoch) == key


def _vmless(word: model.Word) -> model.Word:
    return msgspec.structs.replace(word, vms=())
