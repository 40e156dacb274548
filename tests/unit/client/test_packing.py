"""Packing, holes, ranges that arrive in any order, and what is remembered of pushes: without a network."""

import random
from pathlib import Path

import pytest
from backports import zstd
from hypothesis import example, given, settings
from hypothesis import strategies as st

from covey import world
from covey.client import oci, packing, partial, remembered, sparse

TEXT = b"".join(b"line %d of a log that packs well\n" % number for number in range(60_000))
NOISE = random.Random(1).randbytes(3 << 20)
SIZE = 1 << 20


def blocks(path: Path) -> int:
    return path.stat().st_blocks * 512


def packed(tmp_path: Path, content: bytes) -> tuple[Path, packing.Packed]:
    (tmp_path / "source").write_bytes(content)
    form = packing.pack(tmp_path / "source", tmp_path / "packed")
    return tmp_path / "packed", form


def unpack(source: Path, target: Path, digest: str, size_bytes: int, at_once: int = 1000) -> None:
    unpacker = packing.Unpacker(target, digest, size_bytes)
    content = source.read_bytes()
    try:
        for start in range(0, len(content), at_once):
            unpacker.feed(content[start : start + at_once])
        unpacker.finish()
    finally:
        unpacker.close()


# ---- packing


def test_what_was_packed_comes_back(tmp_path: Path) -> None:
    source, form = packed(tmp_path, TEXT)
    assert (form.digest, form.size_bytes) == (oci.digest_of(source.read_bytes()), source.stat().st_size)
    assert form.size_bytes < len(TEXT) / 4
    unpack(source, tmp_path / "out", oci.digest_of(TEXT), len(TEXT))
    assert (tmp_path / "out").read_bytes() == TEXT


def test_the_same_content_packs_to_the_same_bytes_however_it_lies_on_the_disk(tmp_path: Path) -> None:
    content = TEXT + bytes(5 << 20) + TEXT
    _, form = packed(tmp_path, content)
    holes = tmp_path / "holes"
    with holes.open("wb") as file:
        sparse.write(file.fileno(), 0, content)
        file.truncate(len(content))
    assert blocks(holes) < len(content) - (4 << 20)
    for workers in (1, 3):
        assert packing.pack(holes, tmp_path / "again", workers=workers) == form
    assert packing.hash_file(holes) == (oci.digest_of(content), len(content))


@pytest.mark.parametrize(("content", "pays"), [(TEXT, True), (NOISE, False), (b"", False), (b"\0" * 9, False)])
def test_what_pays(tmp_path: Path, content: bytes, pays: bool) -> None:
    (tmp_path / "file").write_bytes(content)
    assert packing.worth(tmp_path / "file") is pays


def test_a_file_that_is_mostly_hole_pays(tmp_path: Path) -> None:
    with (tmp_path / "file").open("wb") as file:
        file.write(NOISE)
        file.truncate(40 << 20)
    assert packing.worth(tmp_path / "file")


@pytest.mark.parametrize(
    ("blob", "said"),
    [
        (zstd.compress(TEXT + b"more"), "longer than the"),
        (zstd.compress(TEXT[:-1]), "ends at"),
        (zstd.compress(TEXT[:-1] + b"x"), "but its template says"),
        (zstd.compress(TEXT)[:-9], "ends at"),
        (TEXT, "cannot be unpacked"),
        (b"", "ends at 0"),
        (zstd.compress(bytes(1 << 30)), "longer than the"),
    ],
)
def test_what_is_not_what_it_should_be_is_never_finished(tmp_path: Path, blob: bytes, said: str) -> None:
    (tmp_path / "blob").write_bytes(blob)
    with pytest.raises(packing.Damaged, match=said):
        unpack(tmp_path / "blob", tmp_path / "out", oci.digest_of(TEXT), len(TEXT))
    assert (tmp_path / "out").stat().st_size <= len(TEXT)


def test_a_blob_of_several_frames_is_unpacked(tmp_path: Path) -> None:
    """As other tools write them."""
    (tmp_path / "blob").write_bytes(zstd.compress(TEXT[:1000]) + zstd.compress(TEXT[1000:]))
    for at_once in (1, 1000, 1 << 20):
        unpack(tmp_path / "blob", tmp_path / "out", oci.digest_of(TEXT), len(TEXT), at_once)
    assert (tmp_path / "out").read_bytes() == TEXT


# ---- holes


@given(st.lists(st.tuples(st.booleans(), st.integers(1, 3 * sparse.BLOCK)), max_size=8), st.integers(5_000, 200_000))
@settings(deadline=None, max_examples=40)
def test_bytes_with_holes_are_the_same_bytes(
    tmp_path_factory: pytest.TempPathFactory, runs: object, limit: int
) -> None:
    assert isinstance(runs, list)
    content = b"".join(bytes(length) if hole else b"x" * length for hole, length in runs)
    path = tmp_path_factory.getbasetemp() / "holes"
    with path.open("w+b", buffering=0) as file:
        sparse.write(file.fileno(), 0, content)
        file.truncate(len(content))
        assert b"".join(bytes(piece) for piece in sparse.pieces(file.fileno(), 0, len(content), limit)) == content


# ---- ranges


@settings(deadline=None)
@example([(0, 10), (10, 20), (30, 20), (51, 1)])
@given(st.lists(st.tuples(st.integers(0, 60), st.integers(0, 20)), max_size=30))
def test_ranges_are_the_set_of_what_was_added(spans: list[tuple[int, int]]) -> None:
    ranges, model = partial.Ranges(), set[int]()
    for start, length in spans:
        ranges.add(start, start + length)
        model |= set(range(start, start + length))
    assert {number for start, end in ranges for number in range(start, end)} == model
    assert ranges.total == len(model)
    assert list(ranges) == sorted(ranges)
    missing = [number for number in range(50) if number not in model]
    gap = ranges.gap(7, 50)
    assert (gap is None) == (not missing)
    if gap is not None:
        assert gap[0] == missing[0]
        assert set(range(*gap)) <= set(missing) and len(range(*gap)) <= 7
    assert ranges.prefix == next((number for number in range(100) if number not in model), 0)


def take_all(coming: partial.Partial, content: bytes, limit: int = 100_000) -> int:
    """Fetch what is missing; how many bytes that were."""
    count = 0
    while (span := coming.take(limit)) is not None:
        coming.write(span[0], content[slice(*span)])
        count += span[1] - span[0]
    return count


@pytest.fixture
def part(tmp_path: Path) -> Path:
    return tmp_path / "x.part"


def opened(part: Path, content: bytes = NOISE[:SIZE], sync_bytes: int = 200_000) -> partial.Partial:
    return partial.Partial(part, oci.digest_of(content), len(content), sync_bytes=sync_bytes)


def test_ranges_in_any_order_make_the_file(part: Path) -> None:
    coming = opened(part)
    spans = []
    while (span := coming.take(70_000)) is not None:
        spans.append(span)
    random.Random(2).shuffle(spans)
    for start, end in spans:
        coming.write(start, NOISE[start:end])
        coming.hash_on()
    assert (coming.here_bytes, coming.found()) == (SIZE, oci.digest_of(NOISE[:SIZE]))
    coming.close()
    assert part.read_bytes() == NOISE[:SIZE]


def test_after_a_kill_only_what_was_recorded_counts(part: Path) -> None:
    dying = opened(part)
    dying.write(500_000, NOISE[500_000:750_000])  # recorded
    dying.write(0, NOISE[:100_000])  # not yet
    with partial.record_of(part).open("a") as record:
        record.write("800000 9")  # a torn line
    again = opened(part)
    assert again.resumed_bytes == 250_000
    assert take_all(again, NOISE[:SIZE]) == SIZE - 250_000
    assert again.found() == oci.digest_of(NOISE[:SIZE])
    again.close()
    dying.close()


def test_what_was_closed_is_all_there(part: Path) -> None:
    coming = opened(part)
    coming.write(0, NOISE[:1000])
    coming.close()
    coming.write(1000, b"too late")
    assert opened(part).resumed_bytes == 1000


@pytest.mark.parametrize(
    ("here", "record", "resumed"),
    [
        (NOISE[:1000], None, 1000),  # of an older version
        (NOISE[: SIZE + 1], None, 0),
        (NOISE[:SIZE], f"covey 1 {oci.digest_of(b'another')} {SIZE}\n0 {SIZE}\n", 0),
        (NOISE[:SIZE], "", SIZE),
        (NOISE[:1000], f"covey 1 {oci.digest_of(NOISE[:SIZE])} {SIZE}\n0 {SIZE}\n", 0),
        (NOISE[:SIZE], f"covey 1 {oci.digest_of(NOISE[:SIZE])} {SIZE}\n5 x\n-3 9\n0 {SIZE + 1}\n0 10\n\xff", 10),
    ],
)
def test_what_is_believed_of_a_partial_file(part: Path, here: bytes, record: str | None, resumed: int) -> None:
    part.write_bytes(here)
    if record is not None:
        partial.record_of(part).write_bytes(record.encode("latin-1"))
    coming = opened(part)
    assert coming.resumed_bytes == resumed
    take_all(coming, NOISE[:SIZE])
    assert coming.found() == oci.digest_of(NOISE[:SIZE])
    coming.close()


def test_zeros_stay_holes_and_an_empty_blob_is_one(part: Path) -> None:
    content = bytes(8 << 20)
    coming = opened(part, content)
    take_all(coming, content)
    assert coming.found() == oci.digest_of(content)
    coming.close()
    assert blocks(part) < 1 << 20 == SIZE
    empty = opened(part.with_name("y.part"), b"")
    assert (empty.take(10), empty.found()) == (None, oci.digest_of(b""))
    empty.close()


# ---- what is remembered


class Clock(world.System):
    ahead_s = 0.0

    def wall_ns(self) -> int:
        return super().wall_ns() + int(self.ahead_s * 1e9)


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_a_file_is_known_as_long_as_it_looks_the_same(tmp_path: Path, clock: Clock) -> None:
    notes, file = remembered.Notes(tmp_path / "notes", clock), tmp_path / "file"

    def learn() -> remembered.Known | None:
        notes.learn(file, remembered.look(file), "sha256:x", "sha256:y", 3)
        return remembered.Notes(tmp_path / "notes", clock).known(file)

    file.write_bytes(b"content")
    assert learn() is None, "it may change again without a trace"
    clock.ahead_s = 10
    found = learn()
    assert found is not None and (found.digest, found.packed, found.packed_bytes) == ("sha256:x", "sha256:y", 3)
    file.write_bytes(b"CONTENT")
    assert notes.known(file) is None
    notes.learn(file, "7 1 1 1 1", "sha256:z")
    assert notes.known(file) is None
    assert learn() is not None
    clock.ahead_s = 8 * 86400
    assert remembered.Notes(tmp_path / "notes", clock).known(file) is None


def test_a_session_is_one_process_s(tmp_path: Path, clock: Clock) -> None:
    notes = remembered.Notes(tmp_path / "notes", clock)
    first = remembered.session(notes, "key")
    first.remember("/v2/x/blobs/uploads/longer-than-the-next-one")
    first.remember("/v2/x/blobs/uploads/1")
    other = remembered.session(notes, "key")
    assert other.location == ""
    other.remember("/v2/x/blobs/uploads/2")
    other.close()
    first.close()
    again = remembered.session(notes, "key")
    assert again.location == "/v2/x/blobs/uploads/1"
    again.forget()
    again.close()
    third = remembered.session(notes, "key")
    assert third.location == ""
    third.close()


def test_two_that_pack_one_layer_do_not_meet_and_nothing_stays(tmp_path: Path, clock: Clock) -> None:
    notes = remembered.Notes(tmp_path / "notes", clock)
    digest = oci.digest_of(b"")
    with notes.packing(digest) as one, notes.packing(digest) as two:
        assert one != two
        one.write_bytes(b"1")
    with notes.packing(digest) as three:
        three.write_bytes(b"3")
        three.rename(notes.packed(digest))
    assert [path.name for path in (tmp_path / "notes/packed").iterdir()] == [notes.packed(digest).name]
