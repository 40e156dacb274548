"""Layers packed by zstd: when that pays, how, and back again.

A layer travels and is stored packed (media type ``…+zstd``) when packing takes a tenth off it at least, as a few
samples of it say beforehand and the whole says afterwards. The packed bytes depend on the content alone, not on the
machine or on how it was read, so that a repeated push finds them in the registry. The other way, a layer is unpacked
into a file with holes, never to more bytes than its template says (a small blob may claim to hold petabytes), and is
what its template says or does not appear.

Blocking: used in worker threads. Memory is constant.
"""

import contextlib
import hashlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from covey import errors
from covey.client import long_work, oci, sparse

if sys.version_info >= (3, 14):  # pragma: no cover
    from compression import zstd
else:
    from backports import zstd

LEVEL = 3
WORTH = 0.9  # packed bytes per byte: above, a layer stays as it is
_SAMPLES, _SAMPLE = 16, 256 << 10
_READ = 1 << 20
_WORKERS = 4  # more threads take more memory; from one on, their number does not change what comes out
_WINDOW_LOG = 27  # of what is unpacked: 128 MiB, the most that zstd's own command takes by default
_REMEDY = "push the template again"


class Damaged(errors.CoveyError):
    """A blob is what its digest says, but what it holds is not the layer that its template promises: no other server
    and no later try will help."""


class Packed(NamedTuple):
    digest: str
    size_bytes: int


def worth(path: Path) -> bool:
    """Whether packing pays, judged from samples spread over the file; holes are part of it."""
    with path.open("rb", buffering=0) as stream:
        size = os.fstat(stream.fileno()).st_size
        count = min(_SAMPLES, max(1, size // _SAMPLE))
        taken = packed = 0
        for index in range(count):
            sample = os.pread(stream.fileno(), _SAMPLE, index * size // count)
            taken += len(sample)
            packed += len(zstd.compress(sample, LEVEL))
    return taken > 0 and packed <= taken * WORTH


def _ignore(_: int) -> None:
    """Progress that nobody wants."""


def pack(source: Path, target: Path, moved: long_work.Moved = _ignore, *, workers: int = 0) -> Packed:
    """Pack a file into another one. `moved` is told the bytes that were read; `workers` 0: as many as are of use."""
    options: dict[int, int] = {
        zstd.CompressionParameter.compression_level: LEVEL,
        zstd.CompressionParameter.checksum_flag: 1,
        zstd.CompressionParameter.nb_workers: workers or min(_WORKERS, os.cpu_count() or 1),
    }
    packer = zstd.ZstdCompressor(options=options)
    digest = hashlib.sha256()
    size = read = 0
    with source.open("rb", buffering=0) as stream, target.open("wb") as out:
        end = os.fstat(stream.fileno()).st_size
        for piece in _then(sparse.pieces(stream.fileno(), 0, end, _READ)):
            packed = packer.flush() if piece is None else packer.compress(piece)
            digest.update(packed)
            out.write(packed)
            size += len(packed)
            read += 0 if piece is None else len(piece)
            moved(read)
    return Packed(f"sha256:{digest.hexdigest()}", size)


def _then(pieces: Iterator[bytes | memoryview]) -> Iterator[bytes | memoryview | None]:
    """The pieces, and None at their end."""
    yield from pieces
    yield None


def unpack(source: Path, target: Path, digest: str, size_bytes: int, moved: long_work.Moved = _ignore) -> None:
    """Unpack a file into another one, with holes, durable when this returns. Raises Damaged, and then leaves none."""
    try:
        found = _unpack(source, target, size_bytes, oci.algorithm_of(digest), moved)
        if found != digest:
            raise Damaged(f"the packed layer holds {found}, but its template says {digest}; {_REMEDY}")
    except (zstd.ZstdError, EOFError) as error:
        target.unlink(missing_ok=True)
        raise Damaged(f"layer {digest} cannot be unpacked ({error}); {_REMEDY}") from error
    except BaseException:
        target.unlink(missing_ok=True)
        raise


def _unpack(source: Path, target: Path, size_bytes: int, algorithm: str, moved: long_work.Moved) -> str:
    digest = hashlib.new(algorithm)
    offset = 0
    options: dict[int, int] = {zstd.DecompressionParameter.window_log_max: _WINDOW_LOG}
    with zstd.ZstdFile(source, "rb", options=options) as stream, target.open("wb", buffering=0) as out:
        while piece := stream.read(_READ):
            if offset + len(piece) > size_bytes:
                raise Damaged(f"a packed layer is longer than the {size_bytes} bytes that its template says; {_REMEDY}")
            digest.update(piece)
            sparse.write(out.fileno(), offset, piece)
            offset += len(piece)
            moved(offset)
        out.truncate(offset)
        os.fsync(out.fileno())
    if offset != size_bytes:
        raise Damaged(f"a packed layer ends at {offset} of the {size_bytes} bytes its template says; {_REMEDY}")
    return f"{algorithm}:{digest.hexdigest()}"


def hash_file(path: Path, algorithm: str = oci.SHA256, moved: long_work.Moved = _ignore) -> tuple[str, int]:
    """Digest and size of a file; its holes are not read from the disk."""
    digest = hashlib.new(algorithm)
    size = 0
    with path.open("rb", buffering=0) as stream:
        with contextlib.suppress(OSError, AttributeError):
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)
        for piece in sparse.pieces(stream.fileno(), 0, os.fstat(stream.fileno()).st_size, _READ):
            digest.update(piece)
            size += len(piece)
            moved(size)
    return f"{algorithm}:{digest.hexdigest()}", size
