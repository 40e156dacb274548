"""A follower answers for the whole set: what it lacks it fetches while it serves it, and what it does not know it asks
the holder about first (safety S36, S14).

* A blob that an entry names and that is not here is sent while it is fetched; a range of it is passed through from a
  peer that has it whole and verified.
* A miss (no such template, tag, manifest) is no answer yet: the holder may have taken the push a moment ago. Its log is
  asked for, and the request is answered anew. So is a request for "the newest one", and everything while this server
  does not hear from the holder.
* When the holder cannot be asked, what is known here is the answer; but only a registry that can know says no: a miss
  is then 503 and names the holder.
"""

import asyncio
import dataclasses
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence

from aiohttp import web

from covey import answer, errors, model, serve, world
from covey.client import oci
from covey.registry import blobs, catalog, copying, fetching, follower, peers, sending

_ASK_S = 2.0
_LEFT_S = 5.0  # a holder that did not answer is not asked again for so long

_BY_ID = ("/registry/vm", "/registry/v2/vm", "/registry/vm/info")
_BLOB = "/v2/{name:path}/blobs/{digest}"
_BY_NAME = (
    "/v2/{name:path}/manifests/{reference}",
    _BLOB,
    "/v2/{name:path}/tags/list",
    "/v2/{name:path}/referrers/{digest}",
)


class OnDemand:
    """For the handlers of one process."""

    def __init__(
        self,
        known: catalog.Catalog,
        copying: copying.Copying,
        fetching: fetching.Fetching,
        others: Mapping[str, peers.Peer],
        view: follower.View,
        current: Callable[[], bool],
        world: world.World,
    ) -> None:
        """`current`: whether this server hears from the holder."""
        self._catalog = known
        self._copying = copying
        self._fetching = fetching
        self._others = others
        self._view = view
        self._current = current
        self._world = world
        self._left = "", 0  # a holder that did not answer, and until when it is not asked

    # ---- what is not known here ------------------------------------------------------------------------------------

    def routes(self, routes: Sequence[serve.Route]) -> list[serve.Route]:
        """The same routes; those that read look at the holder's logs where that may change their answer."""
        return [dataclasses.replace(route, handler=self._asking(route)) if _reads(route) else route for route in routes]

    def _asking(self, route: serve.Route) -> serve.Handler:
        async def handler(call: serve.Call) -> object:
            if peers.SECRET_HEADER in call.headers:
                return await route.handler(call)
            if self._view().mine:
                return await self._as_holder(route, call)
            asked = False
            if not self._current() or _wants_newest(route, call):
                asked = await self.freshen(call)
            try:
                return await route.handler(call)
            except (errors.Refused, answer.Fault) as error:
                if not _is_miss(error):
                    raise
                if not asked and not await self.freshen(call):
                    raise self._cannot_know(error) from error
                if asked:
                    raise
            return await route.handler(call)

        return handler

    async def _as_holder(self, route: serve.Route, call: serve.Call) -> object:
        """A holder that was frozen, or that etcd is cut off from, may be none any more: before it says that something
        is not there it makes sure. Layers are asked for by who knows that they are there; no entry says so of them."""
        try:
            return await route.handler(call)
        except (errors.Refused, answer.Fault) as error:
            if not _is_miss(error) or route.path == _BLOB:
                raise
            try:
                certain = await self._catalog.role.certain()
            except errors.StoreError as fault:
                raise self._cannot_know(error) from fault
            if not certain:
                raise self._cannot_know(error) from error
        return await route.handler(call)

    def _cannot_know(self, miss: Exception) -> answer.Fault:
        view = self._view()
        where = f"the push registry {view.holder} does not answer" if view.holder else "no push registry is known"
        if view.mine:
            where = "it is not known now whether this one still takes pushes"
        text = f"{str(miss).rstrip('.')} in this registry, and {where}: try again"
        return answer.Fault(503, text, code="UNAVAILABLE", headers={"Retry-After": "1"})

    async def freshen(self, call: serve.Call) -> bool:
        """Bring the logs that the call is about to where the holder has them; False: it cannot be asked."""
        peer = self._others.get(self._view().holder)
        if peer is None or (peer.url == self._left[0] and self._world.boot_ns() < self._left[1]):
            return False
        try:
            async with asyncio.timeout(_ASK_S):
                return await self._freshen(peer, call)
        except (TimeoutError, errors.RemoteError):
            self._left = peer.url, self._world.boot_ns() + int(_LEFT_S * 1e9)
            return False

    async def _freshen(self, peer: peers.Peer, call: serve.Call) -> bool:
        wanted = call.query.get("id", "")
        if "name" in call.params:
            return await self._copying.copy(peer, call.params["name"], certain=True)
        if not wanted:
            return True
        if not oci.valid_uuid(wanted):
            if not await self._copying.copy(peer, catalog.name_log(wanted), certain=True):
                return False
            wanted = await self._catalog.holder(wanted) or ""
        if not wanted:
            return True
        return await self._copying.copy(peer, oci.repository_of(model.TemplateId(wanted)), certain=True)

    # ---- what is not here ------------------------------------------------------------------------------------------

    async def blob(self, call: serve.Call, repository: str, digest: model.Digest) -> web.StreamResponse | None:
        """The answer with a blob that a peer has; None: the repository needs no such blob. Raises Fault when it
        cannot be had now."""
        manifests = (await self._catalog.repository(repository)).manifests.values()
        if not any(digest in follower.needs(known) for known in manifests):
            return None
        try:
            size_bytes = await self._fetching.size_bytes(digest)
        except errors.NotFound:
            if self._view().mine:
                return None
            raise self._nowhere(
                repository, digest, f"push registry: {self._view().holder or 'none is known'}"
            ) from None
        except errors.RemoteError as error:
            raise self._nowhere(repository, digest, f"who may have it cannot be asked: {error}") from error
        coming = blobs.Blob(digest=digest, size_bytes=size_bytes)
        return await sending.answer(call, _Coming(self._fetching), coming)  # type: ignore[arg-type]

    def _nowhere(self, repository: str, digest: model.Digest, why: str) -> answer.Fault:
        text = f"blob {digest} of repository {repository} is not here yet ({why}); try again"
        return answer.Fault(503, text, code="UNAVAILABLE", headers={"Retry-After": "1"})

    async def manifest(self, digest: model.Digest) -> bool:
        """Have a manifest here that a log names. False: no peer has it."""
        try:
            await self._fetching.fetch(digest)
        except errors.NotFound:
            return False
        except errors.RemoteError as error:
            text = f"manifest {digest} is not here yet, and who may have it cannot be asked ({error}); try again"
            raise answer.Fault(503, text, code="UNAVAILABLE", headers={"Retry-After": "1"}) from error
        return True


class _Coming:
    """As much of `blobs.Blobs` as sending needs, for a blob that is on its way."""

    def __init__(self, fetching: fetching.Fetching) -> None:
        self._fetching = fetching

    async def address(self, blob: blobs.Blob) -> str:
        return ""

    def read(self, blob: blobs.Blob, start: int = 0, end: int | None = None) -> AsyncIterator[bytes]:
        if start == 0 and end in (None, blob.size_bytes):
            return self._fetching.tail(blob.digest, blob.size_bytes)
        return self._fetching.part(blob.digest, start, blob.size_bytes if end is None else end)


Manifest = Callable[[model.Digest], Awaitable[bool]]


def _reads(route: serve.Route) -> bool:
    return route.method in ("GET", "HEAD") and route.path in (*_BY_ID, *_BY_NAME)


def _wants_newest(route: serve.Route, call: serve.Call) -> bool:
    named = ("tag", "version", "number")
    return route.path == "/registry/vm/info" and not any(call.query.get(name) for name in named)


def _is_miss(error: Exception) -> bool:
    return isinstance(error, errors.Refused) or (isinstance(error, answer.Fault) and error.status == 404)
