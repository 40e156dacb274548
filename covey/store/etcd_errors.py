"""What an error of etcd means for the caller: the line between *certainly not applied* and *nobody knows* (safety S15).

    ELSEWHERE   certainly not applied: no connection was made, or the member refused before proposing
    LOGIN       certainly not applied: the token is unknown here (it expired, or the member restarted)
    LOST        the reply did not come, or says nothing about the proposal
    (raised)    the server's last word: Rejected, NoSpace

A member's own time-outs ("etcdserver: request timed out", "leader changed", "server stopped") come after it has
proposed, so they are LOST. Texts are those of https://github.com/etcd-io/etcd api/v3rpc/rpctypes/error.go; grpc's are
its core's. What is not listed here is LOST: a new error must never turn a lost write into a failed one.
"""

import enum

import grpc
import grpc.aio

from covey import errors


class Verdict(enum.Enum):
    ELSEWHERE = enum.auto()
    LOGIN = enum.auto()
    LOST = enum.auto()


_NEVER_SENT = (
    "failed to connect to all addresses",  # grpc: every connection attempt failed
    "DNS resolution failed",  # grpc, likewise
    "etcdserver: no leader",  # answered by the interceptor that our `hasleader` header asks for
    "etcdserver: not capable",  # a cluster that is still starting
    "etcdserver: too many requests",  # refused before proposing
    "etcdserver: unhealthy cluster",  # refused before proposing: a change of membership must wait
)
_LOGIN_AGAIN = ("etcdserver: invalid auth token", "etcdserver: revision of auth store is old")
_LAST_WORD = frozenset(
    {
        grpc.StatusCode.INVALID_ARGUMENT,
        grpc.StatusCode.NOT_FOUND,
        grpc.StatusCode.ALREADY_EXISTS,
        grpc.StatusCode.PERMISSION_DENIED,
        grpc.StatusCode.FAILED_PRECONDITION,
        grpc.StatusCode.OUT_OF_RANGE,
        grpc.StatusCode.UNIMPLEMENTED,
        grpc.StatusCode.RESOURCE_EXHAUSTED,
    }
)


def judge(error: grpc.aio.AioRpcError) -> Verdict:
    """Decide what `error` says; raises Rejected or NoSpace when it is the server's last word."""
    code, text = error.code(), error.details() or ""
    if text.startswith(_NEVER_SENT):
        return Verdict.ELSEWHERE
    if code is grpc.StatusCode.UNAUTHENTICATED or text.startswith(_LOGIN_AGAIN):
        return Verdict.LOGIN
    if "database space exceeded" in text:
        raise errors.NoSpace(text) from None
    if code in _LAST_WORD:
        raise errors.Rejected(text or code.name) from None
    return Verdict.LOST


def describe(error: grpc.aio.AioRpcError) -> str:
    """The error in a few words, for the text of our own."""
    text = (error.details() or "").split("\n", 1)[0]
    return f"{error.code().name} {text}".strip()[:300]
