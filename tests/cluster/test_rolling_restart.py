"""Controllers are restarted one after the other under load, and no request fails.

The clients look at /readyz as a balancer does, keep their connections, and repeat nothing: whatever a controller does
wrong while it goes down, a request that is cut off, refused or answered 503, is counted.
"""

import collections
import http.client
import json
import select
import threading
import time
import urllib.parse
from pathlib import Path

import pytest

from tests.cluster import conftest, fleet

CLIENTS = 8
RATE_EACH = 5.0  # 40 requests a second
RESTARTS = 5
LOOK_S = 0.1  # how often /readyz is asked


class Balancer(threading.Thread):
    """Which controllers are ready, as last seen."""

    def __init__(self, urls: list[str], ending: threading.Event) -> None:
        super().__init__()
        self._urls = urls
        self._ending = ending
        self.ready = list(urls)

    def run(self) -> None:
        while not self._ending.wait(LOOK_S):
            self.ready = [url for url in self._urls if self._is_ready(url)]

    def _is_ready(self, url: str) -> bool:
        try:
            return conftest.ask(f"{url}/readyz")[0] == 200
        except OSError:
            return False


class Client(threading.Thread):
    """So many requests a second on kept connections, by turns over the controllers that are ready. No repeats."""

    def __init__(self, number: int, balancer: Balancer, template: str, ending: threading.Event) -> None:
        super().__init__()
        self._number = number
        self._balancer = balancer
        self._template = template
        self._ending = ending
        self._kept: dict[str, http.client.HTTPConnection] = {}
        self.started: list[str] = []
        self.failures: list[str] = []
        self.served: collections.Counter[str] = collections.Counter()

    def run(self) -> None:
        turn = self._number
        while not self._ending.wait(1 / RATE_EACH):
            turn += 1
            ready = self._balancer.ready
            url = ready[turn % len(ready)] if ready else "nobody"
            try:
                self._ask(url, turn)
                self.served[url] += 1
            except (OSError, http.client.HTTPException, ValueError, KeyError) as error:
                self.failures.append(f"{time.monotonic():.2f} {url} {error!r}")
                self._forget(url)
        for url in list(self._kept):
            self._forget(url)

    def _forget(self, url: str) -> None:
        connection = self._kept.pop(url, None)
        if connection is not None:
            connection.close()

    def _ask(self, url: str, turn: int) -> None:
        connection = self._kept.get(url)
        if connection is None or _closed(connection):
            self._forget(url)
            where = urllib.parse.urlsplit(url)
            connection = self._kept[url] = http.client.HTTPConnection(where.hostname or "", where.port, timeout=10)
        if turn % 2:
            body = json.dumps({"vmid": self._template, "name": f"{self._number}-{turn}"})
            connection.request("POST", "/api/v1/vm", body)
        else:
            connection.request("GET", "/api/v1/node")
        answer = connection.getresponse()
        said = json.loads(answer.read())
        if answer.status != 200 or said["status"] != "OK":
            raise ValueError(f"{answer.status} {said}")
        if turn % 2:
            self.started += said["body"]


def _closed(connection: http.client.HTTPConnection) -> bool:
    """Whether the server has closed it while it was idle: pools look before they use one again."""
    return connection.sock is not None and bool(select.select([connection.sock], [], [], 0)[0])


@pytest.mark.timeout(300)
def test_no_request_fails_while_controllers_are_restarted_one_after_the_other(tmp_path: Path) -> None:
    with fleet.running(tmp_path, controllers=2, members=1, COVEY_SHUTDOWN_DELAY="1s") as cloud:
        node = cloud.node("alpha")
        ending = threading.Event()
        balancer = Balancer(cloud.urls, ending)
        clients = [Client(number, balancer, cloud.template, ending) for number in range(CLIENTS)]
        for thread in (balancer, *clients):
            thread.start()
        try:
            for restart in range(RESTARTS):
                going = cloud.controllers[restart % 2]
                code = going.running.end()
                assert code == 0, going.running.err
                going.program = None
                going.start()
                conftest.eventually(lambda url=going.url: url in balancer.ready)  # type: ignore[misc]
                assert node.id in {one["node_id"] for one in cloud.ask("GET", "/api/v1/node")["body"]}
        finally:
            ending.set()
            for thread in (balancer, *clients):
                thread.join()
        assert [failure for client in clients for failure in client.failures] == []
        served = sum((client.served for client in clients), collections.Counter[str]())
        assert min(served[url] for url in cloud.urls) > 20, served
        started = [id for client in clients for id in client.started]
        assert set(started) <= set(cloud.states()), "a start that was answered is gone"
        assert len(set(started)) == len(started) == len(cloud.states())
        assert cloud.shown(node)["state"] == "Active"
