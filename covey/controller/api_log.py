"""/api/v1/vm/log: a part of what an instance's start script wrote, read from the node that keeps it (safety S26).

The reader sets the pace: each request is one question to the node (`store.commit_questions`), answered from the last
16 MiB of the stream. Nothing is held here between two requests.
"""

import asyncio
from collections.abc import Sequence
from typing import NamedTuple

import msgspec

from covey import errors, model, serve
from covey.store import commit, commit_questions, mirror, schema, view

_WAIT_S = 7.0  # for the node's answer; a request has ten in all
_STREAMS = ("stdout", "stderr")
_FURTHEST = 1 << 62
_ELSEWHERE = "the last 64 KiB are shown by GET /api/v1/vm?id="


class Log(msgspec.Struct, frozen=True, kw_only=True):
    """`data` is base64. `offset`: of its first byte; later than asked for when what lies before was not kept."""

    data: bytes
    offset: int
    size: int
    end: bool


class _Wish(NamedTuple):
    id: str
    stream: str
    offset: int
    limit: int


class LogApi:
    def __init__(self, mirror: mirror.Mirror, writer: commit.Writer, *, wait_s: float = _WAIT_S) -> None:
        self._mirror = mirror
        self._writer = writer
        self._wait_s = wait_s

    def routes(self) -> Sequence[serve.Route]:
        return [serve.Route("GET", "/api/v1/vm/log", self.get)]

    async def get(self, call: serve.Call) -> Log:
        wish = _wish(call)
        snapshot = await self._mirror.fresh()
        instance = _readable(snapshot, wish.id)
        node = instance.node
        question = model.Question(
            nonce="",
            instance=instance.id,
            epoch=instance.epoch,
            stream=wish.stream,
            offset=wish.offset,
            limit=wish.limit,
        )
        call.still_fresh()
        asked = await commit_questions.ask(self._writer, snapshot, node, question, call.until_ns)
        if isinstance(asked, commit_questions.Busy):
            raise errors.Unavailable(f"node {node} is asked for too much output at once; ask again")
        try:
            answer = await self._answer(node, asked)
        except BaseException:
            self._writer.soon(commit_questions.withdraw(self._writer, node, asked))
            raise
        if answer.output is None:
            raise errors.Refused(f"{answer.fault}; {_ELSEWHERE}")
        found = answer.output
        return Log(data=found.data, offset=found.offset, size=found.size, end=found.end)

    async def _answer(self, node: model.NodeId, asked: commit_questions.Asked) -> schema.Answer:
        """Wait until the question is gone: it was answered, or its lease has ended."""
        try:
            async with asyncio.timeout(self._wait_s):
                await self._mirror.reached(asked.question.revision)
                while _is_open(snapshot := self._mirror.snapshot(), node, asked):
                    await self._mirror.node_changed(node, snapshot.revision)
        except TimeoutError:
            raise errors.Refused(f"the node does not answer; {_ELSEWHERE}") from None
        answer = await commit_questions.take(self._writer, asked.question.noun.nonce)
        if answer is None:
            raise errors.Refused(f"the node does not answer; {_ELSEWHERE}")
        return answer


def _is_open(snapshot: view.Snapshot, node: model.NodeId, asked: commit_questions.Asked) -> bool:
    kept = snapshot.question(node, asked.slot)
    return kept is not None and kept.noun.nonce == asked.question.noun.nonce


def _readable(snapshot: view.Snapshot, id: str) -> model.Instance:
    """The instance, if there is a node to ask."""
    kept = snapshot.instance(id)
    if kept is None:
        raise errors.NotFound("Not found")
    instance = kept.noun
    if instance.spec.script is None:
        raise errors.Refused("the instance has no start script, so there is no output")
    if not instance.launched or instance.released or instance.state == model.State.TERMINATED:
        raise errors.Refused(f"the instance has no VM on any node now; {_ELSEWHERE}")
    if snapshot.alive(instance.node) is None:
        raise errors.Refused(f"the node does not answer; {_ELSEWHERE}")
    return instance


def _wish(call: serve.Call) -> _Wish:
    id, stream = call.query.get("id", ""), call.query.get("stream", "stdout")
    if not id:
        raise errors.Refused("id: missing; name the instance in the query (?id=)")
    if stream not in _STREAMS:
        raise errors.Refused("stream: must be stdout or stderr")
    offset = _number(call, "offset", 0, -_FURTHEST, _FURTHEST)
    limit = _number(call, "limit", schema.ANSWER_LIMIT_BYTES, 1, schema.ANSWER_LIMIT_BYTES)
    return _Wish(id, stream, offset, limit)


def _number(call: serve.Call, name: str, default: int, least: int, most: int) -> int:
    text = call.query.get(name, str(default))
    digits = text.removeprefix("-")
    if not (digits.isascii() and digits.isdecimal() and len(digits) < 20 and least <= int(text) <= most):
        raise errors.Refused(f"{name}: must be a whole number from {least} to {most}")
    return int(text)
