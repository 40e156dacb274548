"""What is in a backup: a snapshot of etcd's database, read without etcd.

A snapshot is a bbolt file (https://github.com/etcd-io/bbolt: page.go, bucket.go, db.go) with the SHA-256 of itself
behind it. The file is a tree of pages; the bucket `key` in it maps revisions to etcd's key-values.

    page      16 bytes of header: id u64, flags u16, count u16, overflow u32; then elements
    meta      pages 0 and 1: magic, version, page size, flags, root bucket (page, sequence), freelist, high water, txid,
              FNV-64a of what stands before; the one with the higher txid holds
    branch    elements of position u32, key size u32, page u64
    leaf      elements of flags u32, position u32, key size u32, value size u32; positions count from the element

`read` walks the whole tree, so a page that is damaged or missing shows. It proves the digest first.
"""

import hashlib
import mmap
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import msgspec

from covey import errors
from covey.store import schema
from covey.store.etcdpb import etcd_pb2 as pb

_DIGEST_BYTES = 32
_SECTOR = 512  # etcd tells by this that a digest stands behind the database
_MAGIC, _VERSION = 0xED0CDAED, 2
_BRANCH, _LEAF = 0x01, 0x02
_PAGE = struct.Struct("<QHHI")
_META_BODY = struct.Struct("<IIIIQQQQQQ")
_BRANCH_ELEMENT = struct.Struct("<IIQ")
_LEAF_ELEMENT = struct.Struct("<IIII")
_PIECE_BYTES = 1 << 20
_DEPTH = 32


class Content(NamedTuple):
    """What a good snapshot holds."""

    size_bytes: int
    revision: int  # the newest in it
    changes: int  # key-values kept, old ones and deletions among them
    cloud: str  # the id of the Covey cloud whose store it is; "": none
    digest: str  # SHA-256 of the database, hexadecimal


class Damaged(errors.StoreError):
    """The file is no good snapshot; one sentence."""


def read(path: Path) -> Content:
    """Prove a snapshot. Blocking. Raises Damaged, or OSError."""
    with path.open("rb") as file:
        size = file.seek(0, 2)
        if size < 2 * 4096 + _DIGEST_BYTES or size % _SECTOR != _DIGEST_BYTES:
            raise Damaged(f"{path} is no backup of etcd, or only a piece of one ({size:,} bytes)")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            digest = _digest(data, size - _DIGEST_BYTES)
            if digest != data[-_DIGEST_BYTES:]:
                raise Damaged(f"{path} is damaged: its bytes are not those that its digest was made of")
            try:
                return _content(data, size - _DIGEST_BYTES, digest.hex())
            except (struct.error, IndexError, KeyError, ValueError) as error:
                raise Damaged(f"{path} is damaged: it is no whole database ({error})") from None


def _digest(data: mmap.mmap, size: int) -> bytes:
    digest = hashlib.sha256()
    for start in range(0, size, _PIECE_BYTES):
        digest.update(data[start : min(start + _PIECE_BYTES, size)])
    return digest.digest()


def _content(data: mmap.mmap, size: int, digest: str) -> Content:
    page_size, root = _meta(data)
    buckets = {data[leaf.key]: leaf.value for leaf in _leaves(data, page_size, root)}
    keys = buckets[b"key"]
    revision = changes = 0
    cloud = ""
    mark = b"\x0a" + bytes([len(schema.CLOUD)]) + schema.CLOUD.encode()  # field 1 of a key-value: its key
    for leaf in _bucket(data, page_size, keys):
        changes += 1
        revision = max(revision, int.from_bytes(data[leaf.key.start : leaf.key.start + 8], "big"))
        if data[leaf.value.start : leaf.value.start + len(mark)] == mark:
            cloud = _cloud(data[leaf.value])
    return Content(size, revision, changes, cloud, digest)


def _cloud(value: bytes) -> str:
    try:
        return msgspec.json.decode(pb.KeyValue.FromString(value).value, type=schema.Cloud).id
    except msgspec.MsgspecError:
        return ""


def _meta(data: mmap.mmap) -> tuple[int, int]:
    """Page size and the root's page, from the newer of the two descriptions that are whole."""
    best: tuple[int, int, int] | None = None
    for start in (0, 4096, 8192, 16384, 65536):  # the second page's place depends on the page size
        if start + 80 > len(data):
            break
        magic, version, page_size, _, root, _, _, _, txid, checksum = _META_BODY.unpack_from(data, start + _PAGE.size)
        body = data[start + _PAGE.size : start + _PAGE.size + _META_BODY.size - 8]
        if (magic, version) == (_MAGIC, _VERSION) and checksum == _fnv64a(body) and (best is None or txid > best[0]):
            best = (txid, page_size, root)
    if best is None:
        raise ValueError("no description of it is whole")
    return best[1], best[2]


def _fnv64a(body: bytes) -> int:
    """http://www.isthe.com/chongo/tech/comp/fnv/"""
    found = 0xCBF29CE484222325
    for byte in body:
        found = ((found ^ byte) * 0x100000001B3) & 0xFFFFFFFFFFFFFFFF
    return found


class _Leaf(NamedTuple):
    """Where key and value of one leaf stand."""

    key: slice
    value: slice


def _bucket(data: mmap.mmap, page_size: int, value: slice) -> Iterator[_Leaf]:
    """The leaves of a bucket, whose description is the value of a leaf above; a small one stands right behind it."""
    (root,) = struct.unpack_from("<Q", data, value.start)
    if root:
        return _leaves(data, page_size, root)
    return _below(data, page_size, value.start + 16, 0)


def _leaves(data: mmap.mmap, page_size: int, number: int, depth: int = 0) -> Iterator[_Leaf]:
    start = number * page_size
    if _PAGE.unpack_from(data, start)[0] != number or depth > _DEPTH:
        raise ValueError(f"page {number} is not where it should be")
    return _below(data, page_size, start, depth)


def _below(data: mmap.mmap, page_size: int, start: int, depth: int) -> Iterator[_Leaf]:
    """All leaves below the page that begins at `start`."""
    _, flags, count, _ = _PAGE.unpack_from(data, start)
    first = start + _PAGE.size
    if flags & _BRANCH:
        for place in range(first, first + count * _BRANCH_ELEMENT.size, _BRANCH_ELEMENT.size):
            yield from _leaves(data, page_size, _BRANCH_ELEMENT.unpack_from(data, place)[2], depth + 1)
    elif flags & _LEAF:
        for place in range(first, first + count * _LEAF_ELEMENT.size, _LEAF_ELEMENT.size):
            _, position, key_size, value_size = _LEAF_ELEMENT.unpack_from(data, place)
            begin, middle = place + position, place + position + key_size
            if middle + value_size > len(data):
                raise ValueError(f"the page at {start} points beyond the end")
            yield _Leaf(slice(begin, middle), slice(middle, middle + value_size))
    else:
        raise ValueError(f"the page at {start} is of no known kind")
