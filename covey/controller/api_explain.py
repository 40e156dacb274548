"""/api/v1/vm/explain: why an instance stands where it stands (docs/operate/waiting.md). Beside the product's API."""

from collections.abc import Sequence

from covey import errors, model, serve
from covey.controller import display, views, waiting
from covey.decide import explain, placement
from covey.store import mirror


class NodeVerdict(views._View, frozen=True, kw_only=True):
    """`verdict`: free (it can take the instance), or why not in a word; `text` says it with numbers."""

    node_id: str
    node_name: str
    verdict: str
    text: str


class Explanation(views._View, frozen=True, kw_only=True):
    """`position` counts from 1 among the `waiting`, and is 0 when the instance does not wait for a node. `before`: the
    first of the `competitors`, which stand before it and may want the same nodes. `turn`: its priority now, after
    having waited; the lowest is served first."""

    instance_id: str
    instance_state: str
    text: str
    priority: int
    turn: int
    position: int
    waiting: int
    competitors: int
    before: list[str]
    nodes: list[NodeVerdict]


class ExplainApi:
    def __init__(self, mirror: mirror.Mirror, waiting: waiting.Waiting, display: display.Display) -> None:
        self._mirror = mirror
        self._waiting = waiting
        self._display = display

    def routes(self) -> Sequence[serve.Route]:
        return [serve.Route("GET", "/api/v1/vm/explain", self.explain)]

    async def explain(self, call: serve.Call) -> Explanation:
        id = call.query.get("id", "")
        if not id:
            raise errors.Refused("id: missing; name the instance in the query (?id=)")
        snapshot = await self._mirror.fresh()
        kept = snapshot.instance(id)
        if kept is None:
            raise errors.NotFound("Not found")
        talking = self._display.of(snapshot).talking(kept.noun.node)
        async with self._display.alone():
            return _shown(kept.noun, self._waiting.story(snapshot, kept, talking=talking))


def _shown(instance: model.Instance, story: explain.Story) -> Explanation:
    return Explanation(
        instance_id=instance.id,
        instance_state=instance.state,
        text=story.text,
        priority=instance.spec.priority,
        turn=placement.turn(instance),
        position=story.position,
        waiting=story.waiting,
        competitors=story.competitors,
        before=list(story.before),
        nodes=[
            NodeVerdict(
                node_id=verdict.node,
                node_name=verdict.name,
                verdict="free" if verdict.reason is None else verdict.reason.name.lower(),
                text=verdict.text,
            )
            for verdict in story.verdicts
        ],
    )
