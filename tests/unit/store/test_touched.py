"""Which nodes' polls are looked at again after a change: those whose work changed (safety S2: they miss no order)."""

import msgspec
import pytest

from covey import model
from covey.store import base, codec, schema, view
from tests.support import nouns

State = model.State
OLD = nouns.instance(node=model.NodeId("a"), epoch=1, state=State.PULLING)


def touched(*states: model.Instance | None) -> set[str]:
    """The nodes that the last change touches."""
    draft = view.Draft()
    for revision, noun in enumerate(states, 1):
        draft.touched.clear()
        key = schema.instance(OLD.id)
        kv = None if noun is None else base.Kv(key, codec.encode(noun), 1, revision)
        draft.apply(base.Change(key, kv))
    return draft.touched


@pytest.mark.parametrize(
    ("changes", "nodes"),
    [
        ({"state": State.TERMINATING}, {"a"}),
        ({"state": State.STOPPING}, {"a"}),
        ({"state": State.ERROR}, {"a"}),
        ({"state": State.TERMINATED}, {"a"}),
        ({"epoch": 2}, {"a"}),
        ({"node": model.NodeId("b"), "epoch": 2}, {"a", "b"}),
        ({"node": model.NOWHERE, "state": State.SCHEDULING}, {"a"}),
        ({"acknowledged": True}, set()),
        ({"progress": 0.5}, set()),
        ({"state": State.STARTED}, set()),
    ],
)
def test_a_node_is_touched_when_its_work_changes(changes: dict[str, object], nodes: set[str]) -> None:
    assert touched(OLD, msgspec.structs.replace(OLD, **changes)) == nodes


def test_a_node_is_touched_when_its_work_comes_and_goes() -> None:
    assert touched(OLD) == {"a"}
    assert touched(OLD, None) == {"a"}
