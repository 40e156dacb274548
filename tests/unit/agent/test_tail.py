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


def test_nothing_there(tmp_path: Path) -> None:
    assert tail.last(tmp_path / "missing") == b""
