"""What a newer program wrote comes back as it was (safety S27)."""

import msgspec
import pytest

from covey import model
from covey.store import base, codec, commit_instances, schema
from tests.support import cloud, nouns


def kv(value: object) -> base.Kv:
    return base.Kv("/covey/x", msgspec.json.encode(value), 1, 2)


def test_unknown_fields_are_written_back_at_every_depth() -> None:
    stored = {
        "node": "n",
        "weather": "fine",
        "claims": [
            {"instance": "a", "epoch": 1, "colour": "red"},
            {"instance": "b", "epoch": 2, "colour": {"deep": [1, None]}},
        ],
    }
    kept = codec.decode(kv(stored), model.Ledger)
    changed = msgspec.structs.replace(kept.noun, claims=kept.noun.claims[1:], tx="t")
    assert msgspec.json.decode(codec.encode(changed, kept)) == {
        "node": "n",
        "tx": "t",
        "weather": "fine",
        "claims": [{"instance": "b", "epoch": 2, "colour": {"deep": [1, None]}}],
    }


def test_a_known_field_set_back_to_its_default_is_gone() -> None:
    instance = msgspec.to_builtins(nouns.instance(message="old")) | {"future": 1}
    kept = codec.decode(kv(instance), model.Instance)
    written = msgspec.json.decode(codec.encode(msgspec.structs.replace(kept.noun, message=""), kept))
    assert "message" not in written
    assert written["future"] == 1


def test_unknown_fields_of_nested_nouns() -> None:
    instance = msgspec.to_builtins(nouns.instance())
    instance["spec"]["future"] = "kept"
    kept = codec.decode(kv(instance), model.Instance)
    assert msgspec.json.decode(codec.encode(kept.noun, kept))["spec"]["future"] == "kept"


def test_nothing_unknown_costs_nothing() -> None:
    kept = codec.decode(kv(nouns.instance()), model.Instance)
    assert kept.extra == b""


@pytest.mark.parametrize("value", [b"", b"{", b"[]", b'{"id": 7}', b"\xff"])
def test_what_is_no_noun_is_broken(value: bytes) -> None:
    with pytest.raises(codec.Broken):
        codec.decode(base.Kv("/covey/x", value, 1, 1), model.Instance)


async def test_a_commit_keeps_what_a_newer_program_wrote() -> None:
    async with cloud.running() as c:
        (id,) = await c.create()
        stored = msgspec.json.decode((await c.values(schema.instance(id)))[0].value) | {"future": {"a": 1}}
        await c.store.commit(base.Txn((), (base.Put(schema.instance(id), msgspec.json.encode(stored)),)))
        await commit_instances.update(c.writer, await c.look(), model.InstanceId(id), name="n")
        await c.terminate(id)
        written = msgspec.json.decode((await c.values(schema.instance(id)))[0].value)
        assert (written["future"], written["name"], written["state"]) == ({"a": 1}, "n", "Terminated")
