"""One member of etcd seen from its own host: whose data is on the disk, what peers say, and waiting for each other.

* The first record of a member's write-ahead log names member and cluster (etcd: server/wal/wal.go; frames of 8 bytes
  length, little-endian, padded to 8; a record is protobuf of type, crc and data; type 1 is the metadata).
* Every etcd tells its members to its peers: GET /members at a peer address, the cluster's id in X-Etcd-Cluster-ID.
* A member without data answers at its own peer address, before etcd does, that it waits: `rendezvous`. That all have
  waited together is written down in `member/`, which etcd makes too: whoever removes its data removes the word with it.
* A cluster's id follows from the peer addresses and the token that it begins with (server/etcdserver/api/membership:
  member.go computeMemberID, cluster.go genID).
"""

import asyncio
import contextlib
import hashlib
import json
import ssl
import struct
import urllib.parse
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import aiohttp

from covey import durable, errors
from covey.decide import bootstrap

_METADATA = 1
_AGREED = "covey-agreed"
_ASK_S = 3.0


# ---- the disk ------------------------------------------------------------------------------------------------------


def on_disk(data_dir: Path) -> bootstrap.Disk | None:
    """Whose data is in `data_dir`; None when there is none. Raises SettingError when that cannot be told."""
    logs = sorted((data_dir / "member" / "wal").glob("*.wal"))
    if not logs:
        return None
    try:
        with logs[0].open("rb") as file:
            return _metadata(file.read(4096))
    except (OSError, ValueError, struct.error) as error:
        raise errors.SettingError(
            f"{logs[0]} does not tell whose data it is ({error}): move {data_dir} away and start this again"
        ) from error


def agreed(data_dir: Path, sign: str) -> bool:
    """Whether all have waited together with the same sign, and this member has not run since."""
    try:
        return (data_dir / "member" / _AGREED).read_text() == sign
    except OSError:
        return False


def agree(data_dir: Path, sign: str) -> None:
    """Write it down, surely. Raises OSError."""
    place = data_dir / "member"
    durable.make_dirs(place)
    for folder in (data_dir, place):
        folder.chmod(0o700)  # as etcd wants them
    durable.replace(place / _AGREED, sign.encode())


def forget_agreement(data_dir: Path) -> None:
    """It has run: the data tells from now on."""
    with contextlib.suppress(OSError):
        durable.remove(data_dir / "member" / _AGREED)


def _metadata(head: bytes) -> bootstrap.Disk:
    place = 0
    while place + 8 <= len(head):
        (length,) = struct.unpack_from("<q", head, place)
        size = length & ((1 << 56) - 1)
        padding = (length >> 56) & 0x7 if length < 0 else 0
        record = _varints(head[place + 8 : place + 8 + size])
        if record.get(1) == _METADATA:
            ids = _varints(record[3])
            return bootstrap.Disk(cluster=ids[2], member=ids[1])
        if not size:
            break
        place += 8 + size + padding
    raise ValueError("it has no metadata")


def _varints(data: bytes) -> dict[int, Any]:
    """The fields of a small protobuf message without a description: numbers and byte strings."""
    found: dict[int, Any] = {}
    place = 0
    while place < len(data):
        tag, place = _varint(data, place)
        value, place = _varint(data, place)
        if tag & 7 == 2:
            found[tag >> 3], place = data[place : place + value], place + value
        elif tag & 7 == 0:
            found[tag >> 3] = value
        else:
            raise ValueError("an unknown kind of field")
    return found


def _varint(data: bytes, place: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        if place >= len(data) or shift > 63:
            raise ValueError("it ends too early")
        byte = data[place]
        value |= (byte & 0x7F) << shift
        place, shift = place + 1, shift + 7
        if byte < 0x80:
            return value, place


def member_ids(members: Mapping[str, str], token: str) -> list[int]:
    """The ids of the members that a cluster begins with, one peer URL each."""
    return sorted(_id(f"{url}{token}".encode()) for url in members.values())


def cluster_id(ids: list[int]) -> int:
    """The id of the cluster that begins with these."""
    return _id(b"".join(id.to_bytes(8, "big") for id in ids))


def _id(content: bytes) -> int:
    return int.from_bytes(hashlib.sha1(content, usedforsecurity=False).digest()[:8], "big")


# ---- the others ----------------------------------------------------------------------------------------------------


class Sign(NamedTuple):
    """What those who wait for each other must have in common."""

    members: Mapping[str, str]
    token: str

    def text(self) -> str:
        return json.dumps([sorted(self.members.items()), self.token])


class Waiting(NamedTuple):
    """Somebody without data waits at another member's address. `agreed`: it knows that all have waited together."""

    name: str
    sign: str
    agreed: bool


async def ask(url: str, tls: ssl.SSLContext | None) -> bootstrap.Heard | Waiting | None:
    """What is at another member's peer address; None when nobody answers. Raises SettingError when TLS forbids it."""
    timeout = aiohttp.ClientTimeout(total=_ASK_S)
    try:
        async with (
            aiohttp.ClientSession(timeout=timeout) as session,
            session.get(f"{url.rstrip('/')}/members", ssl=tls if tls is not None else True) as answer,
        ):
            said = json.loads(await answer.read())
            if isinstance(said, dict) and "waiting" in said:
                return Waiting(str(said["waiting"]), str(said["sign"]), bool(said.get("agreed", True)))
            cluster = int(answer.headers["X-Etcd-Cluster-ID"], 16)
            return bootstrap.Heard(url, cluster, tuple(map(_listed, said)), doubt="it was not asked")
    except aiohttp.ClientConnectorCertificateError as error:
        raise errors.SettingError(
            f"the certificate that {url} shows to its peers is not believed ({error.certificate_error}): is"
            " --peer-trusted-ca-file right?"
        ) from error
    except (aiohttp.ClientError, OSError, TimeoutError, ValueError, KeyError, TypeError):
        return None


def _listed(one: dict[str, Any]) -> bootstrap.Listed:
    return bootstrap.Listed(
        int(one["id"]),
        str(one.get("name") or ""),
        tuple(one.get("peerURLs") or ()),
        tuple(one.get("clientURLs") or ()),
        bool(one.get("isLearner")),
    )


@contextlib.asynccontextmanager
async def rendezvous(
    me: str, sign: str, url: str, tls: ssl.SSLContext | None, agreed: Callable[[], bool]
) -> AsyncIterator[None]:
    """Tell at our own peer address (where etcd is to listen) that we wait. Raises SettingError when it is taken."""
    where = urllib.parse.urlsplit(url)

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, TimeoutError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            async with asyncio.timeout(_ASK_S):
                await reader.readuntil(b"\r\n\r\n")
                writer.write(_answer({"waiting": me, "sign": sign, "agreed": agreed()}))
                await writer.drain()
        writer.close()

    try:
        server = await asyncio.start_server(answer, where.hostname, where.port or 2380, ssl=tls)
    except OSError as error:
        raise errors.SettingError(
            f"{url} cannot be listened on ({error.strerror or error}): does another etcd run there?"
        ) from error
    try:
        yield
    finally:
        server.close()
        await server.wait_closed()


def _answer(said: dict[str, Any]) -> bytes:
    body = json.dumps(said).encode()
    length = f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    return f"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n{length}".encode() + body
