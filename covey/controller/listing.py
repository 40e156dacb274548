"""Lists of instances: the contract's whole list, and beside it lists that filter and page.

The whole list is what most clients ask for, again and again, and with thousands of instances it is megabytes. So the
bytes of each element are kept as long as nothing that shows in it has changed, a list is a join of them, and who asks
at the same moment gets the very same bytes.

Order is by creation, then id; neither ever changes. A *cursor* names the last element of a page, and the next page is
what comes after it in that order: an instance that exists all the while is on exactly one page, whatever comes and
goes meanwhile. A filtered list looks only at the instances that an index names (`store.view`).
"""

import base64
import binascii
import functools
import heapq
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import NamedTuple, TypeVar

import msgspec
from aiohttp import web

from covey import answer, errors, model, wire
from covey.controller import display, views
from covey.store import codec, view

S = TypeVar("S", model.State, model.NodeState)
T = TypeVar("T")
Kept = codec.Kept[model.Instance]
Order = tuple[int, str]

LIMIT_MOST = 1000
FILTERS = ("state", "group", "template", "external_id")
PARAMETERS = frozenset((*FILTERS, "limit", "cursor"))

_AGAIN_NS = 500_000_000  # how long a whole list is told again while its revision is the newest: silence shows in it
_SPARE_ROWS = 1000


class Query(NamedTuple):
    """What a list is to show. `after` is where the page before ended; `limit` 0 means all."""

    states: frozenset[model.State] = frozenset()
    group: str = ""
    template: str = ""
    external_id: str = ""
    limit: int = 0
    after: Order | None = None


def query(given: Mapping[str, str]) -> Query:
    """Raises Refused, naming the parameter."""
    check_not_empty(given)
    return Query(
        states=frozenset(chosen(given.get("state", ""), "state", model.State)),
        group=given.get("group", ""),
        template=given.get("template", ""),
        external_id=given.get("external_id", ""),
        limit=limit(given.get("limit")),
        after=after(given.get("cursor")),
    )


def check_not_empty(given: Mapping[str, str]) -> None:
    """A variable that a script forgot to set must not show everything. Raises Refused."""
    for name in FILTERS:
        if name in given and not given[name]:
            raise errors.Refused(f"{name}: empty; give a value or leave it out")


def chosen(text: str, name: str, kind: type[S]) -> Iterator[S]:
    """States by their names, separated by commas, in any case of letters. Raises Refused."""
    known = {word.lower(): state for state in kind for word in (state.name, state)}
    for word in filter(None, text.split(",")):
        state = known.get(word.strip().lower())
        if state is None:
            raise errors.Refused(f"{name}: there is no state {word!r}; there are {', '.join(kind)}")
        yield state


def limit(text: str | None) -> int:
    """Raises Refused."""
    if text is None:
        return 0
    if not text.isascii() or not text.isdecimal() or not 1 <= int(text[:9]) <= LIMIT_MOST or len(text) > len("1000"):
        raise errors.Refused(f"limit: {text[:20]!r} is not a whole number between 1 and {LIMIT_MOST}")
    return int(text)


def after(cursor: str | None) -> Order | None:
    """Raises Refused."""
    if cursor is None:
        return None
    try:
        raw = base64.b64decode(cursor.encode("ascii"), altchars=b"-_", validate=True)
        order: Order = msgspec.json.decode(raw, type=Order)
    except (ValueError, binascii.Error, msgspec.MsgspecError):
        raise errors.Refused("cursor: no list has given this one; leave it out to begin at the start") from None
    return order


def cursor(order: Order) -> str:
    return base64.urlsafe_b64encode(msgspec.json.encode(order)).decode("ascii")


def page(found: Iterable[T], order: Callable[[T], Order], limit: int, after: Order | None) -> tuple[list[T], str]:
    """One page in order, and the cursor to the next one; "" when nothing follows."""
    rest = (one for one in found if after is None or order(one) > after)
    if not limit:
        return sorted(rest, key=order), ""
    first = heapq.nsmallest(limit + 1, rest, key=order)
    return first[:limit], cursor(order(first[limit - 1])) if len(first) > limit else ""


def headers(cursor: str) -> Mapping[str, str]:
    return {**answer.HEADERS, wire.CURSOR_HEADER: cursor} if cursor else answer.HEADERS


def _order(kept: Kept) -> Order:
    return kept.noun.created_ns, kept.noun.id


def select(snapshot: view.Snapshot, asked: Query) -> Iterator[Kept]:
    """What the query's filters let through, in no particular order."""
    candidates, shown = _candidates(snapshot, asked), views.shown_state
    for kept in candidates:
        spec = kept.noun.spec
        if (
            (not asked.states or shown(kept.noun) in asked.states)
            and (not asked.external_id or kept.noun.external_id == asked.external_id)
            and (not asked.template or asked.template in (spec.template, spec.template_name))
            and (not asked.group or spec.group == asked.group)
        ):
            yield kept


def _candidates(snapshot: view.Snapshot, asked: Query) -> Iterator[Kept]:
    """From the index that names the fewest, as a rule."""
    if asked.external_id:
        return snapshot.labelled(view.Label.EXTERNAL_ID, asked.external_id)
    states = set(asked.states)
    if model.State.PULLING in states:
        states.add(model.State.STARTED)  # shown as Pulling until its VM's facts are complete
    if states and model.State.STARTED not in states:
        return (kept for state in states for kept in snapshot.in_state(state))
    if asked.template:
        return snapshot.labelled(view.Label.TEMPLATE, asked.template)
    if asked.group:
        return snapshot.labelled(view.Label.GROUP, asked.group)
    return (kept for state in states or model.State for kept in snapshot.in_state(state))


class _Row(NamedTuple):
    """The bytes of one element, and what they rest on."""

    kept: Kept
    message: str
    raw: bytes


class _Whole(NamedTuple):
    """The answer with all instances as of one view."""

    history: str
    revision: int
    made_ns: int
    body: bytes


class Listing:
    def __init__(self, display: display.Display, now_ns: Callable[[], int]) -> None:
        self._display = display
        self._now_ns = now_ns
        self._rows: dict[str, _Row] = {}
        self._whole: _Whole | None = None

    async def whole(self, snapshot: view.Snapshot) -> web.Response:
        """All instances: the product's plain list."""
        async with self._display.alone():
            whole = self._whole
            if whole is None or not self._stands(whole, snapshot):
                raw = self._join(sorted(snapshot.instances(), key=_order), snapshot)
                whole = self._whole = _Whole(snapshot.history, snapshot.revision, self._now_ns(), raw)
                self._forget(snapshot)
        return web.Response(body=whole.body, headers=answer.HEADERS)

    async def some(self, snapshot: view.Snapshot, asked: Query) -> web.Response:
        async with self._display.alone():
            found, cursor = page(select(snapshot, asked), _order, asked.limit, asked.after)
            return web.Response(body=self._join(found, snapshot), headers=headers(cursor))

    def _stands(self, whole: _Whole, snapshot: view.Snapshot) -> bool:
        """Whether it shows what the snapshot shows, or what came after."""
        young = self._now_ns() - whole.made_ns < _AGAIN_NS
        return young and whole.history == snapshot.history and whole.revision >= snapshot.revision

    def _join(self, found: Iterable[Kept], snapshot: view.Snapshot) -> bytes:
        shown = self._display.of(snapshot)
        shown = shown._replace(talking=functools.cache(shown.talking))  # as of this list
        return answer.enveloped_list(self._raw(kept, shown) for kept in found)

    def _raw(self, kept: Kept, shown: views.Shown) -> bytes:
        message = views.message(kept.noun, shown)
        row = self._rows.get(kept.noun.id)
        if row is None or row.kept is not kept or row.message != message:
            raw = answer.ascii_json(views.wrapper(kept.noun, shown, message))
            row = self._rows[kept.noun.id] = _Row(kept, message, raw)
        return row.raw

    def _forget(self, snapshot: view.Snapshot) -> None:
        """The bytes of instances that are no more."""
        if len(self._rows) > snapshot.instance_count() + _SPARE_ROWS:
            for id in [id for id in self._rows if snapshot.instance(id) is None]:
                del self._rows[id]
