"""Fail-over of calls over several servers, in virtual time and without sockets; then what real sockets say."""

import asyncio
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest

from covey import errors
from covey.client import balance, http
from tests.support import proxy, virtual

A, B, C = "http://a", "http://b", "http://c"
OK = b'{"status": "OK", "message": "", "body": 7}'
BUSY = b'{"status": "FAIL", "message": "try later", "body": null}'
KEYED = {"Idempotency-Key": "k"}
FOREVER = 1e6


@dataclass
class Peer:
    """How one server behaves: what it raises or answers, and after how long."""

    after_s: float = 0.01
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)
    fault: type[errors.RemoteError] | None = None
    body: bytes = b""


FINE = Peer()
REFUSES = Peer(after_s=0.0, fault=http.NotSent)
BREAKS = Peer(after_s=0.0, fault=http.Lost)
FROZEN = Peer(after_s=FOREVER)


class Net:
    """An Exchange whose servers behave as told; it notes each request: (seconds, server, path)."""

    def __init__(self, **peers: Peer) -> None:
        self.peers = {f"http://{name}": peer for name, peer in peers.items()}
        self.sent: list[tuple[float, str, str]] = []

    async def send(
        self, url: str, method: str, path: str, data: bytes | None, headers: Mapping[str, str], timeout_s: float
    ) -> http.Reply:
        self.sent.append((asyncio.get_running_loop().time(), url, path))
        peer = self.peers[url]
        parked = path == "/poll" and peer is FINE
        try:
            async with asyncio.timeout(timeout_s):
                await asyncio.sleep(FOREVER if parked else peer.after_s)
        except TimeoutError:
            raise http.Lost("no answer") from None
        if peer.fault is not None:
            raise peer.fault("away")
        return http.Reply(peer.status, peer.headers, peer.body or (OK if peer.status == 200 else BUSY))

    def asked(self, path: str = "/x") -> list[str]:
        return [url for _, url, where in self.sent if where == path]


Story = Callable[[http.Endpoints, Net], Awaitable[Any]]


def live(net: Net, story: Story, **settings: Any) -> Any:
    """Run a story in virtual time; its result."""

    async def whole() -> Any:
        async with http.Endpoints(tuple(net.peers), exchange=net, **settings) as endpoints:
            return await story(endpoints, net)

    return virtual.run(whole())


def now() -> float:
    return asyncio.get_running_loop().time()


@pytest.mark.parametrize("bad", [REFUSES, BREAKS, Peer(status=503)], ids=["refuses", "breaks off", "503"])
def test_another_server_is_asked_at_once(bad: Peer) -> None:
    async def story(endpoints: http.Endpoints, net: Net) -> None:
        began_s = now()
        assert await endpoints.ask("GET", "/x", int) == 7
        assert now() - began_s < 0.1
        assert await endpoints.ask("GET", "/x", int) == 7
        assert net.asked() == [A, B, B]  # and the next call goes straight there

    live(Net(a=bad, b=FINE), story)


@pytest.mark.parametrize(("method", "headers"), [("GET", {}), ("PUT", {}), ("DELETE", {}), ("POST", KEYED)])
def test_a_repeatable_call_to_a_frozen_server_is_answered_by_another_one(
    method: str, headers: Mapping[str, str]
) -> None:
    async def story(endpoints: http.Endpoints, net: Net) -> None:
        began_s = now()
        assert await endpoints.ask(method, "/x", int, headers=headers) == 7
        assert now() - began_s <= balance.LATE_S + 0.1
        assert await endpoints.ask(method, "/x", int, headers=headers) == 7
        assert net.asked() == [A, B, B]

    live(Net(a=FROZEN, b=FINE), story)


def test_with_two_of_three_frozen_the_third_answers() -> None:
    async def story(endpoints: http.Endpoints, net: Net) -> None:
        assert await endpoints.ask("GET", "/x", int) == 7
        assert now() <= 2 * balance.LATE_S + 0.1

    live(Net(a=FROZEN, b=FROZEN, c=FINE), story)


@pytest.mark.parametrize("bad", [FROZEN, BREAKS], ids=["frozen", "breaks off"])
def test_a_post_without_a_key_is_never_sent_twice(bad: Peer) -> None:
    async def story(endpoints: http.Endpoints, net: Net) -> None:
        with pytest.raises(errors.RemoteError, match="may have been carried out"):
            await endpoints.ask("POST", "/x", int)
        assert net.asked() == [A]

    live(Net(a=bad, b=FINE), story)


@pytest.mark.parametrize("bad", [REFUSES, Peer(status=503)], ids=["refuses", "503"])
def test_a_post_without_a_key_goes_on_when_certainly_nothing_was_done(bad: Peer) -> None:
    async def story(endpoints: http.Endpoints, net: Net) -> None:
        assert await endpoints.ask("POST", "/x", int) == 7
        assert net.asked() == [A, B]

    live(Net(a=bad, b=FINE), story)


STRANGERS = {"no such path": Peer(status=404), "no such method": Peer(status=405), "a page": Peer(body=b"<html>")}


@pytest.mark.parametrize("stranger", STRANGERS.values(), ids=STRANGERS)
def test_who_is_no_server_of_this_api_is_passed_by(stranger: Peer) -> None:
    """A wrong URL, or an address that another program has now: it answers, and even says that it is well."""

    async def story(endpoints: http.Endpoints, net: Net) -> None:
        for _ in range(20):
            assert await endpoints.ask("POST", "/x", int, repeatable=True) == 7
            await asyncio.sleep(5.0)
        assert net.asked().count(A) <= 5  # tried again now and then, and nobody fails for it

    live(Net(a=stranger, b=FINE), story)


def test_the_word_of_the_only_server_about_an_unknown_path_counts() -> None:
    async def story(endpoints: http.Endpoints, net: Net) -> None:
        with pytest.raises(errors.RemoteError, match="try later") as raised:
            await endpoints.ask("GET", "/x", int)
        assert raised.value.status == 404

    live(Net(a=Peer(status=404)), story)


def test_a_post_without_a_key_that_a_strange_server_took_is_not_sent_again() -> None:
    async def story(endpoints: http.Endpoints, net: Net) -> None:
        with pytest.raises(errors.RemoteError, match="without the API's envelope"):
            await endpoints.ask("POST", "/x", int)
        assert net.asked() == [A]

    live(Net(a=Peer(body=b"<html>"), b=FINE), story)


def test_a_poll_is_given_up_when_its_server_fails_another_call() -> None:
    """A frozen server keeps a parked poll for ever; a heartbeat finds out."""

    async def story(endpoints: http.Endpoints, net: Net) -> None:
        poll = asyncio.create_task(endpoints.ask("GET", "/poll", int, parks=True, timeout_s=60.0))
        await asyncio.sleep(5)
        net.peers[A] = FROZEN
        began_s = now()
        assert await endpoints.ask("POST", "/x", int, repeatable=True) == 7
        await asyncio.sleep(0)
        assert net.asked("/poll") == [A, B]
        assert net.sent[-1][0] - began_s <= balance.LATE_S + 0.1
        poll.cancel()

    live(Net(a=FINE, b=FINE), story)


def test_a_poll_is_not_copied_however_long_it_waits() -> None:
    async def story(endpoints: http.Endpoints, net: Net) -> None:
        with pytest.raises(errors.RemoteError):
            await endpoints.ask("GET", "/poll", int, parks=True, timeout_s=15.0)
        assert [seconds for seconds, _, _ in net.sent] == [0.0, 15.0]

    live(Net(a=FINE, b=FINE), story)


def test_the_poll_stays_where_there_is_nowhere_else_to_go() -> None:
    async def story(endpoints: http.Endpoints, net: Net) -> None:
        poll = asyncio.create_task(endpoints.ask("GET", "/poll", int, parks=True, timeout_s=60.0))
        await asyncio.sleep(1)
        net.peers[A] = REFUSES
        with pytest.raises(errors.RemoteError):
            await endpoints.ask("GET", "/x", int)
        await asyncio.sleep(1)
        assert net.asked("/poll") == [A]
        assert not poll.done()
        poll.cancel()

    live(Net(a=FINE), story)


def test_servers_that_are_all_slow_get_hardly_more_calls_for_it() -> None:
    async def story(endpoints: http.Endpoints, net: Net) -> None:
        for _ in range(50):
            assert await endpoints.ask("GET", "/x", int) == 7
        assert len(net.asked()) <= 55

    live(Net(a=Peer(after_s=3.0), b=Peer(after_s=3.0)), story)


def test_a_recovered_server_is_used_again() -> None:
    async def story(endpoints: http.Endpoints, net: Net) -> None:
        assert await endpoints.ask("GET", "/x", int) == 7
        net.peers[A] = FINE
        for _ in range(60):
            await asyncio.sleep(1)
            await endpoints.ask("GET", "/x", int)
        assert net.asked()[-1] == A
        assert net.asked().count(A) > 20

    live(Net(a=REFUSES, b=FINE), story)


def test_calls_never_pay_for_a_server_that_is_still_away() -> None:
    async def story(endpoints: http.Endpoints, net: Net) -> None:
        await endpoints.ask("GET", "/x", int)
        for _ in range(60):
            await asyncio.sleep(1)
            began_s = now()
            await endpoints.ask("GET", "/x", int)
            assert now() - began_s < 0.1
        assert 3 <= len([url for url in net.asked("/readyz") if url == A]) <= 15

    live(Net(a=FROZEN, b=FINE), story)


def test_a_wish_to_be_left_alone_is_respected_when_all_have_it() -> None:
    busy = Peer(status=503, headers={"Retry-After": "1"})

    async def story(endpoints: http.Endpoints, net: Net) -> None:
        asking = asyncio.create_task(endpoints.ask("POST", "/x", int))
        await asyncio.sleep(0.5)
        assert net.asked() == [A, B]
        net.peers[B] = FINE
        assert await asking == 7
        assert 1.0 <= now() < 1.2

    live(Net(a=busy, b=busy), story, patience_s=10.0)


def test_without_patience_the_caller_learns_how_long_to_wait() -> None:
    busy = Peer(status=503, headers={"retry-after": "2"})

    async def story(endpoints: http.Endpoints, net: Net) -> None:
        for _ in range(2):  # the second time nobody is asked
            with pytest.raises(errors.RemoteError) as caught:
                await endpoints.ask("GET", "/x", int)
            assert caught.value.status == 503
            assert 1.9 < caught.value.retry_after_s <= 2.0
        assert net.asked() == [A, B]

    live(Net(a=busy, b=busy), story)


def test_a_fault_names_every_server_that_was_tried() -> None:
    async def story(endpoints: http.Endpoints, net: Net) -> None:
        with pytest.raises(errors.RemoteError) as caught:
            await endpoints.ask("GET", "/x", int)
        for url in (A, B, C):
            assert url in str(caught.value)

    live(Net(a=REFUSES, b=BREAKS, c=Peer(status=503)), story)


def test_a_gateway_without_an_answer_is_passed_by() -> None:
    async def story(endpoints: http.Endpoints, net: Net) -> None:
        assert await endpoints.ask("GET", "/x", int) == 7

    live(Net(a=Peer(status=504), b=FINE), story)


def test_one_server_alone_is_tried_again_when_an_old_connection_breaks() -> None:
    class Restarted(Net):
        async def send(self, url: str, *rest: Any) -> http.Reply:
            reply = await super().send(url, *rest)
            if len(self.sent) == 1:
                raise http.Lost("the connection broke")
            return reply

    async def story(endpoints: http.Endpoints, net: Net) -> None:
        assert await endpoints.ask("GET", "/x", int) == 7
        assert net.asked() == [A, A]

    live(Restarted(a=FINE), story)


def test_learnt_servers_come_first_and_given_ones_last() -> None:
    async def story(endpoints: http.Endpoints, net: Net) -> None:
        endpoints.learn([B + "/"])
        for _ in range(int(balance.SETTLE_LIMIT_S) + 2):
            await endpoints.ask("GET", "/x", int)
            await asyncio.sleep(1)
        assert net.asked()[-1] == B
        net.peers[B] = REFUSES
        await endpoints.ask("GET", "/x", int)
        assert net.asked()[-2:] == [B, A]

    net = Net(a=FINE, b=FINE)

    async def whole() -> None:
        async with http.Endpoints([A], exchange=net) as endpoints:
            await story(endpoints, net)

    virtual.run(whole())


# ---- real sockets ----------------------------------------------------------------------------------------------


@pytest.fixture
async def sockets() -> AsyncIterator[http.Sockets]:
    made = http.Sockets()
    yield made
    await made.close()


async def test_sockets_know_what_certainly_was_not_sent(sockets: http.Sockets) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    with pytest.raises(http.NotSent, match="refused"):
        await sockets.send(f"http://127.0.0.1:{port}", "POST", "/x", b"{}", {}, 30.0)


async def test_sockets_do_not_know_what_a_silent_peer_did(sockets: http.Sockets) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:  # the kernel accepts, and nobody reads
        url = f"http://127.0.0.1:{server.getsockname()[1]}"
        with pytest.raises(http.Lost, match="no answer within"):
            await sockets.send(url, "GET", "/x", None, {}, 0.2)


async def test_sockets_do_not_know_what_a_peer_did_that_broke_off(sockets: http.Sockets) -> None:
    async with proxy.before(1) as nasty:  # nothing listens behind it
        with pytest.raises(http.Lost):
            await sockets.send(f"http://{nasty.address}", "GET", "/x", None, {}, 30.0)
