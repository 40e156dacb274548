"""POST /api/v1/vm: what is taken, what is refused and how, and that repeats are harmless."""

import asyncio
import base64
import json
from typing import Any

import pytest

from covey import model
from covey.controller import start_request
from tests.unit.controller import cloud, strict

UNREACHABLE = "registry not reachable"


async def listed(api: cloud.Api) -> list[Any]:
    body = await api.ok("GET", "/api/v1/vm")
    strict.check_vms(body)
    return list(body)


# ---- what is refused, each with the field's name and nothing left behind


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"vmid": ""}, "vmid: missing"),
    ({"count": 0}, "count: 0 is not between 1 and 100"),
    ({"count": -1}, "count: -1 is not between 1 and 100"),
    ({"count": 10**6}, "count: 1000000 is not between 1 and 100"),
    ({"vmid": "22222222-2222-4222-8222-222222222222"}, "VM not in the registry"),
    ({"vmid": "linux"}, "VM not in the registry"),
    ({"vmid": "linux", "tag": "nothing"}, "VM not in the registry"),
    ({"vmid": "../../etc/passwd"}, "VM not in the registry"),
    ({"tag": "v9"}, "No such tag v9"),
    ({"tag": 'a b #1 "é'}, 'No such tag a b #1 "é'),
    ({"node_id": "nobody"}, "node_id: there is no node nobody"),
    ({"priority": 0}, "priority: 0 is not between 1 and 10000"),
    ({"priority": 10_001}, "priority: 10001 is not between 1 and 10000"),
    ({"vcpu": -1}, "vcpu: -1"),
    ({"vram": 1 << 60}, "vram: "),
    ({"version": -1}, "version: -1"),
    ({"startup_script": "%%%"}, "startup_script: not valid base64"),
    ({"startup_script": base64.b64encode(b"x" * 262_145).decode()}, "startup_script: 262145 bytes"),
    ({"startup_script_condition": 2}, "startup_script_condition: 2"),
    ({"script_fail_handler": 3}, "script_fail_handler: 3"),
    ({"script_timeout": 0}, "script_timeout: 0"),
    ({"name": "a\nb"}, "name: contains a control character"),
    ({"external_id": "x" * 1025}, "external_id: longer than 1024 characters"),
    ({"vnc_password": "123456789"}, "vnc_password: VNC knows at most 8 characters"),
    ({"metadata": {"a": "x" * 5000}}, "metadata: more than 4096 bytes"),
    ({"metadata": {"a": "x\0"}}, "metadata.a: contains a control character"),
    (
        {"port_forwarding_override": [{"name": "a", "guest_port": "22"}, {"guest_port": "x"}]},
        "port_forwarding_override[1].guest_port: 'x' is no TCP port",
    ),
    ({"port_forwarding_override": [{"guest_port": "0"}]}, "port_forwarding_override[0].guest_port"),
    ({"port_forwarding_override": [{"guest_port": "22", "host_port": "65536"}]}, "host_port: '65536' is no TCP port"),
    ({"port_forwarding_override": [{"guest_port": "22", "protocol": "udp"}]}, "protocol: only tcp is forwarded"),
    *(
        ({field: value}, f"{field}: not supported by this version")
        for field, value in {
            "group_id": "g",
            "group": "g",
            "usb_device": "u",
            "mac_address": "00:11:22:33:44:55",
            "vlan_tag": "12",
            "video_controller": "fbuf",
            "hvapic": True,
            "csr_active_config": "0x65",
            "network_local": False,
            "hw_serial": "s",
            "hw_uuid": "u",
            "network_mode": "bridge",
            "disk": {"size": "80G"},
        }.items()
    ),
]


async def test_what_cannot_be_done_is_refused_by_name(house: cloud.Cloud) -> None:
    for fields, text in REFUSED:
        message = await house.api.fail("POST", "/api/v1/vm", {"vmid": cloud.TEMPLATE, **fields})
        exact = text.startswith(("No such tag", "VM not in"))
        assert message == text if exact else text in message, fields
    assert await listed(house.api) == []


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"vmid": 7}, "vmid"),
    ({"count": "2"}, "count"),
    ({"count": 1.5}, "count"),
    ({"count": True}, "count"),
    ({"tag": ["v1"]}, "tag"),
    ({"priority": "low"}, "priority"),
    ({"startup_script": 1}, "startup_script"),
    ({"script_monitoring": "yes"}, "script_monitoring"),
    ({"metadata": {"a": {}}}, "metadata"),
    ({"metadata": {"a": 1.5}}, "metadata"),
    ({"metadata": []}, "metadata"),
    ({"port_forwarding_override": {}}, "port_forwarding_override"),
    ({"port_forwarding_override": [{"guest_port": []}]}, "port_forwarding_override[0].guest_port"),
]


async def test_wrong_json_types_are_400_and_name_the_field(house: cloud.Cloud) -> None:
    for fields, name in WRONG:
        status, envelope = await house.api.ask("POST", "/api/v1/vm", {"vmid": cloud.TEMPLATE, **fields})
        assert (status, envelope["status"]) == (400, "FAIL"), fields
        assert envelope["message"].startswith(name), envelope
    for body in (b"", b"{", b"[]", b"vmid=x", b"null"):
        status, _ = await house.api.ask("POST", "/api/v1/vm", body)
        assert status == 400, body
    status, _ = await house.api.ask("POST", "/api/v1/vm", b'{"x":"' + b" " * (1 << 20) + b'"}')
    assert status == 413
    for method, path, body in (
        ("DELETE", "/api/v1/vm", b'{"id":1}'),
        ("PUT", "/api/v1/vm?id=x", b'{"metadata":1}'),
        ("POST", "/api/v1/node/config", b'{"node_id":"n","capacity_mode":"x"}'),
        ("DELETE", "/api/v1/node", b'{"node_id":[]}'),
    ):
        assert (await house.api.ask(method, path, body))[0] == 400
    assert await listed(house.api) == []


async def test_too_much_data_for_one_transaction_is_refused(house: cloud.Cloud) -> None:
    metadata = dict.fromkeys("abc", "é" * 600)
    names = dict.fromkeys(("external_id", "name_template", "name"), "é" * 1000)
    fields: dict[str, Any] = {"metadata": metadata, **names}
    message = await house.api.fail("POST", "/api/v1/vm", {"vmid": cloud.TEMPLATE, "count": 100, **fields})
    assert message.startswith("count: 100 instances with so much data are too many at once; at most ")
    most = int(message.rsplit(" ", 1)[1])
    assert len(await house.api.start(count=most, **fields)) == most


# ---- what is taken


async def test_every_documented_field_arrives(house: cloud.Cloud) -> None:
    script = base64.b64encode(b"echo hi").decode()
    [id] = await house.api.start(
        tag="v1",
        name="n",
        name_template="$template_name-$tag",
        external_id="e",
        metadata={"a": 1, "b": True, "c": "x"},
        priority=5,
        startup_script=script,
        startup_script_condition=1,
        script_monitoring=True,
        script_timeout=7,
        script_fail_handler=2,
        vcpu=3,
        vram=2048,
        vnc_password="12345678",
        port_forwarding_override=[
            {"name": "ssh", "guest_port": "22", "host_ip": "", "host_port": ""},
            {"name": "web", "guest_port": "80", "host_ip": "10.0.0.9", "host_port": "8080"},
        ],
        group_id="",
        undocumented={"anything": [1]},
    )
    kept = house.replicas[0]._mirror.snapshot().instance(id)
    assert kept is not None
    spec = kept.noun.spec
    assert (spec.tag, spec.version, spec.digest) == ("v1", 0, "sha256:" + "0" * 64)
    assert (spec.name, spec.name_template, spec.external_id, spec.priority) == ("n", "$template_name-$tag", "e", 5)
    assert (spec.vcpu, spec.vram_mb, spec.vnc_password) == (3, 2048, "12345678")
    assert spec.forwards == (
        model.Forward(name="ssh", guest_port=22),
        model.Forward(name="web", guest_port=80, host_port=8080, host_ip="10.0.0.9"),
    )
    assert spec.script is not None
    assert spec.script == model.Script(key=spec.script.key, condition=1, monitored=True, timeout_s=7, fail_handler=2)
    assert kept.noun.metadata == {"a": 1, "b": True, "c": "x"}


@pytest.mark.parametrize(
    ("fields", "number"),
    [({}, 1), ({"tag": None}, 1), ({"tag": ""}, 1), ({"tag": "v1"}, 0), ({"version": 0}, 0), ({"version": 1}, 1)],
)
async def test_the_newest_version_unless_one_is_named(house: cloud.Cloud, fields: dict[str, Any], number: int) -> None:
    [id] = await house.api.start(**fields)
    shown = await house.api.ok("GET", f"/api/v1/vm?id={id}")
    assert (shown["version"], shown["tag"]) == (number, f"v{number + 1}")


async def test_a_hundred_at_once_in_the_order_of_the_answer(house: cloud.Cloud) -> None:
    ids = await house.api.start(count=100)
    assert len(set(ids)) == 100
    assert [wrapper["instance_id"] for wrapper in await listed(house.api)] == ids


async def test_a_start_that_gives_no_size_counts_with_the_template_s(house: cloud.Cloud) -> None:
    """Else a node whose room is its processors and memory would take any number of them."""
    house.registry.size = (4, 6000)
    joined = await cloud.Agent(house.api).join()
    await house.api.ok("POST", "/api/v1/node/config", {"node_id": joined.node, "capacity_mode": "resource"})
    for _ in range(3):
        await house.api.start()
    mirror = house.replicas[0]._mirror

    def claims() -> list[tuple[int, int]]:
        ledger = mirror.snapshot().ledger(joined.node)
        return [] if ledger is None else [(claim.vcpu, claim.vram_mb) for claim in ledger.noun.claims]

    await cloud.until(lambda: len(claims()) == 2)
    await cloud.until(lambda: mirror.snapshot().waiting_count() == 1)
    assert claims() == [(4, 6000), (4, 6000)], "8 processors are taken by two"


async def test_a_latin1_body_is_taken(house: cloud.Cloud) -> None:
    body = json.dumps({"vmid": cloud.TEMPLATE, "name": "café"}, ensure_ascii=False).encode("latin-1")
    [id] = await house.api.ok("POST", "/api/v1/vm", body + b"\n")
    assert (await house.api.ok("GET", f"/api/v1/vm?id={id}"))["name"] == "café"


# ---- the registry


async def test_an_unreachable_registry_says_so_and_never_no_such_tag(house: cloud.Cloud) -> None:
    house.registry.fails = True
    body = {"vmid": cloud.TEMPLATE, "tag": "v9"}
    assert await house.api.fail("POST", "/api/v1/vm", body) == "registry not reachable"
    assert house.registry.server is not None
    await house.registry.server.drain(0)
    assert await house.api.fail("POST", "/api/v1/vm", body) == "registry not reachable"
    assert await listed(house.api) == []


async def test_what_was_started_before_is_started_while_no_registry_answers() -> None:
    """As it was then, by every controller; what nobody asked for is refused as ever (safety S14)."""
    async with cloud.running(2) as house:
        first, second = house.apis
        [known] = await first.start(tag="v1")
        [newest] = await first.start()
        await cloud.until(lambda: all(one._writer.unfinished == 0 for one in house.replicas))
        house.registry.fails = True
        for api in (first, second):
            [again] = await api.start(tag="v1")
            [latest] = await api.start()
            shown = {w["instance_id"]: w["vm"]["tag"] for w in await listed(api)}
            assert (shown[again], shown[latest]) == (shown[known], shown[newest]) == ("v1", "v2")
            assert await api.fail("POST", "/api/v1/vm", {"vmid": cloud.TEMPLATE, "tag": "v9"}) == UNREACHABLE
            assert await api.fail("POST", "/api/v1/vm", {"vmid": cloud.TEMPLATE, "version": 0}) == UNREACHABLE
            unknown = {"vmid": "22222222-2222-4222-8222-222222222222"}
            assert await api.fail("POST", "/api/v1/vm", unknown) == UNREACHABLE


async def test_a_registrys_own_word_is_never_replaced_by_an_older_one(house: cloud.Cloud) -> None:
    body = {"vmid": cloud.TEMPLATE, "tag": "v1"}
    await house.api.ok("POST", "/api/v1/vm", body)
    await cloud.until(lambda: house.replicas[0]._writer.unfinished == 0)
    house.registry.tags.remove("v1")
    assert await house.api.fail("POST", "/api/v1/vm", body) == "No such tag v1"
    await cloud.until(lambda: house.replicas[0]._writer.unfinished == 0)
    house.registry.fails = True
    assert await house.api.fail("POST", "/api/v1/vm", body) == UNREACHABLE  # what was deleted stays deleted


async def test_the_newest_word_is_remembered(house: cloud.Cloud) -> None:
    await house.api.start()
    house.registry.tags.append("v3")
    await house.api.start()
    await cloud.until(lambda: house.replicas[0]._writer.unfinished == 0)
    house.registry.fails = True
    [id] = await house.api.start()
    assert {w["instance_id"]: w["vm"]["tag"] for w in await listed(house.api)}[id] == "v3"


async def test_a_tag_that_moves_is_looked_up_anew(house: cloud.Cloud) -> None:
    [first] = await house.api.start()
    house.registry.tags.append("v3")
    [second] = await house.api.start()
    tags = {w["instance_id"]: w["vm"]["tag"] for w in await listed(house.api)}
    assert tags == {first: "v2", second: "v3"}


async def test_a_burst_shares_questions_but_never_an_older_answer(house: cloud.Cloud) -> None:
    house.registry.delay_s = 0.2
    early = [asyncio.create_task(house.api.start()) for _ in range(20)]
    await cloud.until(lambda: len(house.registry.asked) == 1)
    house.registry.tags.append("v3")  # from here on, "latest" means another version
    late = [asyncio.create_task(house.api.start()) for _ in range(20)]
    ids = [task[0] for task in await asyncio.gather(*late)]
    await asyncio.gather(*early)
    tags = {w["instance_id"]: w["vm"]["tag"] for w in await listed(house.api)}
    assert {tags[id] for id in ids} == {"v3"}
    assert len(house.registry.asked) <= 4


# ---- repeats (promise I7)


async def test_an_idempotency_key_gives_the_same_answer_on_every_replica(pair: cloud.Cloud) -> None:
    headers = {"Idempotency-Key": "k1"}
    body = {"vmid": cloud.TEMPLATE, "count": 3}
    first = await pair.apis[0].ok("POST", "/api/v1/vm", body, headers)
    again = await pair.apis[1].ok("POST", "/api/v1/vm", dict(reversed(body.items())), headers)
    assert first == again
    other = await pair.apis[1].fail("POST", "/api/v1/vm", {**body, "count": 2}, headers)
    assert other == "Idempotency-Key was used for another request"
    assert len(await listed(pair.api)) == 3


async def test_a_repeat_needs_no_registry(house: cloud.Cloud) -> None:
    headers = {"Idempotency-Key": "k1"}
    first = await house.api.ok("POST", "/api/v1/vm", {"vmid": cloud.TEMPLATE}, headers)
    house.registry.fails = True
    assert await house.api.ok("POST", "/api/v1/vm", {"vmid": cloud.TEMPLATE}, headers) == first


async def test_equal_requests_at_once_on_two_replicas_make_one_set(pair: cloud.Cloud) -> None:
    headers = {"Idempotency-Key": "k2"}
    body = {"vmid": cloud.TEMPLATE, "count": 2}
    answers = await asyncio.gather(*(pair.apis[n % 2].ok("POST", "/api/v1/vm", body, headers) for n in range(20)))
    assert {tuple(answer) for answer in answers} == {tuple(answers[0])}
    assert len(await listed(pair.api)) == 2


async def test_ten_posts_of_one_ci_server_in_a_row_are_one_start(pair: cloud.Cloud) -> None:
    body = {"vmid": cloud.TEMPLATE, "external_id": "/computer/a", "name": "a"}
    answers = await asyncio.gather(*(pair.apis[n % 2].ok("POST", "/api/v1/vm", body) for n in range(10)))
    assert {tuple(answer) for answer in answers} == {tuple(answers[0])}
    await pair.api.ok("DELETE", "/api/v1/vm", {"id": answers[0][0]})
    assert await pair.api.ok("POST", "/api/v1/vm", body) != answers[0]


async def test_external_id_alone_is_no_identity(house: cloud.Cloud) -> None:
    first = await house.api.start(external_id="profile-1")
    assert await house.api.start(external_id="profile-1") != first


async def test_what_one_replica_answered_the_other_shows_at_once(pair: cloud.Cloud) -> None:
    for turn in range(20):
        here, there = pair.apis[turn % 2], pair.apis[1 - turn % 2]
        [id] = await here.start()
        assert id in [wrapper["instance_id"] for wrapper in await listed(there)]
        await there.ok("PUT", f"/api/v1/vm?id={id}", {"name": str(turn)})
        assert (await here.ok("GET", f"/api/v1/vm?id={id}"))["name"] == str(turn)
        await here.ok("DELETE", "/api/v1/vm", {"id": id})
        assert await there.state(id) == "Terminated"


# ---- pure parts


def test_the_body_hash_knows_a_request_again_however_it_is_written() -> None:
    same = [b'{"a":1,"b":[1,2]}', b'{ "b": [1, 2], "a": 1 }\n']
    assert len({start_request.body_hash(body) for body in same}) == 1
    assert start_request.body_hash(b'{"a":1,"b":[2,1]}') != start_request.body_hash(same[0])
    assert start_request.body_hash('{"a":"é"}'.encode()) == start_request.body_hash('{"a":"é"}'.encode("latin-1"))
