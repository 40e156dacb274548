"""What scripts wrote is told to whoever asks: once per question, with a word on whether more will come (safety S26)."""

import base64

from covey import model, wire
from tests.support import nouns
from tests.unit.agent import fake
from tests.unit.agent.conftest import MakeNode

Said = wire.ReportEvent
RUN = wire.Verb.RUN


async def run(cloud: fake.Controller, vm: str, text: str, *, monitored: bool) -> None:
    cloud.scripts[vm] = base64.b64encode(text.encode()).decode()
    script = model.Script(key="k", monitored=monitored, timeout_s=60)
    cloud.want(RUN, vm, spec=nouns.spec(script=script))
    await fake.until(lambda: Said.BOOTED in cloud.said(vm), "booted")


async def answer(cloud: fake.Controller, nonce: str) -> wire.Answer:
    await fake.until(lambda: [one for one in cloud.answers if one.nonce == nonce], f"{nonce} answered")
    (given,) = [one for one in cloud.answers if one.nonce == nonce]
    return given


async def test_a_script_that_ended_has_an_end(cloud: fake.Controller, make_node: MakeNode) -> None:
    await make_node().start()
    await run(cloud, "vm", "echo hello", monitored=True)
    cloud.ask("vm", "q1", limit=4)
    cloud.ask("vm", "q2", offset=4)
    assert (await answer(cloud, "q1")).output == model.Output(data=b"hell", offset=0, size=6)
    assert (await answer(cloud, "q2")).output == model.Output(data=b"o\n", offset=4, size=6, end=True)


async def test_a_script_that_still_runs_has_none(cloud: fake.Controller, make_node: MakeNode) -> None:
    await make_node().start()
    await run(cloud, "vm", "echo hello\nsleep 1000", monitored=False)
    tries = 0

    async def written() -> model.Output:
        nonlocal tries
        tries += 1
        cloud.ask("vm", f"q{tries}")
        output = (await answer(cloud, f"q{tries}")).output
        assert output is not None and not output.end
        return output

    while (await written()).size == 0:  # the script has not begun yet
        assert tries < 1000
    assert (await written()).data == b"hello\n"


async def test_what_is_not_there_is_a_fault(cloud: fake.Controller, make_node: MakeNode) -> None:
    await make_node().start()
    cloud.ask("nobody", "q1")
    given = await answer(cloud, "q1")
    assert given.output is None and given.fault


async def test_an_answer_that_is_not_taken_is_given_again(cloud: fake.Controller, make_node: MakeNode) -> None:
    await make_node().start()
    await run(cloud, "vm", "echo hello", monitored=True)
    cloud.break_["answer"] = 503
    cloud.ask("vm", "q1")
    await fake.until(lambda: "answer" in cloud.called, "refused once")
    cloud.lose.append("answer")
    del cloud.break_["answer"]
    await fake.until(lambda: not cloud.lose, "its reply was lost")
    cloud.ask("vm", "q2")
    await answer(cloud, "q2")
    assert {given.nonce for given in cloud.answers} == {"q1", "q2"}
    assert cloud.said("vm").count(Said.BOOTED) == 1
