"""For peers only: what they follow this server by. Not part of the public API; it may change with any version.

    GET  /replica/v1/word                                             who takes pushes, as this server knows
    GET  /replica/v1/feed?after=CURSOR&wait=SECONDS[&term=&holder=]   heads that changed; waits until there is something
    GET  /replica/v1/log/<name>?start=NUMBER[&certain=1]              entries of one log; `certain`: 503 unless this
                                                                      server holds the push role right now
    GET  /replica/v1/inventory                                        the heads of all logs
    GET  /replica/v1/blobs/<digest>                                   a finished blob, also in write-only mode; HEAD too

Each call carries the secret of the set (`peers.SECRET_HEADER`); without it the answer is 401. A blob is named by its
digest alone: who may read what is decided by the server that its clients ask.
"""

from collections.abc import Awaitable, Callable, Sequence

from aiohttp import web

from covey import answer, gate, model, serve
from covey.client import oci
from covey.registry import blobs, feed, peers, sending

_WAIT_LIMIT_S = 60.0
_DIGITS = 10


class FeedApi:
    """Handlers of /replica/v1/."""

    def __init__(
        self, feed: feed.Feed, content: blobs.Blobs, secret: str, certain: Callable[[], Awaitable[bool]]
    ) -> None:
        """`certain`: whether this server holds the push role right now."""
        self._feed = feed
        self._content = content
        self._secret = secret
        self._certain = certain

    def routes(self) -> Sequence[serve.Route]:
        return [
            self._route("/replica/v1/word", self.word),
            self._route("/replica/v1/feed", self.feed),
            self._route("/replica/v1/log/{log:path}", self.entries),
            self._route("/replica/v1/inventory", self.inventory),
            self._route("/replica/v1/blobs/{digest}", self.blob),
        ]

    def _route(self, path: str, handler: Callable[[serve.Call], Awaitable[object]]) -> serve.Route:
        async def guarded(call: serve.Call) -> object:
            peers.check(call, self._secret)
            found = await handler(call)
            if isinstance(found, web.StreamResponse):
                return found
            return web.Response(body=answer.ascii_json(found), headers=answer.HEADERS)

        return serve.Route("GET", path, guarded, time_limit_s=None, lane=gate.Lane.OPEN)

    async def word(self, _call: serve.Call) -> peers.Word:
        return self._feed.word()

    async def feed(self, call: serve.Call) -> peers.Feed:
        wait_s = min(float(_number(call, "wait")), _WAIT_LIMIT_S)
        known = (_number(call, "term"), call.query.get("holder", "")) if "term" in call.query else None
        return await self._feed.feed(call.query.get("after", ""), wait_s, call.draining, known)

    async def entries(self, call: serve.Call) -> peers.Part:
        if _number(call, "certain") and not await self._certain():
            raise answer.Fault(503, "this registry does not hold the push role")
        return await self._feed.entries(_log(call.params["log"]), _number(call, "start"))

    async def inventory(self, _call: serve.Call) -> peers.Inventory:
        return await self._feed.inventory()

    async def blob(self, call: serve.Call) -> web.StreamResponse:
        digest = model.Digest(call.params["digest"])
        if not oci.valid_digest(digest):
            raise answer.Fault(400, f"{digest!r} is not {oci.DIGEST_FORM}")
        found = await self._content.stat(digest)
        if found is None:
            raise answer.Fault(404, f"blob {digest} is not here")
        return await sending.answer(call, self._content, found)


def _log(name: str) -> str:
    """A repository's name, or that of a template name's log: nothing else is looked up on the disk."""
    folder, _, rest = name.partition("/")
    if oci.valid_name(name) or (folder == "_names" and len(rest) == 64 and set(rest) <= set("0123456789abcdef")):
        return name
    raise answer.Fault(400, f"{name!r} is no log")


def _number(call: serve.Call, name: str) -> int:
    text = call.query.get(name, "0")
    if not text.isascii() or not text.isdigit() or len(text) > _DIGITS:
        raise answer.Fault(400, f"{name}={text!r} is not a number")
    return int(text)
