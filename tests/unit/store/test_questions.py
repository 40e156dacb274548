"""Questions to nodes by way of the store: asked once, answered once, never more than the slots (safety S26)."""

import asyncio

import pytest

from covey import model
from covey.store import commit_questions, commit_reports, schema
from tests.support import cloud, flaky

OUTPUT = model.Output(data=b"written\xff", offset=3, size=11, end=True)


def question(instance: str = "i-1") -> model.Question:
    return model.Question(nonce="", instance=model.InstanceId(instance), epoch=1, stream="stdout", offset=0, limit=100)


async def ask(c: cloud.Cloud, node: model.NodeId) -> commit_questions.Asked:
    asked = await commit_questions.ask(c.writer, await c.look(), node, question())
    assert isinstance(asked, commit_questions.Asked)
    return asked


async def answer(
    c: cloud.Cloud, node: model.NodeId, nonce: str, session: int = 1
) -> commit_questions.Answered | commit_reports.StaleSession:
    return await commit_questions.answer(c.writer, await c.look(), node, session, nonce, OUTPUT, "")


async def test_asked_answered_taken_and_nothing_is_left() -> None:
    async with cloud.running() as c:
        node = await c.join()
        asked = await ask(c, node)
        (shown,) = (await c.look()).questions_to(node)
        assert shown == asked.question
        assert await commit_questions.take(c.writer, shown.noun.nonce) is None
        assert await answer(c, node, shown.noun.nonce) == commit_questions.Answered(True)
        assert list((await c.look()).questions_to(node)) == []
        taken = await commit_questions.take(c.writer, shown.noun.nonce)
        assert taken is not None and taken.output == OUTPUT
        await c.writer.close()
        assert await c.values(schema.ANSWERS) == await c.values(schema.ASKS) == []


async def test_keys_end_with_their_lease() -> None:
    async with cloud.running() as c:
        node = await c.join()
        one, two = await ask(c, node), await ask(c, node)
        await answer(c, node, one.question.noun.nonce)
        (left,) = await c.values(schema.ASKS)
        (given,) = await c.values(schema.ANSWERS)
        assert left.lease and given.lease
        assert left.key == schema.ask(node, two.slot)


@pytest.mark.parametrize("fate", [flaky.Fate.LOST_REPLY, flaky.Fate.LOST_REQUEST])
async def test_lost_replies_ask_once_and_answer_once(fate: flaky.Fate) -> None:
    """Safety S15."""
    async with cloud.running() as c:
        node = await c.join()
        c.flaky.plan(fate)
        asked = await ask(c, node)
        assert len(await c.values(schema.ASKS)) == 1
        c.flaky.plan(fate)
        assert await answer(c, node, asked.question.noun.nonce) == commit_questions.Answered(True)
        taken = await commit_questions.take(c.writer, asked.question.noun.nonce)
        assert taken is not None and taken.output == OUTPUT


async def test_no_more_than_the_slots_are_open_whoever_asks_at_once() -> None:
    async with cloud.running() as c:
        node, other = await c.join(), await c.join()
        snapshot = await c.look()  # all decide on the same old view
        asked = await asyncio.gather(
            *(commit_questions.ask(c.writer, snapshot, node, question()) for _ in range(schema.ASK_SLOTS + 4))
        )
        assert asked.count(commit_questions.Busy()) == 4
        assert len(await c.values(schema.ASKS)) == schema.ASK_SLOTS
        await ask(c, other)  # a busy node disturbs no other
        (first,) = [one for one in asked if isinstance(one, commit_questions.Asked) and one.slot == 0]
        await commit_questions.withdraw(c.writer, node, first)
        assert (await ask(c, node)).slot == 0


async def test_an_answer_that_nobody_waits_for_is_dropped() -> None:
    async with cloud.running() as c:
        node = await c.join()
        asked = await ask(c, node)
        before = await c.look()
        await commit_questions.withdraw(c.writer, node, asked)
        nonce = asked.question.noun.nonce
        for snapshot in (before, await c.look()):
            late = await commit_questions.answer(c.writer, snapshot, node, 1, nonce, OUTPUT, "")
            assert late == commit_questions.Answered(False)
        assert await c.values(schema.ANSWERS) == []


async def test_only_the_newest_session_of_the_node_asked_answers() -> None:
    """Safety S7."""
    async with cloud.running() as c:
        node, other = await c.join(), await c.join()
        nonce = (await ask(c, node)).question.noun.nonce
        assert await answer(c, node, nonce, session=2) == commit_reports.StaleSession()
        assert await answer(c, other, nonce) == commit_questions.Answered(False)
        assert len(await c.values(schema.ASKS)) == 1
