"""Pushes that reach a server which takes none are passed on to the one that does, as a stream, never stored first.

    client ── PATCH …/uploads/S ──► follower ── the same, with a mark and the term ──► holder

A request is passed on once (safety S37): one that comes with a mark to a server that is not the holder either is
answered 503, which names the holder as that server knows it. So is one whose holder cannot be reached. Upload sessions
live at the holder; their locations are paths, valid through every server of the set.

A write-only registry takes pushes and feeds its peers: to anybody else it gives no bytes of blobs and manifests. HEAD
stays open, because pushing clients ask what is there already.
"""

import contextlib
import dataclasses
import urllib.parse
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import aiohttp
import multidict
import yarl
from aiohttp import web

from covey import answer, model, observe, serve
from covey.client import http
from covey.registry import catalog, oci_faults, peers, role

MARK_HEADER = "Covey-Forwarded"

log = observe.log("registry")

_WRITES = frozenset({"POST", "PUT", "PATCH", "DELETE"})
_BLOB, _MANIFEST = "/v2/{name:path}/blobs/{digest}", "/v2/{name:path}/manifests/{reference}"
_SESSION = "/v2/{name:path}/blobs/uploads/{session}"
_CONNECT_S = 2.0
_SILENT_S = 120.0  # a large upload is hashed before it is answered
# RFC 9110, 7.6.1: what is between two neighbours; and what is made anew for each of them.
_OF_ONE_HOP = {"connection", "keep-alive", "proxy-authenticate", "proxy-authorization", "proxy-connection", "te"}
_OF_ONE_HOP |= {"trailer", "transfer-encoding", "upgrade", "host", "expect", "content-length", "date", "server"}


class Forward:
    """start → routes → close. `secret`: by which the servers of a set know each other."""

    def __init__(
        self, role: role.Role, known: catalog.Catalog, own_url: str, secret: str, *, ca_cert: Path | None = None
    ) -> None:
        self._role = role
        self._catalog = known
        self._own_url = own_url
        self._secret = secret
        self._sockets = http.Sockets(connect_s=_CONNECT_S, ca_cert=ca_cert)

    async def close(self) -> None:
        await self._sockets.close()

    def routes(self, routes: Sequence[serve.Route]) -> list[serve.Route]:
        """The same routes; where this server is not the holder, those that write go to it."""
        return [self._route(route) for route in routes]

    def _route(self, route: serve.Route) -> serve.Route:
        if route.path.startswith("/replica/"):
            return route
        if route.method in _WRITES or route.path == _SESSION:
            return dataclasses.replace(route, handler=self._passing(route))
        if (route.method, route.path) == ("GET", _BLOB):
            return dataclasses.replace(route, handler=self._looking(route))
        return route

    def _passing(self, route: serve.Route) -> serve.Handler:
        async def handler(call: serve.Call) -> object:
            view = self._role.view()
            if view.mine and _term(call) <= view.term:
                return await route.handler(call)
            return await self._pass_on(call, view)

        return handler

    def _looking(self, route: serve.Route) -> serve.Handler:
        """What a pushing client asks before and after an upload: the holder may have what no entry names yet."""

        async def handler(call: serve.Call) -> object:
            view = self._role.view()
            if call.request.method == "HEAD" and not view.mine and MARK_HEADER not in call.headers and view.holder:
                name, digest = call.params["name"], model.Digest(call.params["digest"])
                if await self._catalog.granted_blob(name, digest) is None:
                    with contextlib.suppress(answer.Fault, role.NotHolder):
                        return await self._pass_on(call, view)
            return await route.handler(call)

        return handler

    async def _pass_on(self, call: serve.Call, view: role.View) -> web.Response:
        if view.why_not or not view.holder or view.holder == self._own_url or MARK_HEADER in call.headers:
            raise role.not_holder(view, self._own_url)
        body = _Body(call)
        headers = _ends(call.headers)
        headers[MARK_HEADER] = f"{view.term} {self._own_url}"
        headers[peers.SECRET_HEADER] = self._secret
        if call.request.size_bytes is not None and call.request.has_body:
            headers["Content-Length"] = str(call.request.size_bytes)
        try:
            async with self._sockets.session.request(
                call.request.method,
                _target(view.holder, call),
                headers=headers,
                data=body.pieces() if call.request.has_body else None,
                timeout=aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_S, sock_read=_SILENT_S),
                allow_redirects=False,
            ) as reply:
                return _answer(call, reply, await reply.read())
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            if body.broken is not None:
                raise body.broken from error
            log.warning("a push could not be passed on", holder=view.holder, error=str(error) or type(error).__name__)
            raise _unreachable(view.holder, error) from error


class _Body:
    """A request's body on its way to another server, and what broke it off on our side."""

    def __init__(self, call: serve.Call) -> None:
        self._call = call
        self.broken: Exception | None = None

    async def pieces(self) -> AsyncIterator[bytes]:
        try:
            async for piece in self._call.chunks():
                yield piece
        except answer.Cut:
            self.broken = answer.Fault(
                503, "the upload was cut; ask where it stands", code="UNAVAILABLE", headers={"Retry-After": "1"}
            )
            raise
        except ConnectionError as error:
            self.broken = error
            raise


def _term(call: serve.Call) -> int:
    """In which term whoever passed the request on believes this server to be the holder."""
    text = call.headers.get(MARK_HEADER, "").partition(" ")[0]
    return int(text) if text.isascii() and text.isdigit() and len(text) < 11 else 0


def _target(holder: str, call: serve.Call) -> yarl.URL:
    path = urllib.parse.quote(call.request.path, safe="/:@!$&'()*+,;=~")
    query = urllib.parse.urlencode(list(call.query.items()))
    return yarl.URL(holder + path + (f"?{query}" if query else ""), encoded=True)


def _ends(headers: multidict.MultiMapping[str]) -> multidict.CIMultiDict[str]:
    """Those headers that are meant for the other end."""
    named = {name.strip().lower() for name in headers.get("Connection", "").split(",")}
    return multidict.CIMultiDict(
        (name, text) for name, text in headers.items() if name.lower() not in (_OF_ONE_HOP | named)
    )


def _answer(call: serve.Call, reply: aiohttp.ClientResponse, content: bytes) -> web.Response:
    headers = _ends(reply.headers)
    headers["Server"] = "covey"
    if call.request.method == "HEAD" or reply.status in (204, 304):
        if reply.content_length is not None and call.request.method == "HEAD":
            headers["Content-Length"] = str(reply.content_length)
        return web.Response(status=reply.status, headers=headers)
    return web.Response(status=reply.status, headers=headers, body=content)


def _unreachable(holder: str, error: Exception) -> answer.Fault:
    sent = not isinstance(error, aiohttp.ClientConnectorError | aiohttp.ConnectionTimeoutError)
    what = "did not answer; whether it took this is not known" if sent else "cannot be reached; nothing was entered"
    text = f"the registry {holder}, which takes pushes, {what}: send it again later"
    return answer.Fault(503, text, code="UNAVAILABLE", headers={"Retry-After": "2"})


# ---- write-only ----------------------------------------------------------------------------------------------------


def without_pulls(routes: Sequence[serve.Route], secret: str) -> list[serve.Route]:
    """The same routes; bytes of blobs and manifests are for peers alone."""

    def guarded(route: serve.Route) -> serve.Handler:
        async def handler(call: serve.Call) -> object:
            if call.request.method == "GET" and not peers.is_peer(call, secret):
                text = "this registry takes pushes only (REGISTRY_MODE=write-only); pull from another one of the set"
                raise answer.Fault(403, text, code="DENIED")
            return await route.handler(call)

        return oci_faults.oci_path(handler)

    return [
        dataclasses.replace(route, handler=guarded(route))
        if route.method == "GET" and route.path in (_BLOB, _MANIFEST)
        else route
        for route in routes
    ]
