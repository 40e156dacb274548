"""What the agent has to say, said until it is settled (safety S3, S10, S26).

Each fact is an item with a sequence number within (session, instance, epoch); it is sent again until the answer lists
it as settled, so a lost reply costs a repeat and nothing else. A new session says everything anew: `said` is empty
then, and convergence draws the facts from the records. Progress is the exception: only the newest counts, at most one
a second per VM. The node's word travels along when capacity changed, a few seconds after VMs did, or every 60 s. When
nothing was sent for `heartbeat_s`, an empty report keeps the lease alive.
"""

import asyncio
from collections.abc import Callable, Container, Sequence
from typing import Any

import msgspec

from covey import errors, model, observe, wire, world
from covey.agent import records, session
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

_log = observe.log("agent")
Said = wire.ReportEvent


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
        self._woken = asyncio.Event()
        self._last_word: model.Word | None = None
        self._word_ns = 0
        self.on_settled: Callable[[model.InstanceId], None] = lambda _: None

    def say(self, key: records.Key, event: Said, **fields: Any) -> None:
        """Queue one fact."""
        if event is not Said.PROGRESS:
            self._said.setdefault(key, set()).add(event)
        if event not in (Said.ACKNOWLEDGED, Said.INFO):
            self._items = [item for item in self._items if not _overtaken(item, key)]
        self._sequence += 1
        self._items.append(wire.Item(instance=key[0], epoch=key[1], seq=self._sequence, event=event, **fields))
        self._woken.set()

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
        self._woken.set()

    def changed(self) -> None:
        """VMs or capacity may have changed: see whether the word has."""
        self._woken.set()

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
        word = self._due_word()
        if not self._items and word is None:
            silent_s = (self._clock.boot_ns() - self._session.sent_ns) / 1e9
            if silent_s < self._session.heartbeat_s:
                try:
                    async with asyncio.timeout(self._pause_s(silent_s)):
                        await self._woken.wait()
                except TimeoutError:
                    pass
                return True
        return await self._send(self._batch(), word)

    def _pause_s(self, silent_s: float) -> float:
        """Until the next heartbeat, or until a word that was held back may be sent."""
        until_s = self._session.heartbeat_s - silent_s
        return min(until_s, _WORD_LEAST_NS / 1e9) if self._stale_word() else until_s

    async def _send(self, batch: Sequence[wire.Item], word: model.Word | None) -> bool:
        number = self._session.count()
        if word is not None:
            word = msgspec.structs.replace(word, messages=number)
        report = wire.Report(seen=self._session.seen, messages=number, items=tuple(batch), word=word)
        answer = await self._session.call("report", wire.Reported, report)
        self._session.learn(answer.seen)
        if word is not None:
            self._last_word, self._word_ns = heartbeat.figureless(word), self._clock.boot_ns()
        settled = [batch[index] for index in answer.settled if 0 <= index < len(batch)]
        done = {id(item) for item in settled}
        self._items = [item for item in self._items if id(item) not in done]
        for instance in {item.instance for item in settled}:
            self.on_settled(instance)
        return len(settled) == len(batch)

    def _batch(self) -> list[wire.Item]:
        """The oldest items that fit one report, in their order."""
        batch: list[wire.Item] = []
        size = 0
        for item in self._items[:_ITEMS]:
            size += len(item.stdout) + len(item.stderr)
            if batch and size > _BYTES:
                break
            batch.append(item)
        return batch

    def _stale_word(self) -> bool:
        return self._last_word is None or heartbeat.figureless(self._word()) != self._last_word

    def _due_word(self) -> model.Word | None:
        """The node's word, when it is news or 60 s old."""
        age_ns = self._clock.boot_ns() - self._word_ns
        if self._last_word is not None and age_ns < _WORD_LEAST_NS:
            return None
        if self._last_word is None or age_ns >= _WORD_NS:
            return self._word()
        word = self._word()
        told, news = self._last_word, heartbeat.figureless(word)
        soon = news.vms == told.vms or age_ns >= _WORD_VMS_NS
        return word if news != told and (soon or _vmless(news) != _vmless(told)) else None


def _overtaken(item: wire.Item, key: records.Key) -> bool:
    return item.event is Said.PROGRESS and (item.instance, item.epoch) == key


def _vmless(word: model.Word) -> model.Word:
    return msgspec.structs.replace(word, vms=())
