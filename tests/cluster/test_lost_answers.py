"""A controller dies between what it has done and what it would have answered; the request is sent again elsewhere."""

import http.client
import signal
from collections.abc import Iterator
from typing import Any

import pytest

from tests.cluster import conftest, fleet
from tests.support import etcd

ACCEPTED, COMMITTED = "controller.start.accepted", "controller.start.committed"
TERMINATED = "controller.terminate.committed"


@pytest.fixture(scope="module")
def cloud(tmp_path_factory: pytest.TempPathFactory) -> Iterator[fleet.Fleet]:
    """With one controller that lives, and for each test one that dies."""
    with fleet.running(tmp_path_factory.mktemp("fleet"), controllers=1, members=1) as one:
        yield one


@pytest.fixture(autouse=True)
def afterwards(cloud: fleet.Fleet) -> Iterator[None]:
    yield
    cloud.clear()


def lose_answer(
    cloud: fleet.Fleet, point: str, method: str, body: dict[str, Any], headers: dict[str, str] | None = None
) -> None:
    """Send it to another controller, which dies at `point`."""
    usual = cloud.controllers[0]
    where = f"127.0.0.1:{etcd.free_port()}"
    argv = ("controller", "--listen-addr", where, *usual.argv[3:])
    doomed = fleet.Controller(argv, {**usual.env, "COVEY_FAILPOINTS": f"{point}=kill"}, url=f"http://{where}")
    doomed.start()
    try:
        conftest.eventually(doomed.ready)
        with pytest.raises((OSError, http.client.HTTPException)):
            conftest.ask(f"{doomed.url}/api/v1/vm", method, body, headers)
        assert doomed.running.process.wait(60) == -signal.SIGKILL
    finally:
        doomed.kill()


def again(cloud: fleet.Fleet, body: dict[str, Any], headers: dict[str, str] | None = None) -> Any:
    return cloud.ask("POST", "/api/v1/vm", body, headers=headers)


@pytest.mark.parametrize("point", [ACCEPTED, COMMITTED])
def test_a_start_with_a_key_happens_once_wherever_it_is_sent_again(cloud: fleet.Fleet, point: str) -> None:
    """Safety S17."""
    headers = {"Idempotency-Key": f"key at {point}"}
    body = {"vmid": cloud.template, "count": 3}
    lose_answer(cloud, point, "POST", body, headers)
    answers = [again(cloud, body, headers) for _ in range(3)]
    assert answers[0]["status"] == "OK"
    assert answers == [answers[0]] * 3
    assert sorted(cloud.states()) == sorted(answers[0]["body"])
    other = again(cloud, {**body, "count": 2}, headers)
    assert (other["status"], other["message"]) == ("FAIL", "Idempotency-Key was used for another request")


@pytest.mark.parametrize("point", [ACCEPTED, COMMITTED])
def test_a_start_of_a_ci_node_happens_once_by_its_names(cloud: fleet.Fleet, point: str) -> None:
    body = {"vmid": cloud.template, "external_id": "http://ci/computer/a", "name": "a"}
    lose_answer(cloud, point, "POST", body)
    (id,) = again(cloud, body)["body"]
    assert again(cloud, body)["body"] == [id]
    assert list(cloud.states()) == [id]
    cloud.terminate(id)
    assert again(cloud, body)["body"] != [id], "what has ended is of no use to a new build"


def test_a_terminate_is_done_once_and_said_again(cloud: fleet.Fleet) -> None:
    (id,) = cloud.start()
    lose_answer(cloud, TERMINATED, "DELETE", {"id": id})
    cloud.terminate(id)
    assert cloud.state(id) in ("Terminated", "")
    assert [event["what"] for event in cloud.events("terminated", id)] == ["terminated"]


def test_a_start_without_key_and_names_may_have_happened_and_is_there_to_be_seen(cloud: fleet.Fleet) -> None:
    """Promise I9: nobody can know; the caller finds it in the list."""
    lose_answer(cloud, COMMITTED, "POST", {"vmid": cloud.template, "name": "who knows"})
    (found,) = cloud.ask("GET", "/api/v1/vm")["body"]
    assert found["name"] == "who knows"
