"""What the shipped balancers do with single requests, seen from the server's side."""

import contextlib
import json
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import pytest

from tests.support import balancers, lab_cloud, netlab, upstream

KEY = {"Idempotency-Key": "once"}
_JUDGED = 3  # when so many checks more were seen, the balancer has heard the answers to two of them


class Stage(NamedTuple):
    """A balancer before three pretended controllers and one registry."""

    which: str
    cloud: lab_cloud.Cloud
    url: str
    controllers: list[upstream.Upstream]
    registry: upstream.Upstream

    def ask(self, method: str, path: str, **headers: str) -> lab_cloud.Answer:
        body = {"x": 1} if method == "POST" else None
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        return self.cloud.ask(self.url + path, method, body, headers=named, timeout_s=30)

    def times_seen(self, path: str) -> list[int]:
        """How often each controller saw a request for `path`."""
        return [sum(request.path == path for request in each.seen) for each in self.controllers]


@pytest.fixture(scope="module", params=["haproxy", "nginx"])
def stage(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    hosts = ["c1", "c2", "c3", "r1"]
    with netlab.Lab([*hosts, "lb", "load"]) as lab, contextlib.ExitStack() as stack:
        cloud = lab_cloud.Cloud(lab, tmp_path_factory.mktemp("stage"))
        servers = [stack.enter_context(upstream.running(lab[host], 8089 if host == "r1" else 8090)) for host in hosts]
        for host in hosts:
            port, kind = (8089, cloud.registries) if host == "r1" else (8090, cloud.controllers)
            kind.append(cloud.program(host, host, [], f"http://{lab[host].ip}:{port}"))
        run: Callable[[lab_cloud.Cloud, str], lab_cloud.Program] = getattr(balancers, request.param)
        yield Stage(request.param, cloud, run(cloud, "lb").url, servers[:3], servers[3])


def test_a_post_is_repeated_only_with_a_key(stage: Stage) -> None:
    """Each server takes the request and goes away: whoever repeats it may do it twice."""
    for server in stage.controllers:
        server.break_off |= {"/api/v1/vm?keyless", "/api/v1/vm?keyed", "/api/v1/node"}
    keyless = stage.ask("POST", "/api/v1/vm?keyless")
    assert keyless.status == 502
    assert "may have been carried out" in keyless.body["message"]
    assert sum(stage.times_seen("/api/v1/vm?keyless")) == 1

    assert stage.ask("POST", "/api/v1/vm?keyed", **KEY).status == 502
    assert stage.times_seen("/api/v1/vm?keyed") == [1, 1, 1]

    assert stage.ask("GET", "/api/v1/node").status == 502
    assert stage.times_seen("/api/v1/node") == [1, 1, 1]


def test_what_was_refused_with_503_goes_to_another_one(stage: Stage) -> None:
    """A POST without a key would be safe too, because 503 says that nothing was done; but its sender decides that."""
    for server in stage.controllers[1:]:
        server.answer_503.add("/api/v1/vm?busy")
    assert stage.ask("GET", "/api/v1/vm?busy").status == 200
    assert stage.ask("POST", "/api/v1/vm?busy", **KEY).status == 200
    stage.controllers[0].answer_503.add("/api/v1/vm?busy")
    before = sum(stage.times_seen("/api/v1/vm?busy"))
    assert stage.ask("POST", "/api/v1/vm?busy").status == 503
    assert sum(stage.times_seen("/api/v1/vm?busy")) == before + 1


@pytest.fixture(autouse=True)
def all_take_part(stage: Stage) -> None:
    """nginx leaves a server alone that failed three times, for 2 s: tests shall not see each other's failures."""
    if stage.which == "nginx":
        time.sleep(2.1)


def test_the_client_is_named(stage: Stage) -> None:
    assert stage.ask("GET", "/api/v1/status?who").status == 200
    assert stage.ask("POST", "/agent/v1/report?who").status == 200
    seen = [request for server in stage.controllers for request in server.seen if request.path.endswith("?who")]
    load = stage.cloud.lab["load"].ip
    assert [request.headers["x-forwarded-for"] for request in seen] == [load, load]
    assert not any("cookie" in request.headers for request in seen)


def test_nobody_is_bound_to_a_server(stage: Stage) -> None:
    for _ in range(12):
        stage.ask("GET", "/api/v1/status?spread")
    assert all(stage.times_seen("/api/v1/status?spread"))


def test_an_upload_is_passed_on_as_it_comes(stage: Stage) -> None:
    """The first half is with the registry while the client still holds the second."""
    half = b"x" * 500_000
    before = stage.registry.body_bytes
    with upstream.connected(stage.cloud.lab["load"], stage.cloud.lab["lb"].ip, 8089) as client:
        path = "/v2/templates/x/blobs/uploads/1"
        client.sendall(f"PATCH {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {2 * len(half)}\r\n\r\n".encode() + half)
        stage.cloud.until(lambda: stage.registry.body_bytes - before >= len(half), what="the first half is there")
        client.sendall(half)
        assert client.recv(100).startswith(b"HTTP/1.1 200")
    assert stage.registry.body_bytes - before == 2 * len(half)


def test_polls_may_park_for_longer_than_a_request_may_take(stage: Stage) -> None:
    """Both at once: it takes as long as the longest."""
    limit_s = 11.0 if stage.which == "haproxy" else 3.0
    for server in stage.controllers:
        server.answer_after_s |= {"/agent/v1/wanted": limit_s + 1.5, "/api/v1/slow": limit_s * 2}
    load = stage.cloud.lab["load"]
    body = json.dumps({"x": 1})
    head = f"HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n{body}"
    with (
        upstream.connected(load, stage.cloud.lab["lb"].ip, 8090) as parked,
        upstream.connected(load, stage.cloud.lab["lb"].ip, 8090) as slow,
    ):
        parked.sendall(f"POST /agent/v1/wanted {head}".encode())
        slow.sendall(f"POST /api/v1/slow {head}".encode())
        begun = time.monotonic()
        assert slow.recv(100).startswith(b"HTTP/1.1 504")
        assert time.monotonic() - begun > limit_s - 0.2
        assert parked.recv(100).startswith(b"HTTP/1.1 200")
        assert time.monotonic() - begun > limit_s + 1.4


def test_a_red_server_gets_nothing_new_and_finishes_what_it_has(stage: Stage) -> None:
    """nginx of the open-source kind asks nobody for /readyz, so it goes on sending: what README.md says of it."""
    red = stage.controllers[0]
    for server in stage.controllers:
        server.answer_after_s["/api/v1/long"] = 1.5
    load = stage.cloud.lab["load"]
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(upstream.connected(load, stage.cloud.lab["lb"].ip, 8090)) for _ in range(6)]
        for client in clients:
            client.sendall(b"GET /api/v1/long HTTP/1.1\r\nHost: x\r\n\r\n")
        stage.cloud.until(lambda: sum(stage.times_seen("/api/v1/long")) == 6)
        red.ready = False
        if stage.which == "haproxy":
            checks = red.checks
            stage.cloud.until(lambda: red.checks >= checks + _JUDGED)
        before = stage.times_seen("/api/v1/status?late")[0]
        for _ in range(12):
            assert stage.ask("GET", "/api/v1/status?late").status == 200
        after = stage.times_seen("/api/v1/status?late")[0]
        assert (after == before) == (stage.which == "haproxy")
        assert [client.recv(12) for client in clients] == [b"HTTP/1.1 200"] * 6
    red.ready = True
    if stage.which == "haproxy":
        before = red.checks
        stage.cloud.until(lambda: red.checks >= before + _JUDGED)
        for _ in range(6):
            stage.ask("GET", "/api/v1/status?back")
        assert stage.times_seen("/api/v1/status?back")[0]


def test_when_no_server_is_well_all_are_tried(stage: Stage) -> None:
    """Checks that fail because all servers are slow must not make an outage of it."""
    for server in stage.controllers:
        server.ready = False
    checks = [server.checks for server in stage.controllers]
    if stage.which == "haproxy":
        stage.cloud.until(
            lambda: all(s.checks >= before + _JUDGED for s, before in zip(stage.controllers, checks, strict=True))
        )
    for _ in range(6):
        assert stage.ask("GET", "/api/v1/status?all").status == 200
        assert stage.ask("POST", "/api/v1/vm?all").status == 200
    assert all(stage.times_seen("/api/v1/status?all"))
    for server in stage.controllers:
        server.ready = True


def test_without_any_answer_the_balancer_speaks_in_the_api_s_words(stage: Stage) -> None:
    for server in stage.controllers:
        server.break_off.add("/api/v1/status?none")
    answer = stage.ask("GET", "/api/v1/status?none")
    assert answer.status == 502
    assert answer.body["status"] == "FAIL"
