"""`covey status`: what it says, and that its exit code says whether there is trouble."""

from typing import Any

from tests.unit.cli import conftest

Cloud = conftest.Cloud
Covey = conftest.Covey

TROUBLE = {"kind": "etcd-member", "about": "m2", "text": "etcd member m2 does not answer", "remedy": "start it"}
MEMBER = {"answers": True, "knows_leader": True, "version": "3.5.16", "size_bytes": 3 << 20, "used_bytes": 1 << 20}


def health(**changes: Any) -> dict[str, Any]:
    values = {
        "version": "0.2.0",
        "controllers": [{"id": "c-1", "url": "http://10.0.0.1:8090", "version": "0.2.0", "me": True}],
        "etcd": [
            {"name": "m1", "address": "e1:2379", "leads": True, **MEMBER},
            {"name": "m2", "address": "e2:2379", "revisions_behind": 3, **MEMBER},
        ],
        "registries": [
            {"url": "http://r", "answers": True, "version": "0.2.0", "total_bytes": 4 << 30, "free_bytes": 1 << 30}
        ],
        "nodes": {"Active": 2, "Offline": 1},
        "agents": {"0.2.0": 3},
        "tightest": [{"id": "n", "name": "mac-1", "disk_bytes": 4 << 30, "free_disk_bytes": 1 << 30}],
        "instances": {"Started": 3},
        "copy": {"revision": 1234567},
    }
    return {**values, **changes}


def test_all_is_well(cloud: Cloud, covey: Covey) -> None:
    cloud.ok("GET", "/readyz", None)
    cloud.ok("GET", "/api/v1/health", health())
    ran = covey("status")
    assert (ran.code, ran.err) == (0, "")
    assert ran.out.splitlines() == [
        f"controller  {cloud.url}  ready  0.2.0",
        "controller  http://10.0.0.1:8090  announced  0.2.0",
        "etcd        2 of 2 members answer, m1 leads, at most 3 revisions behind, 3.0 MiB on disk, 1.0 MiB in use, "
        "3.5.16",
        "registry    http://r  0.2.0, 1.0 GiB of 4.0 GiB free",
        "nodes       2 Active, 1 Offline",
        "disks       least room: mac-1 1.0 GiB of 4.0 GiB free",
        "instances   3 Started",
        "queue       empty",
        "store       revision 1,234,567, copy up to date, 0 unsure writes",
        "agents      3 of 0.2.0",
        "troubles    none",
    ]


def test_each_trouble_is_one_line_with_its_remedy_and_the_exit_code_says_so(cloud: Cloud, covey: Covey) -> None:
    cloud.ok("GET", "/readyz", None)
    queue = {"waiting": 2, "instance": "i-1", "template": "mac", "waits_s": 40, "why": "Waiting: no node is there"}
    cloud.ok("GET", "/api/v1/health", health(troubles=[TROUBLE], queue=queue, alarms=["NOSPACE"]))
    ran = covey("status", "--controller", f"http://127.0.0.1:9,{cloud.url}")
    assert ran.code == 1
    assert "queue       2 waiting; i-1 (mac) longest, for 40 s: no node is there\n" in ran.out
    assert "alarms: NOSPACE" in ran.out
    told = [line for line in ran.out.splitlines() if line.startswith("TROUBLE")]
    assert told[0].startswith("TROUBLE     controller http://127.0.0.1:9 does not answer (cannot connect")
    assert told[0].endswith("->  start it (covey controller); the others serve meanwhile")
    assert told[1:] == ["TROUBLE     etcd member m2 does not answer  ->  start it"]
    shown = covey("status", "--json", "--controller", f"http://127.0.0.1:9,{cloud.url}")
    assert shown.code == 1
    assert [one["kind"] for one in shown.json["health"]["troubles"]] == ["controller-silent", "etcd-member"]
    assert shown.json["reached"][cloud.url] == "ready"


def test_a_red_controller_tells_what_it_knows(cloud: Cloud, covey: Covey) -> None:
    cloud.fail("GET", "/readyz", "the store does not answer", status=503)
    red = {"kind": "controller-red", "about": "", "text": "this controller cannot serve", "remedy": "mend etcd"}
    cloud.ok("GET", "/api/v1/health", health(why="the store does not answer", troubles=[red]))
    ran = covey("status")
    assert ran.code == 1
    assert f"controller  {cloud.url}  the store does not answer  0.2.0\n" in ran.out
    assert ran.out.endswith("TROUBLE     this controller cannot serve  ->  mend etcd\n")


def test_no_controller_at_all_is_one_clear_sentence(covey: Covey) -> None:
    ran = covey("status", "--controller", "http://127.0.0.1:9,http://127.0.0.1:10")
    assert (ran.code, ran.out) == (1, "")
    assert ran.err.count("\n") == 1
    assert ran.err.startswith("covey: no controller answers: http://127.0.0.1:9: cannot connect (Connection refused); ")
    assert "is it running?" in ran.err


def test_a_controller_that_is_older_than_health(cloud: Cloud, covey: Covey) -> None:
    cloud.ok("GET", "/readyz", None)
    ran = covey("status")
    assert (ran.code, ran.out) == (1, "")
    assert "does not tell its health" in ran.err
