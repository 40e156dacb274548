"""`covey upgrade`: what blocks, in one line each, and the exit code."""

from typing import Any

from tests.unit.cli import conftest

Cloud = conftest.Cloud
Covey = conftest.Covey

PROGRAM = {"id": "c-1", "url": "http://one:8090", "version": "0.3.0", "format": 2}
BLOCKER = "controller c-2 (version 0.2.0) writes format 1 at most: upgrade it, or stop it"


def upgrade(**changes: Any) -> dict[str, Any]:
    values = {"format": 1, "target": 2, "may_finish": False, "blockers": [], "notes": [], "controllers": [PROGRAM]}
    return {**values, **changes}


def test_what_blocks_is_said_line_by_line(cloud: Cloud, covey: Covey) -> None:
    cloud.ok("GET", "/api/v1/upgrade", upgrade(blockers=[BLOCKER], notes=["agents: none (any version may stay)"]))
    ran = covey("upgrade", "check")
    assert ran.code == 1
    lines = ran.out.splitlines()
    assert lines[0] == "The store has format 1"
    assert "http://one:8090" in ran.out
    assert lines[-1] == f"BLOCKED: {BLOCKER}"
    assert covey("upgrade", "check", "--json").json["blockers"] == [BLOCKER]


def test_nothing_blocks(cloud: Cloud, covey: Covey) -> None:
    cloud.ok("GET", "/api/v1/upgrade", upgrade(may_finish=True))
    ran = covey("upgrade", "check")
    assert ran.code == 0
    assert "`covey upgrade finish` raises it; there is no way back." in ran.out


def test_finish_raises_it_or_says_why_not(cloud: Cloud, covey: Covey) -> None:
    cloud.ok("POST", "/api/v1/upgrade", upgrade(format=2))
    ran = covey("upgrade", "finish", "--format", "2")
    assert (ran.code, ran.out.splitlines()[0]) == (0, "The store has format 2")
    assert cloud.bodies("POST", "/api/v1/upgrade") == [{"format": 2}]
    cloud.fail("POST", "/api/v1/upgrade", BLOCKER)
    ran = covey("upgrade", "finish")
    assert ran.code == 1
    assert BLOCKER in ran.err
