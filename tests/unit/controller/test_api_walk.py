"""An instance's whole life over HTTP, as an agent drives it and as clients see it."""

import asyncio
import base64
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import pytest

from covey import wire
from tests.unit.controller import cloud, strict

Event = wire.ReportEvent


@pytest.fixture
async def house() -> AsyncIterator[cloud.Cloud]:
    async with cloud.running(COVEY_INSTANCE_TIME_OUT="500ms") as one:
        yield one


class Poller:
    """Asks for the list all the time, with the strictest client's eyes."""

    def __init__(self, http: aiohttp.ClientSession) -> None:
        self._http = http
        self.states: list[str] = []

    async def run(self) -> None:
        while True:
            async with self._http.get("/api/v1/vm") as got:
                body = strict.decode(await got.read())["body"]
            strict.check_vms(body)
            for wrapper in body:
                state = wrapper["vm"]["instance_state"]
                if not self.states or self.states[-1] != state:
                    self.states.append(state)
            await asyncio.sleep(0.005)


@contextlib.asynccontextmanager
async def polling(house: cloud.Cloud) -> AsyncIterator[Poller]:
    poller = Poller(house.api.http)
    task = asyncio.create_task(poller.run())
    try:
        yield poller
        assert not task.done(), task.exception()
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def show(house: cloud.Cloud, id: str) -> Any:
    body = await house.api.ok("GET", f"/api/v1/vm?id={id}")
    strict.check_vm(body)
    return body


async def test_a_life_from_scheduling_to_gone(house: cloud.Cloud) -> None:
    async with polling(house) as poller:
        [id] = await house.api.start(external_id="job/1", name="build", metadata={"jenkins-job-id": "x #1"})
        waiting = await show(house, id)
        assert waiting["instance_state"] == "Scheduling"
        assert "no node has joined" in waiting["message"]
        assert waiting["external_id"] == "job/1"
        await cloud.until(lambda: poller.states == ["Scheduling"])

        agent = cloud.Agent(house.api)
        await agent.join()
        want = await agent.work(wire.Verb.RUN)
        assert (want.instance, want.launched, want.vm_name) == (id, False, f"covey-{id}")
        await agent.report(agent.item(want, Event.ACKNOWLEDGED))
        await agent.report(agent.item(want, Event.PROGRESS, progress=0.5, message="pulling"))
        pulling = await show(house, id)
        assert (pulling["instance_state"], pulling["progress"]) == ("Pulling", 0.5)
        assert "vminfo" not in pulling
        await cloud.until(lambda: poller.states[-1] == "Pulling")

        launched = await agent.launch(want)
        assert launched.granted
        await agent.report(agent.item(want, Event.BOOTED, vm=cloud.vm_info(id)))
        started = await show(house, id)
        assert started["instance_state"] == "Started"
        assert started["vminfo"]["ram"] == "4G"
        assert started["vminfo"]["vnc_connection_string"] == "vnc://:secret12@10.0.0.1:5901"
        assert started["vminfo"]["port_forwarding"][0]["host_port"] == 10022

        await cloud.until(lambda: poller.states[-1] == "Started")
        await house.api.ok("DELETE", "/api/v1/vm", {"id": id})
        assert await house.api.state(id) == "Terminating"
        await cloud.until(lambda: poller.states[-1] == "Terminating")
        gone = await agent.work(wire.Verb.DESTROY)
        assert gone.decision is not None
        assert gone.decision.who.startswith("API client 127.0.0.1")
        await agent.report(agent.item(gone, Event.GONE))
        await cloud.until(lambda: _gone(house, id))
    # The poller may have missed the half second of Terminated.
    assert [state for state in poller.states if state != "Terminated"] == [
        *("Scheduling", "Pulling", "Started", "Terminating")
    ]


async def _gone(house: cloud.Cloud, id: str) -> bool:
    _, envelope = await house.api.ask("GET", f"/api/v1/vm?id={id}")
    return bool(envelope["message"] == "Not found")


async def test_terminating_again_is_ok_also_when_it_is_forgotten(house: cloud.Cloud) -> None:
    [id] = await house.api.start()
    for _ in range(2):
        await house.api.ok("DELETE", "/api/v1/vm", {"id": id})
    await cloud.until(lambda: _gone(house, id))
    await house.api.ok("DELETE", "/api/v1/vm", {"id": id})
    assert await house.api.fail("DELETE", "/api/v1/vm", {"id": "never"}) == "Not found"


async def test_a_failed_script_shows_its_end_and_its_output_in_one_instance_only(house: cloud.Cloud) -> None:
    script = base64.b64encode(b"exit 3").decode()
    agent = cloud.Agent(house.api)
    await agent.join()
    [id] = await house.api.start(startup_script=script, script_monitoring=True, script_timeout=300)
    want = await agent.work(wire.Verb.RUN)
    assert want.spec is not None
    assert want.spec.script is not None
    assert (want.spec.script.monitored, want.spec.script.timeout_s) == (True, 300)
    assert (await agent.launch(want)).script == script
    from covey import model

    await agent.report(
        agent.item(
            want,
            Event.FAILED,
            message="the start script ended with 3",
            vm=cloud.vm_info(id),
            script=model.ScriptResult(return_code=3),
            stdout=base64.b64encode("über".encode()).decode(),
            stderr=base64.b64encode(b"oops\n").decode(),
        )
    )
    shown = await show(house, id)
    assert (shown["instance_state"], shown["message"]) == ("Error", "the start script ended with 3")
    assert shown["startup_script"]["return_code"] == 3
    assert (shown["startup_script"]["stdout"], shown["startup_script"]["stderr"]) == ("über", "oops\n")
    [wrapper] = await house.api.ok("GET", "/api/v1/vm")
    assert wrapper["vm"]["startup_script"]["stderr"] == ""


async def test_nodes_are_uniform_whatever_is_known_of_them(house: cloud.Cloud) -> None:
    agent = cloud.Agent(house.api)
    joined = await agent.join()
    other = cloud.Agent(house.api, host_key="host-2", secret="s2", facts=cloud.FACTS)
    await other.join()
    await agent.report(word=agent.word(images=(), free_disk_bytes=5, cpu_util=0.25))
    nodes = await house.api.ok("GET", "/api/v1/node")
    strict.check_nodes(nodes)
    assert len(nodes) == 2
    [one] = await house.api.ok("GET", f"/api/v1/node?id={joined.node}")
    assert (one["state"], one["capacity"], one["ram"], one["free_disk_space"]) == ("Active", 4, 16, 5)
    assert one["ip_address"] == "10.0.0.1"
    assert await house.api.fail("GET", "/api/v1/node?id=nobody") == "Not found"


async def test_a_node_is_configured_drained_and_removed(house: cloud.Cloud) -> None:
    agent = cloud.Agent(house.api)
    joined = await agent.join()
    config = {"node_id": joined.node, "max_vm_count": 7, "name": "mac-1", "drain_mode": True}
    await house.api.ok("POST", "/api/v1/node/config", config)
    [node] = await house.api.ok("GET", "/api/v1/node")
    assert (node["state"], node["capacity"], node["node_name"]) == ("Drain Mode", 7, "mac-1")
    [id] = await house.api.start()
    await cloud.until(lambda: _says(house, id, "draining"))
    await house.api.ok("POST", "/api/v1/node/config", {"node_id": joined.node, "drain_mode": False})
    await agent.work(wire.Verb.RUN)

    await house.api.ok("DELETE", "/api/v1/node", {"node_id": joined.node})
    assert await house.api.ok("GET", "/api/v1/node") == []
    await cloud.until(lambda: _is_error(house, id))
    status, envelope = await agent.call("wanted", wire.Ask(seen=agent.seen, messages=1))
    assert (status, envelope["message"]) == (410, "the node was removed from the cloud")
    await house.api.ok("DELETE", "/api/v1/node", {"node_id": joined.node})
    assert await house.api.fail("DELETE", "/api/v1/node", {"node_id": "nobody"}) == "Not found"
    assert await house.api.fail("POST", "/api/v1/node/config", {"node_id": "nobody"}) == "Not found"


async def _says(house: cloud.Cloud, id: str, text: str) -> bool:
    return text in (await show(house, id)).get("message", "")


async def _is_error(house: cloud.Cloud, id: str) -> bool:
    return await house.api.state(id) == "Error"


async def test_status_registry_and_groups(house: cloud.Cloud) -> None:
    status = await house.api.ok("GET", "/api/v1/status")
    strict.check_status(status)
    assert (status["registry_status"], status["registry_address"]) == ("Running", house.registry.url)
    groups = await house.api.ok("GET", "/api/v1/group")
    assert groups == []
    for query in ("", "?apiVer=v1"):
        strict.check_templates(await house.api.ok("GET", "/api/v1/registry/vm" + query))
    strict.check_template(await house.api.ok("GET", f"/api/v1/registry/vm?id={cloud.TEMPLATE}"))
    assert await house.api.fail("GET", "/api/v1/registry/vm?id=nothing") == "Not found"
    strict.check_disk(await house.api.ok("GET", "/api/v1/registry/disk"))

    assert house.registry.server is not None
    await house.registry.server.drain(0)
    status = await house.api.ok("GET", "/api/v1/status")
    assert status["registry_status"] == "FAIL"
    for path in ("vm", f"vm?id={cloud.TEMPLATE}", "disk"):
        assert await house.api.fail("GET", f"/api/v1/registry/{path}") == "registry not reachable"


async def test_put_merges_metadata(house: cloud.Cloud) -> None:
    [id] = await house.api.start(metadata={"a": 1, "b": "x"}, external_id="e")
    await house.api.ok("PUT", f"/api/v1/vm?id={id}", {"metadata": {"b": True, "jenkins-job-id": "job"}})
    await house.api.ok("PUT", f"/api/v1/vm?id={id}", {"name": "new", "external_id": "f"})
    shown = await show(house, id)
    assert shown["metadata"] == {"a": 1, "b": True, "jenkins-job-id": "job"}
    assert (shown["name"], shown["external_id"]) == ("new", "f")
    assert await house.api.fail("PUT", "/api/v1/vm?id=nothing", {"name": "x"}) == "Not found"
    assert (await house.api.fail("PUT", "/api/v1/vm", {"name": "x"})).startswith("id: missing")
