"""Which server a client uses: even over many clients, away from what fails or is slow, and back again in good order."""

import collections
import itertools
from collections.abc import Callable, Sequence

import pytest

from covey.client import balance

A, B, C, D = "http://a", "http://b", "http://c", "http://d"
SERVERS = (A, B, C)
BACK_S = balance.PAUSE_LIMIT_S + balance.SETTLE_LIMIT_S  # from a server's return until all use it who like it best


def one(*urls: str, learnt: Sequence[str] = ()) -> balance.Balance:
    return balance.Balance(urls or SERVERS, learnt)


class Crowd:
    """Many clients, each asking once a second, and servers that are there or not."""

    def __init__(self, count: int, servers: Sequence[str] = SERVERS) -> None:
        self.clients = [balance.Balance(servers, salt=f"client {number}") for number in range(count)]
        self.away: set[str] = set()
        self.now_s = 1000.0
        self.most_moves = 0  # of clients, to one server within one second
        self._where = [client.order(self.now_s)[0] for client in self.clients]

    def run(self, seconds: float) -> None:
        for _ in range(int(seconds)):
            self.now_s += 1.0
            moved: collections.Counter[str] = collections.Counter()
            for number, client in enumerate(self.clients):
                for url in client.due(self.now_s):
                    client.looked(url, self.now_s, None if url in self.away else 0.01)
                before, self._where[number] = self._where[number], self._ask(client)
                moved[self._where[number]] += before != self._where[number]
            self.most_moves = max(self.most_moves, *moved.values())

    def _ask(self, client: balance.Balance) -> str:
        for url in client.order(self.now_s):
            if url not in self.away:
                client.answered(url, self.now_s, 0.01)
                return url
            client.failed(url, self.now_s)
        raise AssertionError("every server is away")

    def load(self) -> dict[str, int]:
        return dict(collections.Counter(self._where))


def even(load: dict[str, int], servers: Sequence[str], count: int) -> bool:
    share = count / len(servers)
    return set(load) == set(servers) and all(0.75 * share < number < 1.25 * share for number in load.values())


def test_clients_spread_over_the_servers() -> None:
    crowd = Crowd(300)
    crowd.run(5)
    assert even(crowd.load(), SERVERS, 300), crowd.load()


def test_after_an_outage_the_load_is_even_again_and_nobody_stampedes() -> None:
    crowd = Crowd(300)
    crowd.run(5)
    before = crowd.load()
    crowd.away = {B}
    crowd.run(1)
    assert even(crowd.load(), (A, C), 300), crowd.load()
    crowd.run(60)
    crowd.away = set()
    crowd.most_moves = 0
    crowd.run(BACK_S)
    assert crowd.load() == before
    assert crowd.most_moves <= 20  # of the hundred that return


def test_a_server_that_comes_and_goes_is_left_alone_for_longer_until_that_is_forgiven() -> None:
    mine, now_s = one(), 0.0
    for well_s, pause_s in ((100.0, 1.0), (1.0, 2.0), (1.0, 4.0), (balance.FORGIVEN_S + 1, 1.0)):
        now_s += well_s
        mine.failed(A, now_s)
        assert mine.due(now_s + pause_s / 2 - 0.1) == []
        assert mine.due(now_s + pause_s) == [A]
        now_s += pause_s
        mine.looked(A, now_s, 0.01)


def test_an_added_server_gets_its_share_without_a_stampede() -> None:
    crowd = Crowd(300)
    crowd.run(5)
    for client in crowd.clients:
        client.learn((*SERVERS, D))
    crowd.run(BACK_S)
    assert even(crowd.load(), (*SERVERS, D), 300), crowd.load()
    assert crowd.most_moves <= 20


def test_a_client_is_true_to_its_server() -> None:
    crowd = Crowd(50)
    crowd.run(5)
    crowd.most_moves = 0
    crowd.run(600)
    assert crowd.most_moves == 0


def test_what_failed_is_looked_at_after_a_pause_that_grows_up_to_a_limit() -> None:
    mine, now_s, pauses = one(), 0.0, []
    for _ in range(8):
        mine.failed(A, now_s)
        failed_s = now_s
        while not mine.due(now_s):
            now_s += 0.05
        pauses.append(now_s - failed_s)
        mine.looked(A, now_s, None)  # is the next failure
    assert pauses[0] <= balance.PAUSE_S + 0.1
    assert balance.PAUSE_LIMIT_S / 2 <= pauses[-1] <= balance.PAUSE_LIMIT_S + 0.1


def test_failures_of_one_moment_count_once() -> None:
    mine = one()
    for _ in range(5):
        mine.failed(A, 0.0)
    assert mine.due(balance.PAUSE_S) == [A]


def test_a_look_is_asked_for_once_until_its_outcome_is_known() -> None:
    mine = one()
    mine.failed(A, 0.0)
    assert mine.due(2.0) == [A]
    assert mine.due(3.0) == []
    mine.looked(A, 3.0, 0.01)
    assert mine.due(30.0) == []


def test_a_recovered_server_is_used_at_once_when_no_other_is_well() -> None:
    mine = one()
    for url in SERVERS:
        mine.failed(url, 0.0)
    mine.answered(C, 1.0, 0.01)
    assert mine.order(1.0)[0] == C


def test_with_nothing_well_the_one_that_failed_least_is_tried_first() -> None:
    mine = one()
    mine.failed(A, 0.0)
    mine.failed(A, 5.0)
    for url in (B, C):
        mine.failed(url, 5.0)
    assert mine.order(5.0) == [B, C, A]


def slow_store(_: str) -> float:
    return 0.9


def slow_a(url: str) -> float:
    return 0.9 if url == A else 0.01


@pytest.mark.parametrize(
    ("took_s", "used"), [(slow_store, A), (slow_a, B)], ids=["all are slow", "one is clearly slower"]
)
def test_a_clearly_slower_server_is_left(took_s: Callable[[str], float], used: str) -> None:
    mine = one()
    places = _asking(mine, took_s, 0.0, 120)
    assert places[-1] == used
    assert sum(before != after for before, after in itertools.pairwise(places)) <= 1


def test_a_server_that_is_quick_again_is_used_again() -> None:
    mine = one()
    _asking(mine, slow_a, 0.0, 60)
    places = _asking(mine, lambda _: 0.01, 60.0, int(BACK_S) + 10)
    assert places[-1] == A


def _asking(mine: balance.Balance, took_s: Callable[[str], float], now_s: float, seconds: int) -> list[str]:
    """Ask once a second; where."""
    places = []
    for second in range(seconds):
        for url in mine.due(now_s + second):
            mine.looked(url, now_s + second, took_s(url) / 10)  # a look is a smaller thing than a call
        places.append(mine.order(now_s + second)[0])
        mine.answered(places[-1], now_s + second, took_s(places[-1]))
    return places


def test_servers_that_the_cloud_names_come_before_those_that_were_given() -> None:
    mine = balance.Balance([A], [B, C])
    assert mine.order(0.0) == [B, C, A]
    mine.failed(B, 0.0)
    mine.failed(C, 0.0)
    assert mine.order(0.0)[0] == A


def test_a_server_that_was_just_named_proves_itself_before_it_is_used() -> None:
    mine = one(A)
    mine.learn([B])
    assert mine.order(0.0) == [A, B]
    assert mine.due(0.0) == [B]
    mine.looked(B, 0.0, 0.01)
    assert mine.order(balance.SETTLE_LIMIT_S) == [B, A]


def test_a_server_that_is_no_longer_named_is_forgotten_and_a_given_one_is_not() -> None:
    mine = balance.Balance([A], [A, B])
    mine.learn([C])
    assert set(mine.urls) == {A, C}
    mine.failed(B, 0.0)  # a call that was under way
    mine.answered(B, 0.0, 0.1)
    assert set(mine.urls) == {A, C}


def test_the_wish_to_be_left_alone_counts_when_all_have_it() -> None:
    mine = one()
    mine.busy(A, 0.0, 2.0)
    mine.busy(B, 0.0, 1.0)
    assert mine.busy_for_s(0.0) == 0.0
    mine.busy(C, 0.0, 100.0)
    assert mine.busy_for_s(0.0) == 1.0
    mine.answered(B, 0.5, 0.1)
    assert mine.busy_for_s(0.5) == 0.0


def test_second_copies_are_few_in_the_long_run() -> None:
    mine, copies = one(), 0
    for _ in range(1000):
        mine.answered(A, 0.0, 0.01)
        copies += mine.take_copy()
    assert 100 <= copies <= 104


def _look_at_all(clients: Sequence[balance.Balance], now_s: float, took_s: Callable[[str], float | None]) -> None:
    for client in clients:
        for url in client.due(now_s):
            client.looked(url, now_s, took_s(url))


def test_where_much_is_moved_clients_spread_over_the_near_servers() -> None:
    clients = [balance.Balance(SERVERS, salt=f"client {number}", near=True) for number in range(300)]
    _look_at_all(clients, 10.0, lambda url: 0.03 if url == C else 0.001)
    used = collections.Counter(client.order(11.0)[0] for client in clients)
    assert set(used) == {A, B}
    assert min(used.values()) > 100
    for client in clients:
        client.failed(A, 12.0)
        client.failed(B, 12.0)
    assert {client.order(13.0)[0] for client in clients} == {C}, "a far one serves when no near one does"


def test_which_servers_are_near_is_looked_at_again() -> None:
    client = balance.Balance(SERVERS, near=True)
    _look_at_all([client], 10.0, lambda url: 0.03 if url == A else 0.001)
    assert client.order(11.0)[0] == B
    assert not client.due(60.0)
    _look_at_all([client], 700.0, lambda _url: 0.001)
    assert client.order(701.0)[0] == A


def test_elsewhere_nobody_is_looked_at_without_need() -> None:
    assert not one().due(10.0)
