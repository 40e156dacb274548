"""Clients that look at /readyz as a balancer does, keep their connections, and repeat nothing: whatever a controller
does wrong, a request that is cut off, refused or answered 503, is counted. The rate is offered, whatever becomes of the
requests: a client that had to wait for an answer makes up for it.

    with clients.asking(cloud.urls, cloud.template) as load:
        ...                                   # trouble
    assert load.failures == []
"""

import collections
import contextlib
import dataclasses
import http.client
import json
import select
import threading
import time
import urllib.parse
from collections.abc import Iterator

from tests.cluster import conftest

CLIENTS = 8
RATE_EACH = 5.0  # 40 requests a second
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

    def __init__(
        self, number: int, balancer: Balancer, template: str, ending: threading.Event, start_each: int
    ) -> None:
        super().__init__()
        self._start_each = start_each
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
        due = time.monotonic() + self._number / (CLIENTS * RATE_EACH)
        while not self._ending.wait(max(0.0, due - time.monotonic())):
            turn, due = turn + 1, due + 1 / RATE_EACH
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
            connection = self._kept[url] = http.client.HTTPConnection(where.hostname or "", where.port, timeout=60)
        starts = turn % self._start_each == 0
        if starts:
            body = json.dumps({"vmid": self._template, "name": f"{self._number}-{turn}"})
            connection.request("POST", "/api/v1/vm", body)
        else:
            connection.request("GET", "/api/v1/node")
        answer = connection.getresponse()
        said = json.loads(answer.read())
        if answer.status != 200 or said["status"] != "OK":
            raise ValueError(f"{answer.status} {said}")
        if starts:
            self.started += said["body"]


def _closed(connection: http.client.HTTPConnection) -> bool:
    """Whether the server has closed it while it was idle: pools look before they use one again."""
    return connection.sock is not None and bool(select.select([connection.sock], [], [], 0)[0])


@dataclasses.dataclass
class Load:
    """What the clients saw; whole once the load has ended."""

    balancer: Balancer
    clients: list[Client]

    @property
    def failures(self) -> list[str]:
        return [failure for client in self.clients for failure in client.failures]

    @property
    def started(self) -> list[str]:
        """The instances whose start was answered, in the order of each client."""
        return [id for client in self.clients for id in client.started]

    @property
    def served(self) -> collections.Counter[str]:
        """Requests answered, by controller."""
        return sum((client.served for client in self.clients), collections.Counter[str]())


@contextlib.contextmanager
def asking(urls: list[str], template: str, *, start_each: int = 2) -> Iterator[Load]:
    """The load runs while the context is open; every so many requests of a client one starts an instance."""
    ending = threading.Event()
    balancer = Balancer(urls, ending)
    load = Load(balancer, [Client(number, balancer, template, ending, start_each) for number in range(CLIENTS)])
    threads = (balancer, *load.clients)
    for thread in threads:
        thread.start()
    try:
        yield load
    finally:
        ending.set()
        for thread in threads:
            thread.join()
