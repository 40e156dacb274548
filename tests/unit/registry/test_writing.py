"""A part of an upload: whichever way its bytes go to the disk, they are the same, in order, and hashed."""

import hashlib
import mmap
import random
from pathlib import Path

import pytest

from covey.registry import blobs, writing

SIZES = (1, 4095, 4096, 70_000, 1 << 18, (1 << 20) + 1, 2 << 20)


def _page(content: bytes) -> memoryview:
    """The content in memory that begins with a page."""
    memory = mmap.mmap(-1, len(content))
    memory.write(content)
    return memoryview(memory)


def _anything_fits(size_bytes: int) -> None:
    assert size_bytes >= 0


@pytest.mark.parametrize("seed", range(8))
def test_pieces_and_rooms_of_any_size_follow_each_other(tmp_path: Path, seed: int) -> None:
    draw = random.Random(seed)
    part = writing.Part(tmp_path / "part", _anything_fits)
    part.open()
    wanted = b""
    for _ in range(12):
        content = draw.randbytes(draw.choice(SIZES))
        if draw.random() < 0.7:
            part.write(_page(content))
            part.hash(memoryview(content))
        else:
            part.add([content[:1000], content[1000:]])
        wanted += content
    part.seal(fsync=True)
    part.close()
    assert part.path.read_bytes() == wanted
    assert part.size_bytes == len(wanted)
    assert part.sha256.hexdigest() == hashlib.sha256(wanted).hexdigest()


def test_memory_that_a_disk_cannot_take_as_it_is_goes_through_the_cache(tmp_path: Path) -> None:
    """As on a file system that takes the flag and then refuses each write."""
    part = writing.Part(tmp_path / "part", _anything_fits)
    part.open()
    wanted = b""
    for turn in range(3):
        content = bytes([turn + 1]) * (1 << 20)
        part.write(_page(b"." + content)[1:])
        wanted += content
    part.seal(fsync=False)
    part.close()
    assert part.path.read_bytes() == wanted


def test_no_room_is_said_before_anything_is_written(tmp_path: Path) -> None:
    def nothing_fits(size_bytes: int) -> None:
        raise blobs.DiskFull(f"{size_bytes} bytes do not fit")

    part = writing.Part(tmp_path / "part", nothing_fits)
    part.open()
    with pytest.raises(blobs.DiskFull):
        part.write(_page(b"x" * 4096))
    assert part.path.stat().st_size == 0
    part.close()
    assert not part.path.exists()


def test_nothing_is_written_to_a_part_that_has_ended(tmp_path: Path) -> None:
    part = writing.Part(tmp_path / "part", _anything_fits)
    part.open()
    part.close()
    with pytest.raises(blobs.Cut):
        part.write(_page(b"x" * 4096))
    with pytest.raises(blobs.Cut):
        part.seal(fsync=False)
