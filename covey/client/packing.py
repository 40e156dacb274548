"""Layers packed by zstd: when that pays, how, and back again.

A layer travels and is stored packed (media type ``…+zstd``) when packing takes a tenth off it at least, as a few
samples of it say beforehand and the whole says afterwards. The packed bytes depend on the content alone, not on the
machine or on how it was read, so that a repeated push finds them in the registry. The other way, a layer is unpacked
while it arrives, into a file with holes, never to more bytes than its template says (a small blob may claim to hold
petabytes), and is what its template says or does not appear.

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


class Unpacker:
    """Unpacks a blob into a file while it arrives, piece by piece from its beginning."""

    def __init__(self, target: Path, digest: str, size_bytes: int) -> None:
        self.target = target
        self.done_bytes = 0
        self._digest, self._size_bytes = digest, size_bytes
        self._hash = hashlib.new(oci.algorithm_of(digest))
        self._frame, self._inside = _frame(), False
        self._fault: Damaged | None = None
        self._handle = os.open(target, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)

    def feed(self, chunk: bytes) -> None:
        """The next bytes of the blob. What is wrong with them is kept for `finish`: it may be the blob that is."""
        if self._fault is not None or self._handle < 0:
            return
        try:
            self._feed(chunk)
        except zstd.ZstdError as error:
            self._fault = Damaged(f"layer {self._digest} cannot be unpacked ({error}); {_REMEDY}")
        except Damaged as error:
            self._fault = error

    def _feed(self, chunk: bytes) -> None:
        while chunk or not self._frame.needs_input:
            self._inside = True
            self._put(self._frame.decompress(chunk, _READ))
            chunk = b""
            if self._frame.eof:
                chunk = self._frame.unused_data
                self._frame, self._inside = _frame(), False

    def _put(self, piece: bytes) -> None:
        if self.done_bytes + len(piece) > self._size_bytes:
            raise Damaged(
                f"a packed layer is longer than the {self._size_bytes} bytes that its template says; {_REMEDY}"
            )
        self._hash.update(piece)
        sparse.write(self._handle, self.done_bytes, piece)
        self.done_bytes += len(piece)

    def finish(self) -> None:
        """The blob has ended, and is what its digest says: make the file whole and durable. Raises Damaged."""
        if self._fault is not None:
            raise self._fault
        if self._inside or self.done_bytes != self._size_bytes:
            raise Damaged(
                f"a packed layer ends at {self.done_bytes} of the {self._size_bytes} bytes its template says; {_REMEDY}"
            )
        found = f"{self._hash.name}:{self._hash.hexdigest()}"
        if found != self._digest:
            raise Damaged(f"the packed layer holds {found}, but its template says {self._digest}; {_REMEDY}")
        os.ftruncate(self._handle, self._size_bytes)
        os.fsync(self._handle)

    def close(self) -> None:
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1


def _frame() -> zstd.ZstdDecompressor:
    options: dict[int, int] = {zstd.DecompressionParameter.window_log_max: _WINDOW_LOG}
    return zstd.ZstdDecompressor(options=options)


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
