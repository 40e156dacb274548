"""/agent/v1/: sessions, leases, long polls, launch and reports over real sockets (safety S3, S7, S8, S22)."""

import asyncio
import base64
import time
from typing import Any

import msgspec
import pytest

from covey import model, wire
from covey.store import base
from tests.support import flaky
from tests.unit.controller import cloud

Event = wire.ReportEvent


async def status_of(agent: cloud.Agent, verb: str = "wanted") -> tuple[int, str]:
    bodies = {
        "wanted": wire.Ask(seen=agent.seen, messages=1),
        "report": wire.Report(seen=agent.seen, messages=1),
        "launch": wire.LaunchAsk(instance=model.InstanceId("i"), epoch=1, nonce="n", seen=agent.seen, messages=1),
        "leave": wire.Leave(),
    }
    status, envelope = await agent.call(verb, bodies[verb])
    return status, envelope["message"]


async def becomes(house: cloud.Cloud, id: str, state: str) -> None:
    async def has_become() -> bool:
        return await house.api.state(id) == state

    await cloud.until(has_become)


# ---- sessions (safety S7)


async def test_a_restart_takes_over_at_once_and_the_old_life_gets_409(pair: cloud.Cloud) -> None:
    old = cloud.Agent(pair.apis[0])
    first = await old.join()
    new = cloud.Agent(pair.apis[1], secret="second-secret")
    second = await new.join(node=first.node, last_secret="first-secret")
    assert (second.node, second.session) == (first.node, first.session + 1)
    for verb in ("wanted", "report", "launch", "leave"):
        status, message = await status_of(old, verb)
        assert (status, message) == (409, "this session is not the newest of its node: join again")
    assert (await status_of(new))[0] == 200


async def test_a_join_whose_reply_was_lost_can_be_repeated(house: cloud.Cloud) -> None:
    agent = cloud.Agent(house.api)
    first = await agent.join()
    again = await agent.join()
    assert (first.node, first.session) == (again.node, again.session)
    assert len(await house.api.ok("GET", "/api/v1/node")) == 1


async def test_two_hosts_with_one_node_id(house: cloud.Cloud) -> None:
    agent = cloud.Agent(house.api)
    joined = await agent.join()
    stranger = cloud.Agent(house.api, host_key="another-host", secret="other-secret")
    status, envelope = await stranger.try_join(node=joined.node, last_secret="first-secret")
    assert (status, envelope["status"]) == (200, "FAIL")
    assert envelope["message"] == "the node id belongs to another host"
    status, envelope = await stranger.try_join(node=joined.node, last_secret="guess", host_key="host-key-1")
    assert status == 409
    status, envelope = await stranger.try_join(node=joined.node, host_key="host-key-1", explicit=True)
    assert (status, envelope["message"]) == (409, "the node's last session is still alive")
    assert (await status_of(agent))[0] == 200


@pytest.mark.parametrize(
    ("authorization", "status"),
    [
        ("", 400),
        ("Basic x", 400),
        ("Covey a.b", 400),
        ("Covey {node}.1.wrong", 409),
        ("Covey {node}.2.first-secret", 409),
        ("Covey {node}.x.first-secret", 409),
        ("Covey nobody.1.first-secret", 409),
    ],
)
async def test_only_the_newest_session_is_believed(house: cloud.Cloud, authorization: str, status: int) -> None:
    agent = cloud.Agent(house.api)
    joined = await agent.join()
    headers = {"Authorization": authorization.format(node=joined.node)}
    got, envelope = await house.api.ask("POST", "/agent/v1/wanted", {"seen": {}, "messages": 1}, headers)
    assert (got, envelope["status"]) == (status, "FAIL")


async def test_an_agent_of_another_cloud_or_of_no_known_node_is_told_so(house: cloud.Cloud) -> None:
    agent = cloud.Agent(house.api)
    _, envelope = await agent.try_join(cloud="another")
    assert envelope["message"] == "the agent belongs to another cloud"
    _, envelope = await agent.try_join(node="33333333-3333-4333-8333-333333333333", last_secret="x")
    assert envelope["message"] == "the node is not known here"


async def test_a_node_leaves(house: cloud.Cloud) -> None:
    agent = cloud.Agent(house.api)
    await agent.join()
    [id] = await house.api.start()
    want = await agent.work(wire.Verb.RUN)
    status, envelope = await agent.call("leave", wire.Leave())
    assert (status, envelope["status"]) == (200, "FAIL")
    assert envelope["message"] == "the node still holds 1 VMs; terminate them, or leave with force"
    await house.api.ok("DELETE", "/api/v1/vm", {"id": id})
    await agent.work(wire.Verb.DESTROY)
    await agent.report(agent.item(want, Event.GONE))
    status, envelope = await agent.call("leave", wire.Leave())
    assert (status, envelope["status"]) == (200, "OK")
    assert await house.api.ok("GET", "/api/v1/node") == []


# ---- leases (safety S8)


async def test_a_message_renews_and_tells_how_old_the_renewal_is(house: cloud.Cloud) -> None:
    agent = cloud.Agent(house.api)
    joined = await agent.join()
    assert (joined.lease.ttl_s, joined.lease.age_s, joined.heartbeat_s) == (30, 0, 5)
    state = await agent.wanted()
    assert (state.lease.age_s, state.lease.margin_s) == (0, 5)
    assert 20 < state.lease.ttl_s <= 30
    assert 0 <= (await agent.report()).lease.age_s < 1, "right after a renewal a message rests on that one"


async def test_a_lease_that_has_ended_means_join_again(house: cloud.Cloud) -> None:
    agent = cloud.Agent(house.api)
    joined = await agent.join()
    kept = house.replicas[0]._mirror.snapshot().session(joined.node)
    assert kept is not None
    house.store.end_lease(kept.noun.lease)
    assert await status_of(agent) == (409, "the node's lease has ended: join again")
    again = await agent.join(node=joined.node, secret="s2", last_secret="first-secret")
    assert again.session == 2
    agent.secret = "s2"
    assert (await status_of(agent))[0] == 200


async def test_a_repeated_join_promises_no_more_than_its_lease_has(house: cloud.Cloud) -> None:
    """Its first answer was lost for so long that most of the lease is over."""
    agent = cloud.Agent(house.api)
    joined, copy = await agent.join(), house.replicas[0]._mirror
    await cloud.until(lambda: copy.snapshot().session(joined.node) is not None)
    kept = copy.snapshot().session(joined.node)
    assert kept is not None
    held = house.store._data.leases[kept.noun.lease]
    held.ends_ns -= 20_000_000_000
    promised = (await agent.join()).lease
    left_s = (held.ends_ns - house.store._data.world.boot_ns()) / 1e9
    assert promised.ttl_s - promised.age_s - promised.margin_s < left_s


async def test_an_idle_fleet_writes_nothing(house: cloud.Cloud) -> None:
    agents = [cloud.Agent(house.api, host_key=f"h{n}", secret=f"s{n}") for n in range(5)]
    for agent in agents:
        await agent.join()
    before = house.replicas[0]._mirror.revision
    for _ in range(3):
        await asyncio.gather(*(agent.report() for agent in agents))
        await asyncio.gather(*(agent.wanted() for agent in agents))
    assert house.replicas[0]._mirror.revision == before


# ---- wanted


async def test_a_poll_parks_until_the_nodes_own_work_changes(house: cloud.Cloud) -> None:
    agent, other = cloud.Agent(house.api), cloud.Agent(house.api, host_key="h2", secret="s2")
    await agent.join()
    await other.join()
    for one in (agent, other):
        await one.wanted()
    mine = asyncio.create_task(agent.wanted(wait_s=10))
    started = time.monotonic()
    await asyncio.sleep(0.2)
    assert not mine.done()
    [id] = await house.api.start(node_id=agent.me.node)
    state = await mine
    assert time.monotonic() - started < 9.5, "it was answered by the end of its time"
    assert [want.instance for want in state.wanted] == [id]
    assert (await other.wanted()).wanted == ()


async def test_a_poll_without_news_ends_when_it_asked_to(house: cloud.Cloud) -> None:
    agent = cloud.Agent(house.api)
    await agent.join()
    first = await agent.wanted(wait_s=5)  # the agent knows no tag yet: answered at once
    started = time.monotonic()
    second = await agent.wanted(wait_s=0.5)
    assert 0.4 < time.monotonic() - started < 60
    assert first.tag == second.tag


async def test_a_poll_that_read_a_restored_store_directly_lets_everything_else_go_on() -> None:
    """Its view has a number that the copy which was thrown away has had too, and the new copy has not yet."""
    weather = cloud.Wraps(flaky.Flaky)
    async with cloud.running(wrap=weather) as house:
        agent = cloud.Agent(house.api)
        await agent.join()
        await agent.wanted()
        copy = house.replicas[0]._mirror
        weather[0].watch_delay_s = 3600
        await house.store.client().commit(base.Txn((), (base.Put("/covey/elsewhere", b""),)))
        copy._discarded = copy.revision + 1000
        poll = asyncio.create_task(agent.wanted(wait_s=1.5))
        turns, slept = 0, 0.0
        while not poll.done():
            began = time.monotonic()
            await asyncio.sleep(0.01)
            turns, slept = turns + 1, max(slept, time.monotonic() - began)
        assert poll.done()
        assert turns > 30 and slept < 1.0, f"{turns} turns, one of {slept:.1f} s"


async def test_a_report_rides_along_with_a_poll(house: cloud.Cloud) -> None:
    """It is taken before the poll parks, and what it ends is no news to who sent it."""
    agent = cloud.Agent(house.api)
    await agent.join()
    [id] = await house.api.start()
    want = await agent.work(wire.Verb.RUN)
    await agent.launch(want)

    def riding(item: wire.Item, tag: str) -> "asyncio.Task[tuple[int, dict[str, Any]]]":
        ask = wire.Ask(seen=agent.seen, messages=agent.messages, tag=tag, wait_s=10, items=(item,))
        return asyncio.create_task(agent.call("wanted", ask))

    parked = riding(agent.item(want, Event.BOOTED, vm=cloud.vm_info(id)), agent.tag)
    await becomes(house, id, "Started")
    assert not parked.done(), "that it booted is no news to its node"
    await house.api.ok("DELETE", "/api/v1/vm", {"id": id})
    state = msgspec.convert((await parked)[1]["body"], wire.WantedState)
    assert [one.verb for one in state.wanted] == [wire.Verb.DESTROY]
    assert (state.settled, state.takes_reports) == ((0,), True)
    parked = riding(agent.item(want, Event.GONE), wire.tag((), ()))
    await becomes(house, id, "Terminated")
    [other] = await house.api.start()
    state = msgspec.convert((await parked)[1]["body"], wire.WantedState)
    assert ([one.instance for one in state.wanted], state.settled) == ([other], (0,))


async def test_draining_answers_parked_polls_at_once(pair: cloud.Cloud) -> None:
    agent = cloud.Agent(pair.apis[0])
    await agent.join()
    await agent.wanted()
    ask = wire.Ask(seen=agent.seen, messages=2, tag=agent.tag, wait_s=10)
    parked = asyncio.create_task(agent.call("wanted", ask))
    await asyncio.sleep(0.2)
    started = time.monotonic()
    await pair.replicas[0].stop()
    status, envelope = await parked
    assert (status, envelope["message"]) == (503, "this controller is going down; ask another controller")
    assert time.monotonic() - started < 9.5, "it was answered by the end of its time"
    agent.api = pair.apis[1]
    assert (await status_of(agent))[0] == 200


async def test_names_come_from_the_template_of_names(house: cloud.Cloud) -> None:
    agent = cloud.Agent(house.api)
    joined = await agent.join()
    text = "$template_name-$template_id-$tag-$node_name-$node_id-$unknown"
    await house.api.start(tag="v1", name_template=text)
    want = await agent.work(wire.Verb.RUN)
    assert want.vm_name == f"covey-linux-{cloud.TEMPLATE}-v1-host-1-{joined.node}-$unknown"[:80]


# ---- views (safety S18, S22)


async def test_a_view_from_the_future_or_of_another_history(house: cloud.Cloud) -> None:
    agent = cloud.Agent(house.api)
    await agent.join()
    now = agent.seen
    agent.seen = wire.Seen(history=now.history, revision=now.revision + 1000)
    status, message = await status_of(agent)
    assert status == 409
    assert message.startswith("hold: ")
    agent.seen = wire.Seen(history="another", revision=1)
    ask = wire.Ask(seen=agent.seen, messages=1, wait_s=5)
    status, envelope = await agent.call("wanted", ask)
    assert (status, envelope["body"]["hold"]) == (200, True)
    assert (await status_of(agent, "report"))[0] == 409
    [id] = await house.api.start()
    want = wire.Wanted(instance=model.InstanceId(id), epoch=1, verb=wire.Verb.RUN)
    assert not (await agent.launch(want)).granted


# ---- launch (safety S1)


async def test_launch_is_granted_once_and_again_to_the_same_request(house: cloud.Cloud) -> None:
    agent = cloud.Agent(house.api)
    await agent.join()
    script = base64.b64encode(b"echo 1").decode()
    await house.api.start(startup_script=script)
    want = await agent.work(wire.Verb.RUN)
    first = await agent.launch(want, "n1")
    again = await agent.launch(want, "n1")
    assert (first.granted, first.script, again.granted, again.script) == (True, script, True, script)
    other = await agent.launch(want, "n2")
    assert (other.granted, other.script) == (False, "")
    assert other.why


async def test_launch_is_denied_once_it_is_terminated(house: cloud.Cloud) -> None:
    agent = cloud.Agent(house.api)
    await agent.join()
    [id] = await house.api.start()
    want = await agent.work(wire.Verb.RUN)
    await house.api.ok("DELETE", "/api/v1/vm", {"id": id})
    denied = await agent.launch(want)
    assert (denied.granted, denied.why) == (False, "the instance is Terminating")


# ---- reports (safety S3, S26)


async def test_a_late_booted_after_terminate_changes_nothing(house: cloud.Cloud) -> None:
    agent = cloud.Agent(house.api)
    await agent.join()
    [id] = await house.api.start()
    want = await agent.work(wire.Verb.RUN)
    await agent.launch(want)
    await house.api.ok("DELETE", "/api/v1/vm", {"id": id})
    reported = await agent.report(agent.item(want, Event.BOOTED, vm=cloud.vm_info(id)))
    assert reported.settled == (0,)
    assert await house.api.state(id) == "Terminating"


async def test_a_large_report_goes_through_in_pieces(house: cloud.Cloud) -> None:
    agent = cloud.Agent(house.api, facts=msgspec.structs.replace(cloud.FACTS, slots=40))
    await agent.join()
    ids = await house.api.start(count=40)
    await cloud.until(lambda: _placed(agent, 40))
    wants = {want.instance: want for want in (await agent.wanted(tag="")).wanted}
    output = base64.b64encode(b"x" * 64 * 1024).decode()
    items = [
        agent.item(wants[model.InstanceId(id)], Event.FAILED, message="m", stdout=output, stderr=output) for id in ids
    ]
    reported = await agent.report(*items)
    assert reported.settled == tuple(range(40))
    assert {await house.api.state(id) for id in ids} == {"Error"}


async def _placed(agent: cloud.Agent, count: int) -> bool:
    return len((await agent.wanted(tag="")).wanted) == count


async def test_a_word_speaks_for_its_own_node_only(pair: cloud.Cloud) -> None:
    agent, other = cloud.Agent(pair.apis[0]), cloud.Agent(pair.apis[0], host_key="h2", secret="s2")
    await agent.join()
    await other.join()
    await agent.report(word=other.word(free_disk_bytes=77))
    shown = {node["node_id"]: node for node in await pair.apis[1].ok("GET", "/api/v1/node")}
    assert shown[agent.me.node]["free_disk_space"] == 77
    assert shown[other.me.node]["free_disk_space"] == 0


async def test_a_word_looked_up_before_the_end_brings_no_claim_back(house: cloud.Cloud) -> None:
    """Promise I3: one report says that the VM is gone, and carries a word from a moment before; its answer was lost, so
    it is sent again."""
    agent = cloud.Agent(house.api)
    await agent.join()
    [id] = await house.api.start()
    want = await agent.work(wire.Verb.RUN)
    await house.api.ok("DELETE", "/api/v1/vm", {"id": id})
    await agent.work(wire.Verb.DESTROY)
    seen = model.VmSeen(instance=want.instance, epoch=want.epoch, running=True)
    gone = agent.item(want, Event.GONE)
    await agent.report(gone)
    await agent.report(gone, word=agent.word(seen))
    [node] = await house.api.ok("GET", "/api/v1/node")
    assert node["vm_count"] == 0


async def test_leaving_again_is_ok(house: cloud.Cloud) -> None:
    """Promise I7: the answer to the first request was lost."""
    agent = cloud.Agent(house.api)
    await agent.join()
    for _ in range(2):
        status, envelope = await agent.call("leave", wire.Leave())
        assert (status, envelope["status"]) == (200, "OK")


async def test_a_removed_node_gets_410_until_its_operator_joins_it(house: cloud.Cloud) -> None:
    """Safety S12."""
    agent = cloud.Agent(house.api)
    await agent.join()
    await house.api.start()
    want = await agent.work(wire.Verb.RUN)
    await house.api.ok("DELETE", "/api/v1/node", {"node_id": agent.me.node})
    status, _ = await agent.call("report", wire.Report(seen=agent.seen, messages=9))
    assert status == 410
    status, _ = await agent.try_join(node=agent.me.node, last_secret=agent.secret)
    assert status == 410
    await agent.join(node=agent.me.node, last_secret=agent.secret, explicit=True)
    order = await agent.work(wire.Verb.DESTROY)
    assert (order.instance, order.epoch) == (want.instance, want.epoch)
    assert order.decision is not None
    assert order.decision.why == "its node was removed"
