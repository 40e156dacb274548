"""Until when the certificates are good that a controller uses or meets: its own files, etcd's members, registries.

Files are read; servers are asked by a handshake that is used for nothing else and believes anybody, because only the
date is wanted. An expired certificate stops everything at a moment that nobody chose; so its date is told long before.
"""

import asyncio
import datetime
import re
import ssl
import urllib.parse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from covey.decide import troubles

_PEM = re.compile(r"-----BEGIN CERTIFICATE-----.+?-----END CERTIFICATE-----", re.DOTALL)
_ASK_S = 1.5
_UTC_TIME, _GENERALIZED_TIME, _VERSION = 0x17, 0x18, 0xA0  # tags


class Certificates:
    """`files`: setting → file; `servers`: name → host and port, asked each time, since members come and go."""

    def __init__(
        self,
        files: Mapping[str, Path],
        servers: Callable[[], Mapping[str, tuple[str, int]]],
        wall_ns: Callable[[], int],
    ) -> None:
        self._files = files
        self._servers = servers
        self._wall_ns = wall_ns

    async def look(self) -> list[troubles.Certificate]:
        """The first of each file and server to expire, soonest first. One that does not answer is told elsewhere."""
        work = [asyncio.to_thread(_in_file, path) for path in self._files.values()]
        servers = self._servers()
        asked = [asyncio.to_thread(_of_server, *where) for where in servers.values()]
        names = [*(f"{name} {path}" for name, path in self._files.items()), *servers]
        ends = await asyncio.gather(*work, *asked)
        found = [self._told(name, end) for name, end in zip(names, ends, strict=True) if end is not None]
        return sorted(found, key=lambda one: (one.left_s, one.name))

    def _told(self, name: str, end: datetime.datetime) -> troubles.Certificate:
        left_s = int(end.timestamp() - self._wall_ns() / 1e9)
        return troubles.Certificate(name=name, expires=end.strftime("%Y-%m-%dT%H:%M:%SZ"), left_s=left_s)


def servers(urls: Sequence[str], kind: str) -> dict[str, tuple[str, int]]:
    """Those that speak TLS."""
    found = {}
    for url in urls:
        where = urllib.parse.urlsplit(url)
        if where.scheme == "https" and where.hostname:
            found[f"{kind} {url}"] = (where.hostname, where.port or 443)
    return found


def _in_file(path: Path) -> datetime.datetime | None:
    """Blocking. What cannot be read is complained of where the file is used."""
    try:
        return min((end_of(ssl.PEM_cert_to_DER_cert(pem)) for pem in _PEM.findall(path.read_text())), default=None)
    except (OSError, ValueError):
        return None


def _of_server(host: str, port: int) -> datetime.datetime | None:
    """Blocking."""
    try:
        return end_of(ssl.PEM_cert_to_DER_cert(ssl.get_server_certificate((host, port), timeout=_ASK_S)))
    except (OSError, ValueError):
        return None


# ---- X.509: only as far as the date (RFC 5280, 4.1) ----------------------------------------------------------------


def end_of(der: bytes) -> datetime.datetime:
    """`notAfter` of a certificate. Raises ValueError when it is none.

    Certificate    SEQUENCE { tbs, … }
    tbs            SEQUENCE { [0] version OPTIONAL, serial, algorithm, issuer, validity, … }
    validity       SEQUENCE { notBefore, notAfter }
    """
    tbs = _parts(_parts(der, 1)[0][1], 1)[0][1]
    fields = _parts(tbs, 6)
    validity = fields[4 if fields[0][0] == _VERSION else 3 : 5]
    dates = _parts(validity[0][1], 2) if validity else []
    tag, text = dates[-1] if len(dates) == 2 else (0, b"")
    if tag not in (_UTC_TIME, _GENERALIZED_TIME):
        raise ValueError("no date is where it should be")
    return datetime.datetime.strptime(text.decode("ascii"), _form(tag)).replace(tzinfo=datetime.UTC)


def _form(tag: int) -> str:
    return "%y%m%d%H%M%SZ" if tag == _UTC_TIME else "%Y%m%d%H%M%SZ"


def _parts(data: bytes, most: int) -> list[tuple[int, bytes]]:
    """Tag and content of the first values."""
    found: list[tuple[int, bytes]] = []
    place = 0
    while place + 2 <= len(data) and len(found) < most:
        tag, size = data[place], data[place + 1]
        place += 2
        if size & 0x80:
            count = size & 0x7F
            size, place = int.from_bytes(data[place : place + count], "big"), place + count
        found.append((tag, data[place : place + size]))
        place += size
    if not found or place > len(data):
        raise ValueError("no certificate")
    return found
