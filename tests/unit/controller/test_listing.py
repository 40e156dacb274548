"""Lists that filter and page beside the plain one, and the bytes that are kept of it."""

import asyncio
import json
import random
from typing import Any
from urllib import parse

import pytest

from covey import model, wire, world
from covey.controller import display, listing, presence, templates
from covey.store import base, codec, schema, view
from tests.support import nouns
from tests.unit.controller import cloud

S = model.State


def snapshot_of(*instances: model.Instance, drop: tuple[model.Instance, ...] = ()) -> view.Snapshot:
    return filled(view.Draft(), *instances, drop=drop).freeze()


def filled(draft: view.Draft, *instances: model.Instance, drop: tuple[model.Instance, ...] = ()) -> view.Draft:
    for noun in instances:
        draft.revision += 1
        kv = base.Kv(schema.instance(noun.id), codec.encode(noun, None), draft.revision, draft.revision)
        draft.apply(base.Change(kv.key, kv))
    for noun in drop:
        draft.revision += 1
        draft.apply(base.Change(schema.instance(noun.id), None))
    return draft


def selected(snapshot: view.Snapshot, **given: str) -> set[str]:
    return {kept.noun.id for kept in listing.select(snapshot, listing.query(given))}


def ids(*instances: model.Instance) -> set[str]:
    return {one.id for one in instances}


def pages(snapshot: view.Snapshot, cursor: str = "", **given: str) -> tuple[list[str], str]:
    asked = listing.query({**given, **({"cursor": cursor} if cursor else {})})
    found, cursor = listing.page(
        listing.select(snapshot, asked),
        lambda kept: (kept.noun.created_ns, kept.noun.id),
        asked.limit,
        asked.after,
    )
    return [kept.noun.id for kept in found], cursor


# ---- filters -------------------------------------------------------------------------------------------------------


def test_each_filter_alone_and_together() -> None:
    a = nouns.instance(external_id="job 7/é", spec=nouns.spec(template_name="mac"), state=S.STOPPED)
    b = nouns.instance(external_id="job 7/é", spec=nouns.spec(group="g1"), state=S.SCHEDULING)
    c = nouns.instance(spec=nouns.spec(group="g1", template="t-2"), state=S.SCHEDULING)
    snapshot = snapshot_of(a, b, c)
    assert selected(snapshot) == ids(a, b, c)
    assert selected(snapshot, external_id="job 7/é") == ids(a, b)
    assert selected(snapshot, template="mac") == ids(a)
    assert selected(snapshot, template="t-2") == ids(c)
    assert selected(snapshot, group="g1") == ids(b, c)
    assert selected(snapshot, state="scheduling,Stopped") == ids(a, b, c)
    assert selected(snapshot, state="Scheduling", external_id="job 7/é") == ids(b)
    assert selected(snapshot, state="Started") == set()


def test_started_without_its_facts_is_found_as_what_it_is_shown_as() -> None:
    half, whole = nouns.instance(state=S.STARTED), nouns.instance(state=S.STARTED, vm=nouns.vm())
    snapshot = snapshot_of(half, whole)
    assert selected(snapshot, state="Pulling") == ids(half)
    assert selected(snapshot, state="Started") == ids(whole)


def test_the_indexes_follow_changes_and_old_snapshots_stay_as_they_were() -> None:
    draft, one = view.Draft(), nouns.instance(external_id="old", spec=nouns.spec(group="g"))
    before = filled(draft, one).freeze()
    moved = model.Instance(**{name: getattr(one, name) for name in one.__struct_fields__} | {"external_id": "new"})
    after = filled(draft, moved).freeze()
    gone = filled(draft, drop=(one,)).freeze()
    assert [selected(shot, external_id="old") for shot in (before, after, gone)] == [ids(one), set(), set()]
    assert [selected(shot, external_id="new") for shot in (before, after, gone)] == [set(), ids(one), set()]
    assert [selected(shot, group="g") for shot in (before, after, gone)] == [ids(one), ids(one), set()]


class Untouchable(view.Table[Any]):
    """The table of all instances, which nobody may walk."""

    def values(self) -> Any:
        raise AssertionError("all instances were walked")

    keys = values


@pytest.mark.parametrize("given", [{"external_id": "x"}, {"template": "t"}, {"group": "g"}, {"state": "Error"}])
def test_a_filtered_list_walks_no_other_instances(given: dict[str, str]) -> None:
    found = nouns.instance(external_id="x", state=S.ERROR, spec=nouns.spec(template="t", group="g"))
    snapshot = snapshot_of(found, *(nouns.instance(state=S.SCHEDULING) for _ in range(100)))
    table, get, walked = Untouchable(), snapshot._instances.get, set[str]()

    def note(key: str) -> Any:
        walked.add(key)
        return get(key)

    table.get = note  # type: ignore[method-assign]
    snapshot._instances = table
    assert selected(snapshot, **given) == ids(found)
    assert walked == {found.id}


# ---- pages ---------------------------------------------------------------------------------------------------------


def test_pages_show_each_instance_once_that_was_there_all_the_while() -> None:
    chance, draft = random.Random(7), view.Draft()
    standing = [nouns.instance() for _ in range(60)]
    mortal = [nouns.instance() for _ in range(40)]
    filled(draft, *standing, *mortal)
    seen: list[str] = []
    cursor = ""
    for _ in range(1000):
        found, cursor = pages(draft.freeze(), cursor, limit="7")
        seen += found
        if not cursor:
            break
        filled(draft, nouns.instance(), drop=tuple(chance.sample(mortal, 3)))
        for one in chance.sample(standing, 5):  # a change of what exists moves nothing
            filled(draft, model.Instance(**{**_fields(one), "state": S.ERROR}))
    assert not cursor
    assert len(seen) == len(set(seen))
    assert ids(*standing) <= set(seen)


def _fields(one: model.Instance) -> dict[str, Any]:
    return {name: getattr(one, name) for name in one.__struct_fields__}


def test_the_last_page_has_no_cursor_and_a_page_of_instances_born_at_once_ends_in_their_middle() -> None:
    twins = [nouns.instance(created_ns=5) for _ in range(4)]
    snapshot = snapshot_of(*twins)
    first, cursor = pages(snapshot, limit="2")
    second, end = pages(snapshot, cursor, limit="2")
    assert (sorted(first + second), end) == (sorted(one.id for one in twins), "")
    assert pages(snapshot, limit="4")[1] == ""


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"state": "Runing"}, "state: there is no state 'Runing'; there are Scheduling, Pulling, Started"),
        ({"state": ""}, "state: empty"),
        ({"external_id": ""}, "external_id: empty"),
        ({"limit": "0"}, "limit: '0' is not a whole number between 1 and 1000"),
        ({"limit": "1001"}, "limit: '1001' is not"),
        ({"limit": "-1"}, "limit: '-1' is not"),
        ({"limit": "²"}, "limit: '²' is not"),
        ({"limit": "9" * 5000}, "limit: "),
        ({"cursor": "nonsense"}, "cursor: no list has given this one"),
        ({"cursor": "é"}, "cursor: no list has given this one"),
        ({"cursor": "WzFd"}, "cursor: no list has given this one"),  # [1]
        ({"cursor": ""}, "cursor: no list has given this one"),
    ],
)
async def test_a_bad_value_is_refused_by_name(house: cloud.Cloud, given: dict[str, str], says: str) -> None:
    message = await house.api.fail("GET", f"/api/v1/vm?{parse.urlencode(given)}")
    assert message.startswith(says)
    if {"external_id", "template"}.isdisjoint(given):
        assert (await house.api.fail("GET", f"/api/v1/node?{parse.urlencode(given)}")).startswith(says[:12])


# ---- over HTTP -----------------------------------------------------------------------------------------------------


async def test_pages_go_on_at_any_replica(pair: cloud.Cloud) -> None:
    born = [(await pair.apis[number % 2].start(external_id=f"job-{number % 3}"))[0] for number in range(9)]
    plain = await pair.api.ok("GET", "/api/v1/vm")
    assert [one["instance_id"] for one in plain] == born
    seen: list[Any] = []
    path = "/api/v1/vm?limit=2"
    for turn in range(5):
        async with pair.apis[turn % 2].http.get(path) as got:
            seen += (await got.json())["body"]
            path = f"/api/v1/vm?limit=2&cursor={got.headers.get(wire.CURSOR_HEADER, '')}"
    assert path.endswith("cursor=")
    assert seen == plain
    (one, *_) = found = await pair.apis[1].ok("GET", "/api/v1/vm?external_id=job-2&state=Scheduling")
    assert [one["instance_id"] for one in found] == born[2::3]
    assert one["external_id"] == one["vm"]["external_id"] == "job-2"


async def test_nodes_filter_and_page(house: cloud.Cloud) -> None:
    nodes = [(await cloud.Agent(house.api, host_key=f"key-{n}", secret=f"s-{n}").join()).node for n in range(3)]
    await house.api.ok("POST", "/api/v1/node/config", {"node_id": nodes[1], "drain_mode": True})
    listed = await house.api.ok("GET", "/api/v1/node?state=Drain%20Mode")
    assert [one["node_id"] for one in listed] == [nodes[1]]
    assert await house.api.ok("GET", "/api/v1/node?state=drain") == listed
    assert await house.api.ok("GET", "/api/v1/node?group=none") == []
    async with house.api.http.get("/api/v1/node?limit=2") as got:
        first = [one["node_id"] for one in (await got.json())["body"]]
        cursor = got.headers[wire.CURSOR_HEADER]
    rest = await house.api.ok("GET", f"/api/v1/node?limit=2&cursor={cursor}")
    assert first + [one["node_id"] for one in rest] == nodes


# ---- bytes that are kept -------------------------------------------------------------------------------------------


async def test_the_kept_bytes_are_those_of_the_instance_as_it_is_now(house: cloud.Cloud) -> None:
    """A change, a waiting message, a silent node: the list says what the single answer says, each time."""
    (id,) = await house.api.start(name="né")

    async def both() -> tuple[Any, Any]:
        (row,) = await house.api.ok("GET", "/api/v1/vm")
        return row["vm"], await house.api.ok("GET", f"/api/v1/vm?id={id}")

    listed, single = await both()
    assert listed == single
    assert "Waiting" in listed["message"]
    await house.api.ok("PUT", f"/api/v1/vm?id={id}", {"metadata": {"a": 1}})
    listed, single = await both()
    assert listed == single
    assert listed["metadata"] == {"a": 1}
    agent = cloud.Agent(house.api)
    await agent.join()
    await agent.work("run")  # type: ignore[arg-type]
    listed, single = await both()
    assert listed == single
    assert listed["node_id"] == agent.me.node


def shown(talking: set[str]) -> display.Display:
    class Seen(presence.Presence):
        def present(self, snapshot: view.Snapshot, node: model.NodeId, timeout_s: float) -> bool:
            return node in talking

    spans = display.Spans(30, 30)
    return display.Display(Seen(world.System()), templates.Templates([]), lambda *_: "", spans, "")


async def test_that_a_node_fell_silent_shows_although_the_instance_did_not_change() -> None:
    one = nouns.instance(state=S.STARTED, vm=nouns.vm(), node="n-1", epoch=1)
    talking, now_ns = {"n-1"}, [0]
    lists = listing.Listing(shown(talking), lambda: now_ns[0])

    async def message() -> str:
        raw = (await lists.whole(snapshot_of(one))).body
        assert isinstance(raw, bytes)
        return str(json.loads(raw)["body"][0]["vm"].get("message", ""))

    assert await message() == ""
    talking.clear()
    now_ns[0] += 1_000_000_000
    assert await message() == "node n-1 is not communicating"


async def test_who_asks_at_the_same_moment_gets_the_same_bytes_and_what_is_forgotten_is_let_go() -> None:
    many = [nouns.instance(state=S.TERMINATED) for _ in range(1500)]
    lists, snapshot = listing.Listing(shown(set()), lambda: 0), snapshot_of(*many)
    first, second = await asyncio.gather(lists.whole(snapshot), lists.whole(snapshot))
    assert first.body is second.body
    assert len(lists._rows) == 1500
    draft = filled(view.Draft(), many[0])
    draft.revision = 10_000
    await lists.whole(draft.freeze())
    assert len(lists._rows) == 1


async def test_a_large_answer_arrives_whole_also_when_only_its_head_is_asked_for(house: cloud.Cloud) -> None:
    born = [id for _ in range(7) for id in await house.api.start(count=100)]
    listed = await house.api.ok("GET", "/api/v1/vm")
    assert {one["instance_id"] for one in listed} == set(born)
    async with house.api.http.head("/api/v1/vm") as got:
        assert int(got.headers["Content-Length"]) > 1 << 18
        assert await got.read() == b""
    assert len(await house.api.ok("GET", "/api/v1/vm")) == 700, "the connection can be used again"
