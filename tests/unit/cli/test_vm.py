"""`covey vm` and `node`: what is sent, what is printed, how it ends."""

import base64
from pathlib import Path
from typing import Any

import pytest

from tests.unit.cli import conftest

Cloud = conftest.Cloud
Covey = conftest.Covey

TEMPLATE = "6a1c2d3e-0000-4000-8000-000000000001"
NODE = {"node_id": "n-1", "node_name": "mac-1", "state": "Active", "capacity": 2, "vm_count": 1}


def instance(id: str = "i-1", state: str = "Started", **more: object) -> dict[str, Any]:
    vm = {"uuid": "u", "status": "running", "host_ip": "10.0.0.9", "ip": "10.0.2.15"}
    rule = {"name": "http", "guest_port": 80, "host_port": 10080, "protocol": "tcp", "host_ip": "10.0.0.9"}
    shown = {
        "instance_id": id,
        "instance_state": state,
        "vmid": TEMPLATE,
        "tag": "v1",
        "cr_time": "2026-01-01T00:00:00Z",
    }
    return {**shown, "vminfo": {**vm, "port_forwarding": [rule]}, **more}


@pytest.fixture
def templates(cloud: Cloud) -> Cloud:
    cloud.ok("GET", "/api/v1/registry/vm", [{"id": TEMPLATE, "name": "debian", "size": 5}])
    return cloud


# ---- start ---------------------------------------------------------------------------------------------------------


def test_start_by_name_prints_one_id_per_line(templates: Cloud, covey: Covey) -> None:
    templates.ok("POST", "/api/v1/vm", ["i-1", "i-2"])
    ran = covey("vm", "start", "debian", "--count", 2, "--tag", "v1", "--external-id", "job 7", "--name", "w")
    assert (ran.code, ran.out.split(), ran.err) == (0, ["i-1", "i-2"], "")
    (sent,) = templates.bodies("POST", "/api/v1/vm")
    assert sent == {"vmid": TEMPLATE, "tag": "v1", "count": 2, "external_id": "job 7", "name": "w"}


def test_start_by_id(templates: Cloud, covey: Covey) -> None:
    templates.ok("POST", "/api/v1/vm", ["i-1"])
    assert covey("vm", "start", TEMPLATE, "--json").json == {"instances": ["i-1"]}


def test_each_start_is_safe_to_repeat(templates: Cloud, covey: Covey) -> None:
    """(promise I7)"""
    templates.ok("POST", "/api/v1/vm", ["i-1"])
    covey("vm", "start", TEMPLATE)
    covey("vm", "start", TEMPLATE)
    keys = [asked.headers["Idempotency-Key"] for asked in templates.asked if asked.method == "POST"]
    assert len(set(keys)) == 2


def test_a_script_travels_as_base64(templates: Cloud, covey: Covey, tmp_path: Path) -> None:
    templates.ok("POST", "/api/v1/vm", ["i-1"])
    script = tmp_path / "s.sh"
    script.write_text("echo é\n", "utf-8")
    assert covey("vm", "start", "debian", "--script", script, "--monitor").code == 0
    (sent,) = templates.bodies("POST", "/api/v1/vm")
    assert base64.b64decode(sent["startup_script"]).decode() == "echo é\n"
    assert sent["script_monitoring"] is True


def test_a_script_too_long_or_missing_is_refused_here(templates: Cloud, covey: Covey, tmp_path: Path) -> None:
    (tmp_path / "big").write_bytes(b"#" * (256 * 1024 + 1))
    ran = covey("vm", "start", "debian", "--script", tmp_path / "big")
    assert ran.code == 1
    assert "at most 262144" in ran.err
    ran = covey("vm", "start", "debian", "--script", tmp_path / "none")
    assert (ran.code, ran.err) == (1, f"covey: No such file or directory: {tmp_path / 'none'}\n")
    assert templates.bodies("POST", "/api/v1/vm") == []


def test_waiting_until_started(templates: Cloud, covey: Covey) -> None:
    templates.ok("POST", "/api/v1/vm", ["i-1"])
    templates.ok("GET", "/api/v1/vm?id=i-1", instance(state="Pulling"), instance(state="Started"))
    ran = covey("vm", "start", "debian", "--wait", 30)
    assert ran.code == 0
    assert ran.out.splitlines()[-1] == "i-1  Started  10.0.0.9:10080->80"


def test_waiting_for_one_that_fails_says_why(templates: Cloud, covey: Covey) -> None:
    templates.ok("POST", "/api/v1/vm", ["i-1"])
    templates.ok("GET", "/api/v1/vm?id=i-1", instance(state="Error", message="no kernel"))
    ran = covey("vm", "start", "debian", "--wait", 30)
    assert (ran.code, ran.err) == (1, "covey: instance i-1 is Error: no kernel\n")


def test_waiting_not_long_enough(templates: Cloud, covey: Covey) -> None:
    templates.ok("POST", "/api/v1/vm", ["i-1"])
    templates.ok("GET", "/api/v1/vm?id=i-1", instance(state="Pulling"))
    ran = covey("vm", "start", "debian", "--wait", 0.1)
    assert (ran.code, ran.err) == (1, "covey: instance i-1 is Pulling: still Pulling after 0 s\n")


def test_the_servers_refusal_is_the_error(templates: Cloud, covey: Covey) -> None:
    templates.fail("POST", "/api/v1/vm", "No such tag v9")
    ran = covey("vm", "start", "debian", "--tag", "v9")
    assert (ran.code, ran.out, ran.err) == (1, "", "covey: No such tag v9\n")


def test_unknown_and_ambiguous_names(cloud: Cloud, covey: Covey) -> None:
    cloud.ok("GET", "/api/v1/registry/vm", [{"id": "a", "name": "twin"}, {"id": "b", "name": "twin"}])
    ran = covey("vm", "start", "nope")
    assert (ran.code, ran.err) == (1, "covey: there is no template nope; `covey template list` shows those there are\n")
    assert "use one of their ids: a, b" in covey("vm", "start", "twin").err


# ---- look ----------------------------------------------------------------------------------------------------------


def test_list_is_one_line_per_instance(cloud: Cloud, covey: Covey) -> None:
    wrapped = {"instance_id": "i-1", "vm": instance()}
    cloud.ok("GET", "/api/v1/vm", [wrapped, {"instance_id": "i-2", "vm": instance("i-2", "Error", message="it broke")}])
    ran = covey("vm", "list")
    header, first, second = ran.out.splitlines()
    assert header.split() == ["INSTANCE", "STATE", "TEMPLATE", "TAG", "NODE", "IP", "PORTS", "MESSAGE"]
    assert first.split()[:2] == ["i-1", "Started"]
    assert second.endswith("it broke")
    assert [one["instance_id"] for one in covey("vm", "list", "--json").json] == ["i-1", "i-2"]


def test_an_empty_list_is_a_header_or_an_empty_array(cloud: Cloud, covey: Covey) -> None:
    cloud.ok("GET", "/api/v1/vm", [])
    assert len(covey("vm", "list").out.splitlines()) == 1
    assert covey("vm", "list", "--json").json == []


EXPLAINED = {
    "instance_id": "i-9",
    "instance_state": "Scheduling",
    "text": "Waiting: all nodes that could take it are full (of 1 node: 1 full)",
    "priority": 1000,
    "turn": 100,
    "position": 5,
    "waiting": 7,
    "competitors": 4,
    "before": ["i-1", "i-2", "i-3", "i-4"],
    "nodes": [{"node_id": "n", "node_name": "mac-1", "verdict": "too_large", "text": "2 of 2 slots are taken"}],
}


def test_a_list_is_filtered_by_the_controller_and_read_page_by_page(cloud: Cloud, covey: Covey) -> None:
    asked = "/api/v1/vm?limit=500&state=Started%2CError&template=debian&external_id=job+7"
    cloud.ok("GET", asked, [{"instance_id": "i-1", "vm": instance("i-1")}])
    cloud.headers[asked] = {"Covey-Cursor": "c-1"}
    cloud.ok("GET", asked + "&cursor=c-1", [{"instance_id": "i-2", "vm": instance("i-2")}])
    ran = covey(
        *("vm", "list", "--state", "Started", "--state", "Error", "--template", "debian", "--external-id", "job 7"),
        "--json",
    )
    assert [one["instance_id"] for one in ran.json] == ["i-1", "i-2"]
    cloud.fail("GET", "/api/v1/node?limit=500&state=Activ", "state: there is no state 'Activ'")
    ran = covey("node", "list", "--state", "Activ")
    assert (ran.code, ran.err) == (1, "covey: state: there is no state 'Activ'\n")


def test_explain(cloud: Cloud, covey: Covey) -> None:
    cloud.ok("GET", "/api/v1/vm/explain?id=i-9", EXPLAINED)
    assert covey("vm", "explain", "i-9").out.splitlines() == [
        "instance  i-9",
        "state     Scheduling",
        "why       Waiting: all nodes that could take it are full (of 1 node: 1 full)",
        "queue     5 of 7 waiting; before it, for the same nodes: 4 (i-1, i-2, i-3, …)",
        "turn      100, by waiting; its priority is 1000",
        "",
        "NODE   VERDICT    BECAUSE",
        "mac-1  too large  2 of 2 slots are taken",
    ]
    assert covey("vm", "explain", "i-9", "--json").json == EXPLAINED


def test_explain_shows_no_queue_to_one_that_has_a_node_and_not_every_node_of_a_thousand(
    cloud: Cloud, covey: Covey
) -> None:
    told = {"instance_id": "i", "instance_state": "Pulling", "text": "Node a pulls the template: 43 %"}
    cloud.ok("GET", "/api/v1/vm/explain?id=i", told)
    assert len(covey("vm", "explain", "i").out.splitlines()) == 3
    cloud.ok("GET", "/api/v1/vm/explain?id=i", {**EXPLAINED, "nodes": EXPLAINED["nodes"] * 1000})  # type: ignore[operator]
    ran = covey("vm", "explain", "i")
    assert len(ran.out.splitlines()) == 57
    assert ran.err == "950 more nodes; --json shows all\n"
    cloud.fail("GET", "/api/v1/vm/explain?id=no", "Not found")
    assert "`covey vm list`" in covey("vm", "explain", "no").err


def test_show(cloud: Cloud, covey: Covey) -> None:
    cloud.ok("GET", "/api/v1/vm?id=i-1", instance(metadata={"a": 1}))
    shown = dict(line.split("  ", 1) for line in covey("vm", "show", "i-1").out.splitlines())
    assert shown["state   ".strip()].strip() == "Started"
    assert covey("vm", "show", "i-1", "--json").json["vminfo"]["port_forwarding"][0]["host_port"] == 10080


def test_show_of_nothing(cloud: Cloud, covey: Covey) -> None:
    cloud.fail("GET", "/api/v1/vm?id=x%26y", "Not found")
    ran = covey("vm", "show", "x&y")
    assert (ran.code, ran.err) == (1, "covey: there is no instance x&y; `covey vm list` shows those there are\n")


RESULT = {"return_code": 3, "stdout": "hello\n", "stderr": "b29wcw=="}
AT = "/api/v1/vm/log?id=i-1&stream={}&offset={}"


def part(text: bytes, offset: int, size: int, *, end: bool = False) -> dict[str, object]:
    return {"data": base64.b64encode(text).decode(), "offset": offset, "size": size, "end": end}


def test_logs_are_plain_text(cloud: Cloud, covey: Covey) -> None:
    cloud.ok("GET", "/api/v1/vm?id=i-1", instance(state="Error", startup_script=RESULT))
    ran = covey("vm", "logs", "i-1")
    assert (ran.code, ran.out, ran.err) == (0, "hello\n", "b29wcw==\nthe script ended with 3\n")
    ran = covey("vm", "logs", "i-1", "--stream", "stdout")
    assert (ran.code, ran.out, ran.err) == (0, "hello\n", "the script ended with 3\n")


def test_logs_of_one_without_a_script(cloud: Cloud, covey: Covey) -> None:
    cloud.ok("GET", "/api/v1/vm?id=i-1", instance())
    cloud.fail("GET", AT.format("stdout", -65536), "the instance has no start script")
    ran = covey("vm", "logs", "i-1")
    assert (ran.code, ran.out, ran.err) == (1, "", "covey: the instance has no start script\n")


def test_all_logs_come_part_by_part_and_what_was_not_kept_is_said(cloud: Cloud, covey: Covey) -> None:
    cloud.ok("GET", "/api/v1/vm?id=i-1", instance(startup_script={**RESULT, "return_code": 0}))
    cloud.ok("GET", AT.format("stdout", 0), part("grün".encode()[:3], 10, 15))
    cloud.ok("GET", AT.format("stdout", 13), part("grün".encode()[3:], 13, 15, end=True))
    cloud.ok("GET", AT.format("stderr", 0), part(b"", 0, 0, end=True))
    ran = covey("vm", "logs", "i-1", "--all")
    assert (ran.code, ran.out) == (0, "grün")
    said = "10 bytes of stdout are left out: only the last 16 MiB are kept\nthe script ended with 0\n"
    assert ran.err == said


def test_following_goes_on_until_the_script_has_ended(cloud: Cloud, covey: Covey) -> None:
    cloud.ok("GET", "/api/v1/vm?id=i-1", instance())
    cloud.ok("GET", AT.format("stdout", 0), part(b"one ", 0, 4))
    cloud.ok("GET", AT.format("stdout", 4), part(b"", 4, 4), part(b"two", 4, 7, end=True))
    ran = covey("vm", "logs", "i-1", "--follow", "--stream", "stdout")
    assert (ran.code, ran.out, ran.err) == (0, "one two", "")
    assert covey("vm", "logs", "i-1", "--follow", "--json").code == 2


def test_when_the_node_does_not_answer_what_the_cloud_keeps_is_shown(cloud: Cloud, covey: Covey) -> None:
    cloud.ok("GET", "/api/v1/vm?id=i-1", instance(startup_script=RESULT))
    cloud.fail("GET", AT.format("stdout", 0), "the node does not answer")
    ran = covey("vm", "logs", "i-1", "--all", "--stream", "stdout")
    assert (ran.code, ran.out, ran.err) == (0, "hello\n", "the node does not answer\nthe script ended with 3\n")


def test_a_busy_node_is_asked_again(cloud: Cloud, covey: Covey) -> None:
    cloud.ok("GET", "/api/v1/vm?id=i-1", instance())
    busy = (503, {"status": "FAIL", "message": "busy"})
    done = (200, {"status": "OK", "message": "", "body": part(b"done", 0, 4, end=True)})
    cloud.answers["GET", AT.format("stdout", 0)] = [busy, done]
    assert covey("vm", "logs", "i-1", "--all", "--stream", "stdout").out == "done"


# ---- terminate -----------------------------------------------------------------------------------------------------


def test_terminate_several_and_say_which_failed(cloud: Cloud, covey: Covey) -> None:
    cloud.answers["DELETE", "/api/v1/vm"] = [
        (200, {"status": "FAIL", "message": "Not found"}),
        (200, {"status": "OK", "message": ""}),
    ]
    ran = covey("vm", "terminate", "i-1", "i-2")
    assert (ran.code, ran.out, ran.err) == (1, "i-2 terminating\n", "covey: i-1: Not found\n")
    assert cloud.bodies("DELETE", "/api/v1/vm") == [{"id": "i-1"}, {"id": "i-2"}]


# ---- nodes and status ----------------------------------------------------------------------------------------------


def test_drain_by_name_and_off(cloud: Cloud, covey: Covey) -> None:
    cloud.ok("GET", "/api/v1/node", [NODE])
    cloud.ok("POST", "/api/v1/node/config", None)
    assert covey("node", "drain", "mac-1").out == "mac-1 takes no new instances; 1 still run there\n"
    assert covey("node", "drain", "n-1", "--off").out == "mac-1 takes new instances again\n"
    assert cloud.bodies("POST", "/api/v1/node/config") == [
        {"node_id": "n-1", "drain_mode": True},
        {"node_id": "n-1", "drain_mode": False},
    ]


def test_unknown_node(cloud: Cloud, covey: Covey) -> None:
    cloud.ok("GET", "/api/v1/node", [NODE])
    ran = covey("node", "show", "mac-9")
    assert (ran.code, ran.err) == (1, "covey: there is no node mac-9; `covey node list` shows those there are\n")


# ---- how commands end ----------------------------------------------------------------------------------------------


def test_nobody_there(covey: Covey) -> None:
    ran = covey("vm", "list", "--controller", "http://127.0.0.1:9")
    assert ran.code == 1
    assert ran.err.startswith("covey: http://127.0.0.1:9: cannot connect")
    assert ran.err.endswith("is it running? Name another with --controller or --registry\n")
    assert ran.err.count("\n") == 1


@pytest.mark.parametrize(
    "argv",
    [
        ("vm", "strat"),
        ("vm", "start"),
        ("vm", "start", "t", "--count", "many"),
        ("vm", "list", "--nonsense"),
        ("node", "drain"),
        ("nonsense",),
        ("up", "--nodes", "-1"),
    ],
)
def test_wrong_usage_is_2_and_one_line(covey: Covey, argv: tuple[str, ...]) -> None:
    ran = covey(*argv)
    assert (ran.code, ran.out) == (2, "")
    assert ran.err.count("\n") == 1


def test_a_malformed_url(covey: Covey) -> None:
    ran = covey("vm", "list", "--controller", "http://a b")
    assert (ran.code, ran.err.count("\n")) == (1, 1)
    assert "--controller" in ran.err


def test_the_second_controller_answers_when_the_first_is_dead(cloud: Cloud, covey: Covey) -> None:
    cloud.ok("GET", "/api/v1/vm", [])
    assert covey("vm", "list", "--json", "--controller", f"http://127.0.0.1:9,{cloud.url}").json == []
