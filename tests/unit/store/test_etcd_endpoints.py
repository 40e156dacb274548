"""Addresses as people write them, what errors mean, and which member is asked."""

import grpc
import grpc.aio
import pytest

from covey import errors, world
from covey.store import etcd_endpoints, etcd_errors
from covey.store.etcd_errors import Verdict


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["a:1"], [("a:1", False)]),
        (["a"], [("a:2379", False)]),
        (["http://a:1,https://b", " c:3 "], [("a:1", False), ("b:2379", True), ("c:3", False)]),
        (["https://a:1/"], [("a:1", True)]),
        (["[::1]:5", "http://[::1]"], [("[::1]:5", False), ("[::1]:2379", False)]),
        (["a:1,a:1,"], [("a:1", False)]),
    ],
)
def test_addresses(given: list[str], expected: list[tuple[str, bool]]) -> None:
    assert etcd_endpoints.parse(given, secure=False) == expected


def test_without_a_scheme_tls_decides() -> None:
    assert etcd_endpoints.parse(["a:1", "http://b:1"], secure=True) == [("a:1", True), ("b:1", False)]


@pytest.mark.parametrize("given", [[], [""], ["a:b"], ["a:0"], ["a:99999"], ["ftp://a"], ["http://a/path"], [":1"]])
def test_what_is_no_address(given: list[str]) -> None:
    with pytest.raises(errors.SettingError):
        etcd_endpoints.parse(given, secure=False)


async def test_the_leader_is_asked_first_while_it_is_known_and_well() -> None:
    pool = etcd_endpoints.Pool(["a:1", "b:1", "c:1"], world=world.System(), attempt_s=1, timeout_s=1)
    present = pool.pick()
    assert pool.pick_leader() is present, "nobody knows who leads"
    leader = pool.leader = next(one for one in pool.endpoints if one is not present)
    assert pool.pick_leader() is leader
    assert pool.pick() is present, "all else goes where it went"
    pool.avoid(leader, "it does not answer")
    assert pool.pick_leader() is present
    pool.leader = pool.endpoint("d:1")
    assert pool.pick_leader() is present, "a member that is no more"


CODES = grpc.StatusCode


@pytest.mark.parametrize(
    ("code", "text", "verdict"),
    [
        (CODES.UNAVAILABLE, "failed to connect to all addresses; last error: refused", Verdict.ELSEWHERE),
        (CODES.UNAVAILABLE, "etcdserver: no leader", Verdict.ELSEWHERE),
        (CODES.RESOURCE_EXHAUSTED, "etcdserver: too many requests", Verdict.ELSEWHERE),
        (CODES.UNAVAILABLE, "Socket closed", Verdict.LOST),
        (CODES.UNAVAILABLE, "etcdserver: request timed out", Verdict.LOST),
        (CODES.UNAVAILABLE, "etcdserver: leader changed", Verdict.LOST),
        (CODES.UNAVAILABLE, "etcdserver: server stopped", Verdict.LOST),
        (CODES.DEADLINE_EXCEEDED, "Deadline Exceeded", Verdict.LOST),
        (CODES.UNKNOWN, "raft: stopped", Verdict.LOST),
        (CODES.INTERNAL, "", Verdict.LOST),
        (CODES.CANCELLED, "", Verdict.LOST),
        (CODES.UNAUTHENTICATED, "etcdserver: invalid auth token", Verdict.LOGIN),
        (CODES.INVALID_ARGUMENT, "etcdserver: revision of auth store is old", Verdict.LOGIN),
    ],
)
def test_what_an_error_says_of_a_write(code: grpc.StatusCode, text: str, verdict: Verdict) -> None:
    assert etcd_errors.judge(fault(code, text)) is verdict


@pytest.mark.parametrize(
    ("code", "text", "raised"),
    [
        (CODES.NOT_FOUND, "etcdserver: requested lease not found", errors.Rejected),
        (CODES.INVALID_ARGUMENT, "etcdserver: request is too large", errors.Rejected),
        (CODES.RESOURCE_EXHAUSTED, "grpc: received message larger than max", errors.Rejected),
        (CODES.PERMISSION_DENIED, "etcdserver: permission denied", errors.Rejected),
        (CODES.RESOURCE_EXHAUSTED, "etcdserver: mvcc: database space exceeded", errors.NoSpace),
    ],
)
def test_the_last_word_of_a_server(code: grpc.StatusCode, text: str, raised: type[errors.StoreError]) -> None:
    with pytest.raises(raised, match=text):
        etcd_errors.judge(fault(code, text))


def fault(code: grpc.StatusCode, text: str) -> grpc.aio.AioRpcError:
    return grpc.aio.AioRpcError(code, grpc.aio.Metadata(), grpc.aio.Metadata(), details=text)


class Still(world.System):
    """A world whose clock is moved by hand and whose chance is always the same."""

    ns = 10**12

    def boot_ns(self) -> int:
        return self.ns

    def token(self) -> str:
        return "0123456789abcdef"


def test_the_present_member_is_kept_until_it_fails_and_not_left_again() -> None:
    still = Still()
    pool = etcd_endpoints.Pool(["a,b,c"], world=still, attempt_s=2, timeout_s=10)
    first = pool.pick()
    assert pool.pick() is first
    pool.avoid(first, "it failed")
    second = pool.pick()
    assert second is not first
    still.ns += int(etcd_endpoints.AVOID_S * 2e9)
    assert pool.pick() is second, "a member that hung may hang still: nobody goes back without need"


def test_when_all_have_failed_the_one_that_failed_first_is_tried() -> None:
    still = Still()
    pool = etcd_endpoints.Pool(["a,b,c"], world=still, attempt_s=2, timeout_s=10)
    failed = []
    for _ in range(3):
        failed.append(pool.pick())
        pool.avoid(failed[-1], "it failed")
        still.ns += 10**6
    assert len(set(map(id, failed))) == 3
    assert pool.all_avoided()
    assert pool.pick() is failed[0]


def test_a_watch_looks_elsewhere_without_moving_the_others() -> None:
    pool = etcd_endpoints.Pool(["a,b"], world=Still(), attempt_s=2, timeout_s=10)
    present = pool.pick()
    assert pool.pick(other_than=present) is not present
    assert pool.pick() is present
    alone = etcd_endpoints.Pool(["a"], world=Still(), attempt_s=2, timeout_s=10)
    assert alone.pick(other_than=alone.pick()) is alone.pick()


def test_members_that_are_learnt_come_and_go_and_those_of_the_settings_stay() -> None:
    pool = etcd_endpoints.Pool(["a"], world=Still(), attempt_s=2, timeout_s=10)
    (given,) = pool.endpoints
    learnt = pool.endpoint("http://b:1")
    assert pool.endpoint("http://a:2379") is given
    pool.learn(learnt)
    pool.learn(learnt)
    assert pool.endpoints == [given, learnt]
    pool.avoid(given, "it is dead")
    assert pool.pick() is learnt
    pool.forget(given)
    pool.forget(learnt)
    assert pool.endpoints == [given] == [pool.pick()]
