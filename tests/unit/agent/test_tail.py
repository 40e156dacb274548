"""The end of a stream is kept, whatever its length (safety S26)."""

from pathlib import Path

import pytest

from covey.agent import tail


@pytest.mark.parametrize("chunk", [1, 7, 10, 64])
@pytest.mark.parametrize("total", [0, 5, 10, 11, 100, 1000])
def test_keeps_exactly_the_last_bytes(tmp_path: Path, chunk: int, total: int) -> None:
    stream = bytes(number % 251 for number in range(total))
    kept = tail.Tail(tmp_path / "out", kept_bytes=10)
    for at in range(0, total, chunk):
        kept.append(stream[at : at + chunk])
        assert (tmp_path / "out").stat().st_size <= 20 + chunk
    kept.close()
    assert (tmp_path / "out").read_bytes() == stream[-10:]
    assert tail.last(tmp_path / "out", 4) == stream[-4:]
    part = tail.part(tmp_path / "out", 0, 1000)
    assert (part.data, part.offset, part.size) == (stream[-10:], max(0, total - 10), total)


def test_nothing_there(tmp_path: Path) -> None:
    assert tail.last(tmp_path / "missing") == b""


def test_parts_are_found_by_their_place_in_the_whole_stream(tmp_path: Path) -> None:
    """While it is written, too: what was cut off moves nothing (safety S26)."""
    path = tmp_path / "out"
    stream = bytes(number % 251 for number in range(1000))
    kept = tail.Tail(path, kept_bytes=10)
    for at in range(0, 1000, 7):
        kept.append(stream[at : at + 7])
        for offset in (0, at - 5, at, at + 100, -3):
            part = tail.part(path, offset, 4)
            assert part.size == min(at + 7, 1000)
            assert part.data == stream[: part.size][part.offset : part.offset + 4]
            assert part.offset >= min(offset, part.size)
    kept.close()


def test_after_a_gap_places_are_still_those_of_the_stream(tmp_path: Path) -> None:
    kept = tail.Tail(tmp_path / "out")
    kept.append(b"before")
    kept.forget(1000)
    kept.append(b"after")
    kept.close()
    part = tail.part(tmp_path / "out", 0, 100)
    assert (part.data, part.offset, part.size) == (b"after", 1000, 1005)
    tail.Tail(tmp_path / "out").close()  # the next reader begins at the beginning
    assert tail.part(tmp_path / "out", 0, 100).size == 0
