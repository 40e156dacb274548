"""Layers come from other nodes: verified, at most once from the registry, and never at the price of a wrong byte."""

import asyncio
import contextlib
import os
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import NamedTuple

import msgspec
import pytest
from backports import zstd

from covey import errors
from covey.agent import neighbours, passing, sharing
from covey.client import oci, partial
from tests.support import registry
from tests.unit.agent import street, test_images

MIB = 1 << 20
BASE = os.urandom(3 * MIB)
PLAIN = b"".join(os.urandom(1000) + bytes(1000) for _ in range(1500))
MANIFEST_BYTES = 20_000  # of manifest, config and heads: all that may leave the registry beside layers


class Town(NamedTuple):
    street: street.Street
    library: test_images.Library


@pytest.fixture
async def town(tmp_path: Path) -> AsyncIterator[Town]:
    async with (
        registry.serving(tmp_path / "registry") as server,
        registry.talking(server) as talk,
        street.of(tmp_path / "nodes", server) as made,
    ):
        yield Town(made, test_images.Library(server, test_images.Source(talk), tmp_path))


# ---- what helps ----------------------------------------------------------------------------------------------------


async def test_a_layer_comes_from_a_node_that_has_it(town: Town) -> None:
    template, digest = await town.library.push(BASE, b"top")
    a, b = await town.street.node("a"), await town.street.node("b")
    await a.get(template, digest)
    b.knows(digest, a)
    before = town.street.registry_bytes
    assert await b.get(template, digest) == [BASE, b"top"]
    assert town.street.registry_bytes - before < MANIFEST_BYTES
    assert a.server.sent_bytes == len(BASE) + 3


async def test_a_packed_layer_comes_unpacked_from_a_node_that_has_it(town: Town) -> None:
    template, digest = await town.library.push_packed(PLAIN, zstd.compress(PLAIN))
    a, b = await town.street.node("a"), await town.street.node("b")
    await a.get(template, digest)
    b.knows(digest, a)
    before = town.street.registry_bytes
    assert await b.get(template, digest) == [PLAIN]
    assert town.street.registry_bytes - before < MANIFEST_BYTES
    assert a.server.sent_bytes == len(PLAIN)


@pytest.mark.parametrize("packed", [False, True])
async def test_of_nodes_that_pull_at_once_each_passes_on_what_it_receives(town: Town, packed: bool) -> None:
    blob = zstd.compress(PLAIN)
    template, digest = await (town.library.push_packed(PLAIN, blob) if packed else town.library.push(BASE))
    nodes = [await town.street.node(f"n{number}") for number in range(5)]
    for number, node in enumerate(nodes[1:], 1):
        node.knows(digest, *reversed(nodes[max(number - 3, 0) : number]))
    before = town.street.registry_bytes
    found = await asyncio.gather(*(node.get(template, digest) for node in nodes))
    assert found == [[PLAIN if packed else BASE]] * 5
    size = len(blob) if packed else len(BASE)
    assert town.street.registry_bytes - before < size + 5 * MANIFEST_BYTES
    assert all(node.server.sent_bytes >= size for node in nodes[:-1])


async def test_what_an_earlier_try_left_is_not_fetched_again(town: Town) -> None:
    template, digest = await town.library.push(BASE)
    a, b = await town.street.node("a"), await town.street.node("b")
    await a.get(template, digest)
    b.knows(digest, a)
    part = b.cache._incoming / (oci.digest_of(BASE).removeprefix("sha256:") + ".part")
    part.write_bytes(BASE[: 2 * MIB])
    assert await b.get(template, digest) == [BASE]
    assert a.server.sent_bytes == len(BASE) - 2 * MIB


async def test_all_nodes_together_get_no_more_than_the_limit(town: Town) -> None:
    template, digest = await town.library.push(BASE)
    a = await town.street.node("a", limit_bytes_s=2 * MIB)
    others = [await town.street.node(name) for name in ("b", "c")]
    await a.get(template, digest)
    for other in others:
        other.knows(digest, a)
    began_s = time.monotonic()
    await asyncio.gather(*(other.get(template, digest) for other in others))
    assert a.server.sent_bytes == 2 * len(BASE)
    assert time.monotonic() - began_s > 2.5  # 6 MiB at 2 MiB a second, less what goes out at first


@pytest.mark.parametrize("packed", [False, True])
async def test_while_no_registry_answers_a_template_comes_from_a_node_that_has_it(town: Town, packed: bool) -> None:
    template, digest = await (
        town.library.push_packed(PLAIN, zstd.compress(PLAIN)) if packed else town.library.push(BASE)
    )
    a, b, c = [await town.street.node(name) for name in "abc"]
    await a.get(template, digest)
    await town.street.cut_off_the_registry()
    for node, one in ((b, a), (c, b)):
        node.knows(digest, one)
        assert await node.get(template, digest) == [PLAIN if packed else BASE]


async def test_a_registry_that_says_nothing_is_not_waited_for_to_its_end(town: Town) -> None:
    """Manifest and config come from a node that has them, while the registry is still being asked."""
    template, digest = await town.library.push(BASE)
    a = await town.street.node("a")
    b = await town.street.node("b", msgspec.structs.replace(street.PATIENT, paper_s=0.1))
    await a.get(template, digest)
    b.knows(digest, a)
    town.street.silence_the_registry(b)
    assert await b.get(template, digest) == [BASE]


async def test_a_neighbour_that_says_nothing_keeps_no_manifest_of_the_registry_waiting(town: Town) -> None:
    _, digest = await town.library.push(BASE)
    b = await town.street.node("b", msgspec.structs.replace(street.PATIENT, paper_s=0.0))
    b.knows(digest, await town.street.let_in(street.Silent("stranger", b"")))
    async with asyncio.timeout(street.PATIENT.answer_s / 2):
        assert await b.cache._paper(digest, digest, lambda: _soon(b"manifest")) == b"manifest"


async def _soon(content: bytes) -> bytes:
    await asyncio.sleep(0.2)
    return content


async def test_a_paper_that_is_wrong_is_none(town: Town) -> None:
    template, digest = await town.library.push(BASE)
    b = await town.street.node("b")
    b.knows(digest, await town.street.let_in(street.Stranger("liar", b"{}")))
    await town.street.cut_off_the_registry()
    with pytest.raises(errors.RemoteError):
        await b.get(template, digest)


# ---- what does not -------------------------------------------------------------------------------------------------


async def test_a_lying_neighbour_costs_one_more_copy_and_is_not_asked_again(town: Town) -> None:
    template, digest = await town.library.push(BASE)
    b = await town.street.node("b")
    liar = await town.street.let_in(street.Stranger("liar", os.urandom(len(BASE))))
    b.knows(digest, liar)
    assert await b.get(template, digest) == [BASE]
    assert liar.asked
    assert b.near.of(digest) == []
    b.clock.ahead_ns += int(neighbours.Limits().banned_s * 1e9) + 1
    assert len(b.near.of(digest)) == 1


@pytest.mark.parametrize("unpacked", [False, True])
async def test_wrong_bytes_of_a_packed_layer_do_not_make_its_template_unusable(town: Town, unpacked: bool) -> None:
    blob = zstd.compress(PLAIN)
    template, digest = await town.library.push_packed(PLAIN, blob)
    b = await town.street.node("b")
    liar = await town.street.let_in(street.Stranger("liar", os.urandom(len(PLAIN if unpacked else blob))))
    b.knows(digest, liar)
    assert await b.get(template, digest) == [PLAIN]
    assert liar.asked > 1


async def test_a_liar_at_the_beginning_of_a_chain_spoils_nothing_at_its_end(town: Town) -> None:
    template, digest = await town.library.push(BASE)
    liar = await town.street.let_in(street.Stranger("liar", os.urandom(len(BASE))))
    nodes = [await town.street.node(f"n{number}") for number in range(4)]
    for node, one in zip(nodes, [liar, *nodes], strict=False):
        node.knows(digest, one)
    before = town.street.registry_bytes
    found = await asyncio.gather(*(node.get(template, digest) for node in nodes))
    assert found == [[BASE]] * 4
    assert town.street.registry_bytes - before < len(BASE) + 4 * MANIFEST_BYTES
    assert [len(node.near.of(digest)) for node in nodes] == [0, 1, 1, 1]  # the liar alone is to blame


@pytest.mark.parametrize("kind", [street.Silent, street.Quiet, street.Slow, street.Cut])
async def test_one_that_is_dead_frozen_slow_or_breaks_off_costs_seconds(
    town: Town, kind: type[street.Stranger]
) -> None:
    template, digest = await town.library.push(BASE)
    hasty = msgspec.structs.replace(street.HASTY, pace_s=0.5)
    b = await town.street.node("b", hasty)
    b.knows(digest, await town.street.let_in(kind("stranger", BASE)))
    assert await b.get(template, digest) == [BASE]


@pytest.mark.parametrize("kind", [street.Slow, street.Waiting])
async def test_one_that_is_slow_is_left_unless_it_has_no_more_itself(
    town: Town, tmp_path: Path, kind: type[street.Stranger]
) -> None:
    """All nodes of a chain wait for its beginning: if they left when that is slow, all would make it slower."""
    digest = oci.digest_of(BASE)
    b = await town.street.node("b", msgspec.structs.replace(street.PATIENT, pace_s=0.3))
    b.knows("template", await town.street.let_in(kind("slow", BASE)))
    part = partial.Partial(tmp_path / "part", digest, len(BASE))
    with b.near.download("template", digest, alone=False) as download:
        download.begins(part)
        async for piece in download.pieces(0, 40):
            part.write(part.here_bytes, piece)
    assert (part.here_bytes == 40) is (kind is street.Waiting)
    part.close()


async def test_the_next_one_goes_on_where_the_first_ended(town: Town) -> None:
    template, digest = await town.library.push(BASE)
    a, b = await town.street.node("a"), await town.street.node("b", street.HASTY)
    gone = street.Neighbour("gone")
    gone.url = "http://127.0.0.1:1"
    await a.get(template, digest)
    b.knows(digest, gone, await town.street.let_in(street.Silent("silent", BASE)), a)
    before = town.street.registry_bytes
    assert await b.get(template, digest) == [BASE]
    assert town.street.registry_bytes - before < MANIFEST_BYTES


async def test_the_end_is_held_back_until_the_digest_is_right(tmp_path: Path) -> None:
    part = partial.Partial(tmp_path / "part", oci.digest_of(BASE), len(BASE))
    one = passing.Passing(part)
    part.write(0, BASE)
    got = bytearray()

    async def read() -> None:
        async for piece in one.pieces(0, len(BASE)):
            got.extend(piece)

    reading = asyncio.create_task(read())
    while len(got) < len(BASE) - passing.HELD_BACK:
        await asyncio.sleep(0.01)
    await asyncio.sleep(0.2)
    assert got == BASE[: -passing.HELD_BACK] and not reading.done()
    one.verified()
    await reading
    assert got == BASE
    one.close()
    part.close()


async def test_who_reads_what_turns_out_wrong_is_cut_off(tmp_path: Path) -> None:
    part = partial.Partial(tmp_path / "part", oci.digest_of(BASE), len(BASE))
    one = passing.Passing(part)
    part.write(0, os.urandom(len(BASE)))
    reading = asyncio.create_task(anext(one.pieces(len(BASE) - 10, len(BASE))))
    await asyncio.sleep(0.1)
    one.broken()
    with pytest.raises(ConnectionResetError):
        await reading
    part.close()


# ---- who may -------------------------------------------------------------------------------------------------------


async def test_without_a_ticket_for_this_node_and_template_nothing_is_said(town: Town) -> None:
    template, digest = await town.library.push(BASE)
    a, b = await town.street.node("a"), await town.street.node("b")
    await a.get(template, digest)
    blob = oci.digest_of(BASE)
    good = f"{neighbours.SCHEME} {a.ticket('b', digest)}"
    assert await a.ask(digest, blob, good) == (206, BASE[:10])
    assert await a.ask(digest, blob, good, "bytes=100-199") == (206, BASE[100:200])
    assert (await a.ask(digest, blob, good, f"bytes=5-{len(BASE)}"))[0] == 416
    for bad in ("", "Bearer " + a.ticket("b", digest), f"{neighbours.SCHEME} {b.ticket('b', digest)}", good[:-1]):
        assert (await a.ask(digest, blob, bad))[0] == 403
        assert (await a.ask(digest, blob, bad, method="HEAD"))[0] == 403


async def test_a_ticket_opens_no_other_template_and_no_layer_of_another_one(town: Town) -> None:
    template, digest = await town.library.push(BASE)
    other, hidden = await town.library.push(b"not for everybody")
    a = await town.street.node("a")
    await a.get(template, digest)
    await a.cache.get("vm.2", other, hidden, lambda _: None)
    shown = f"{neighbours.SCHEME} {a.ticket('b', digest)}"
    secret = oci.digest_of(b"not for everybody")
    assert (await a.ask(hidden, secret, shown))[0] == 403
    assert (await a.ask(digest, secret, shown))[0] == 403
    assert (await a.ask(digest, "../../node.json", shown))[0] in (403, 404)
    unknown = "sha256:" + "0" * 64
    assert (await a.ask(unknown, secret, f"{neighbours.SCHEME} {a.ticket('b', unknown)}"))[0] == 404


async def test_a_ticket_grows_old_by_the_clock_of_the_node_that_serves(town: Town) -> None:
    """Safety S9: no two clocks are compared."""
    template, digest = await town.library.push(BASE)
    a = await town.street.node("a")
    await a.get(template, digest)
    shown = f"{neighbours.SCHEME} {a.ticket('b', digest)}"
    a.near.heard(street.NONCE)
    a.clock.ahead_ns += int((sharing.TICKET_S + 10) * 1e9)
    assert (await a.ask(digest, oci.digest_of(BASE), shown))[0] == 206  # the nonce is still the newest
    a.nonce = "the next hour's"
    assert (await a.ask(digest, oci.digest_of(BASE), shown))[0] == 403
    fresh = f"{neighbours.SCHEME} {a.ticket('b', digest, 'one that only the controller knows yet')}"
    assert (await a.ask(digest, oci.digest_of(BASE), fresh))[0] == 206


async def test_a_node_without_a_session_shares_nothing(town: Town) -> None:
    template, digest = await town.library.push(BASE)
    a = await town.street.node("a")
    await a.get(template, digest)
    a.key = b""
    shown = f"{neighbours.SCHEME} {a.ticket('b', digest)}"
    assert (await a.ask(digest, oci.digest_of(BASE), shown))[0] == 403


async def test_a_few_nodes_are_served_at_once(town: Town) -> None:
    template, digest = await town.library.push(BASE)
    a = await town.street.node("a", limit_bytes_s=MIB // 16, askers=1)
    b = await town.street.node("b")
    await a.get(template, digest)
    b.knows(digest, a)
    getting = asyncio.create_task(b.get(template, digest))
    while not a.server.sent_bytes:
        await asyncio.sleep(0.01)
    assert (await a.ask(digest, oci.digest_of(BASE), f"{neighbours.SCHEME} {a.ticket('c', digest)}"))[0] == 503
    getting.cancel()
    await asyncio.gather(getting, return_exceptions=True)


async def test_strangers_with_many_connections_take_no_files_of_the_agent(town: Town) -> None:
    a = await town.street.node("a")
    opened = [await asyncio.open_connection("127.0.0.1", a.near.port) for _ in range(sharing._CONNECTIONS)]
    reader, writer = await asyncio.open_connection("127.0.0.1", a.near.port)
    with contextlib.suppress(ConnectionResetError):
        assert await reader.read() == b""
    for _, other in [*opened, (reader, writer)]:
        other.transport.abort()
