"""/api/v1/events: the newest lines of the cloud's history, each written with its decision (safety S28).

Lines are kept for seven days. The store lists keys upwards only, so the span that is read is found by counting: the
longest one whose lines are not too many.
"""

from collections import deque
from collections.abc import Sequence

import msgspec

from covey import serve
from covey import world as worlds
from covey.controller import listing, views
from covey.store import base, schema

_SPANS_S = (7 * 86400, 86400, 6 * 3600, 3600, 600, 60, 10, 1)
_LIMIT = 500
_PAGE = 1000


class Event(msgspec.Struct, frozen=True, kw_only=True):
    """`about`: an instance, a node, or "store"."""

    at: str
    what: str
    about: str
    who: str
    why: str
    details: dict[str, str]


class EventsApi:
    def __init__(self, store: base.Store, world: worlds.World) -> None:
        self._store = store
        self._world = world

    def routes(self) -> Sequence[serve.Route]:
        return [serve.Route("GET", "/api/v1/events", self.get)]

    async def get(self, call: serve.Call) -> list[Event]:
        limit = listing.limit(call.query.get("limit")) or _LIMIT
        return await newest(self._store, self._world.wall_ns(), limit)


async def newest(store: base.Store, now_ns: int, limit: int) -> list[Event]:
    """The newest events, oldest first, as many as the longest span brings that has not more of them."""
    end = base.prefix_end(schema.EVENTS)
    start = schema.EVENTS
    for span_s in _SPANS_S:
        start = f"{schema.EVENTS}{max(now_ns - span_s * 1_000_000_000, 0):020d}"
        if (await store.range(start, end, count_only=True)).total <= limit:
            break
    found: deque[Event] = deque(maxlen=limit)
    more = True
    while more:
        page = await store.range(start, end, limit=_PAGE)
        found.extend(filter(None, map(_event, page.kvs)))
        more = page.more
        start = f"{page.kvs[-1].key}\0" if more else start
    return list(found)


def _event(kv: base.Kv) -> Event | None:
    try:
        noun = msgspec.json.decode(kv.value, type=schema.Event)
    except msgspec.MsgspecError:
        return None  # of a newer program
    return Event(
        at=views.date(noun.at_ns),
        what=noun.what,
        about=noun.about,
        who=noun.who,
        why=noun.why,
        details=noun.details,
    )
