"""Which message carries what, in virtual time: an outbox over calls that are answered when the test says."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import msgspec

from covey import model, wire, world
from covey.agent import identity, reports, session
from covey.client import http
from tests.support import nouns, virtual

Said = wire.ReportEvent
LEASE = wire.LeaseTerms()
SEEN = wire.Seen(history="h", revision=1)
A, B = (model.InstanceId("a"), 1), (model.InstanceId("b"), 1)


class Clock(world.System):
    def boot_ns(self) -> int:
        return int((1000 + now()) * 1e9)


def now() -> float:
    return asyncio.get_running_loop().time()


@dataclass
class Cloud:
    """An Exchange with one controller: when each report came, and what it said."""

    takes_s: float = 0.01
    reports: list[tuple[float, wire.Report]] = field(default_factory=list)

    async def send(
        self, url: str, method: str, path: str, data: bytes | None, headers: Mapping[str, str], timeout_s: float
    ) -> http.Reply:
        if path.endswith("/join"):
            return _answer(
                wire.Joined(
                    node=model.NodeId("node"),
                    session=1,
                    cloud="cloud",
                    seen=SEEN,
                    lease=LEASE,
                    heartbeat_s=1000.0,
                    registries=(),
                    name="node",
                )
            )
        report = msgspec.json.decode(data or b"", type=wire.Report)
        self.reports.append((now(), report))
        await asyncio.sleep(self.takes_s)
        return _answer(wire.Reported(lease=LEASE, seen=SEEN, settled=tuple(range(len(report.items)))))

    def items(self) -> list[list[str]]:
        """The VMs that each report with items spoke of."""
        return [[item.instance for item in report.items] for _, report in self.reports if report.items]

    def words(self) -> list[float]:
        return [round(at_s) for at_s, report in self.reports if report.word is not None]


def _answer(body: msgspec.Struct) -> http.Reply:
    return http.Reply(200, {}, msgspec.json.encode(wire.Envelope(body=msgspec.Raw(msgspec.json.encode(body)))))


@dataclass
class Node:
    """What a test plays with."""

    cloud: Cloud
    standing: session.Session
    outbox: reports.Outbox
    vms: list[model.VmSeen] = field(default_factory=list)

    def word(self) -> model.Word:
        return model.Word(
            node=model.NodeId("node"), session=1, messages=0, at_ns=0, vms=tuple(self.vms), images=(), free_disk_bytes=1
        )

    def runs(self, instance: model.InstanceId) -> None:
        self.vms.append(model.VmSeen(instance=instance, epoch=1, running=True, cloud="cloud"))
        self.outbox.changed()


def play(story: Callable[[Node], Awaitable[Any]], takes_s: float = 0.01) -> None:
    """A node that has joined and has said how it is."""

    async def whole() -> None:
        cloud, clock = Cloud(), Clock()
        async with http.Endpoints(["http://only"], exchange=cloud) as endpoints:
            standing = session.Session(identity.File(None, clock, sync=False), endpoints, clock)
            node = Node(cloud, standing, reports.Outbox(standing, clock, lambda: node.word()))
            await standing.join(nouns.facts())
            sending = asyncio.create_task(node.outbox.run())
            await asyncio.sleep(0.5)
            cloud.takes_s = takes_s
            assert len(cloud.reports) == 1
            cloud.reports.clear()
            await story(node)
            sending.cancel()

    virtual.run(whole())


async def gathering(node: Node) -> float:
    began_s = now()
    await node.outbox.gathered()
    return round(now() - began_s, 2)


def test_a_poll_waits_for_the_outcome_of_what_was_begun() -> None:
    async def story(node: Node) -> None:
        node.outbox.expect(A[0])
        asyncio.get_running_loop().call_later(0.1, node.outbox.say, A, Said.BOOTED)
        assert await gathering(node) == 0.1
        assert [item.instance for item in node.outbox.ride().items] == ["a"]
        await asyncio.sleep(0.5)
        assert node.cloud.items() == []

    play(story)


def test_it_waits_longer_where_such_work_takes_long_lately() -> None:
    async def story(node: Node) -> None:
        waited = []
        for takes_s in (0.01, 0.4, 1.2, 3.0):
            for quick_s in (takes_s, 0.01):  # a removal is quick, and says nothing of how long a start takes
                node.outbox.expect(A[0])
                await asyncio.sleep(quick_s)
                node.outbox.say(A, Said.BOOTED)
            node.outbox.expect(B[0])
            await asyncio.sleep(1.0)  # until all that was said is settled
            waited.append(await gathering(node))
        assert waited == [0.25, 0.54, 1.5, 0.25]

    play(story)


def test_it_does_not_wait_for_what_takes_its_time() -> None:
    async def story(node: Node) -> None:
        assert await gathering(node) == 0
        node.outbox.expect(A[0])
        asyncio.get_running_loop().call_later(0.05, node.outbox.expect_no_more, A[0])
        assert await gathering(node) == 0.05

    play(story)


def test_what_there_is_to_say_waits_hardly_for_the_outcome_of_other_work() -> None:
    async def story(node: Node) -> None:
        node.outbox.expect(A[0])
        node.outbox.expect(B[0])
        asyncio.get_running_loop().call_later(0.1, node.outbox.say, A, Said.BOOTED)
        assert await gathering(node) == 0.13
        assert [item.instance for item in node.outbox.ride().items] == ["a"]

    play(story)


def test_a_rider_goes_again_when_it_has_had_no_answer_for_long_as_answers_take_lately() -> None:
    async def story(node: Node) -> None:
        for usual_s, late_s in ((0.1, 1.0), (0.5, 2.5), (60.0, 4.0)):
            node.cloud.reports.clear()
            node.outbox.say(A, Said.BOOTED)
            node.standing.usual_s = usual_s
            load, began_s = node.outbox.ride(), now()
            await asyncio.sleep(5.0)
            assert [round(at_s - began_s, 1) for at_s, _ in node.cloud.reports] == [late_s]
            node.outbox.rode(load, (0,))

    play(story)


def test_what_rides_is_not_reported_only_because_another_vm_has_news() -> None:
    async def story(node: Node) -> None:
        node.outbox.say(A, Said.BOOTED)
        load = node.outbox.ride()
        node.outbox.say(B, Said.GONE)
        await asyncio.sleep(0.5)
        assert node.cloud.items() == [["b"]]
        node.outbox.rode(load, (0,))
        assert not node.outbox.waits_for(A[0])

    play(story)


def test_what_a_vm_comes_to_is_told_in_its_order() -> None:
    """Safety S3: an item that is not newer than the last one applied counts no more."""

    async def story(node: Node) -> None:
        node.outbox.say(A, Said.BOOTED)
        node.outbox.ride()
        node.outbox.say(A, Said.FAILED)
        await asyncio.sleep(0.5)
        ((_, report),) = node.cloud.reports
        assert [item.event for item in report.items] == [Said.BOOTED, Said.FAILED]

    play(story)


def test_a_poll_carries_what_the_report_on_its_way_does_not_speak_of() -> None:
    async def story(node: Node) -> None:
        node.outbox.say(A, Said.BOOTED)
        await asyncio.sleep(0.1)
        node.outbox.say(A, Said.FAILED)
        node.outbox.say(B, Said.GONE)
        assert [item.instance for item in node.outbox.ride().items] == ["b"]
        await asyncio.sleep(1.0)
        assert node.cloud.items() == [["a"], ["a"]]

    play(story, takes_s=0.3)


def test_that_vms_came_or_went_is_no_reason_for_a_message_while_a_poll_may_carry_it() -> None:
    async def story(node: Node) -> None:
        node.runs(A[0])
        began_s = now()
        await asyncio.sleep(30.0)
        (at_s,) = node.cloud.words()
        assert at_s - began_s < 13, "no poll came"
        node.cloud.reports.clear()
        node.runs(B[0])
        await asyncio.sleep(6.0)
        load = node.outbox.ride()
        assert load.word is not None
        node.outbox.rode(load, ())
        await asyncio.sleep(20.0)
        assert node.cloud.words() == []

    play(story)
