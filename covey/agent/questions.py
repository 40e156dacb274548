"""Questions about what start scripts wrote: each is answered once, from what the hypervisor keeps (safety S26).

They come with the answers to the poll and are shown there until they are answered, so one that is being answered is
not begun again. Answering changes nothing here and touches no VM's worker.
"""

import asyncio
from collections.abc import Sequence

import msgspec

from covey import errors, model, observe, wire
from covey.agent import parts, records, session
from covey.decide import convergence

_log = observe.log("agent")
Stage = convergence.Stage
_READER_NS = 8_000_000_000
_PAUSE_S = 0.3
_OVER = (Stage.FAILED, Stage.STOPPED)


class Questions:
    """The questions of one node. `shared` is the agent's."""

    def __init__(self, shared: parts.Parts) -> None:
        self._parts = shared
        self._answering: set[str] = set()  # nonces

    def take(self, questions: Sequence[model.Question], group: asyncio.TaskGroup) -> None:
        """Begin to answer those that are new."""
        for question in questions:
            if question.nonce not in self._answering:
                self._answering.add(question.nonce)
                group.create_task(self._answer(question))

    async def _answer(self, question: model.Question) -> None:
        try:
            await self._tell(question)
        except (session.SessionLost, errors.RemoteError, errors.Refused) as error:
            _log.debug("a question was not answered; its reader asks again", nonce=question.nonce, error=str(error))
        except Exception:
            _log.exception("a question could not be answered", instance=question.instance)
        finally:
            self._answering.discard(question.nonce)

    async def _tell(self, question: model.Question) -> None:
        """Find it, and say it until somebody heard it or the reader has surely gone."""
        output, fault = await self._find(question)
        until_ns = self._parts.clock.boot_ns() + _READER_NS
        while True:
            try:
                return await self._say(question, output, fault)
            except session.SessionLost:
                raise
            except errors.RemoteError:
                if self._parts.clock.boot_ns() > until_ns:
                    raise
            await asyncio.sleep(_PAUSE_S)

    async def _say(self, question: model.Question, output: model.Output | None, fault: str) -> None:
        standing = self._parts.session
        told = wire.Answer(
            nonce=question.nonce, seen=standing.seen, messages=standing.count(), output=output, fault=fault
        )
        await standing.call("answer", wire.Answered, told)

    async def _find(self, question: model.Question) -> tuple[model.Output | None, str]:
        key = (question.instance, question.epoch)
        try:
            output = await self._parts.driver.output(*key, question.stream, question.offset, question.limit)
        except (errors.HypervisorError, OSError) as error:
            return None, str(error) or type(error).__name__
        reached = output.offset + len(output.data) >= output.size
        return msgspec.structs.replace(output, end=reached and _ended(self._parts.records.get(key))), ""


def _ended(record: records.Record | None) -> bool:
    """Whether the script writes no more."""
    return record is None or record.script_ended or record.stage in _OVER
