"""The host the agent runs on: its name and address, what tells it from other hosts, and how busy it is."""

import hashlib
import os
import socket
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

_MACHINE_ID = Path("/etc/machine-id")  # machine-id(5)
_NO_ID = ("", "uninitialized")  # in images: every host that is made of one has this before its first boot


class Place(NamedTuple):
    """Under which name and address the host is reached now; "" what it does not know."""

    name: str = ""
    ip: str = ""


async def nowhere() -> Place:
    """The place of a node that is none."""
    return Place()


def machine(file: Path = _MACHINE_ID) -> str:
    """What tells this host from others, the same after a reboot; "" where the system does not say. It is hashed, as
    machine-id(5) asks for."""
    try:
        id = file.read_text("ascii").strip()
    except (OSError, UnicodeDecodeError):
        return ""
    return hashlib.sha256(f"covey {id}".encode()).hexdigest() if id not in _NO_ID else ""


def use() -> tuple[float, float]:
    """(processors, memory) in use, each 0 to 1. Memory is 0 where the system does not say."""
    cpu = os.getloadavg()[0] / (os.cpu_count() or 1)
    return min(cpu, 1.0), _memory_use()


def idle() -> tuple[float, float]:
    """The figures of a node that is none."""
    return 0.0, 0.0


def address_towards(urls: Iterable[str]) -> str:
    """This host's address as the first of these servers that can be named sees it; "" when none can. Where they are
    reached over loopback, so are this node's VMs. Connecting a datagram socket sends nothing."""
    for url in urls:
        try:
            parts = urlsplit(url)
            found = socket.getaddrinfo(parts.hostname, parts.port or 80, type=socket.SOCK_DGRAM)
        except (OSError, ValueError):  # it cannot be resolved, or is no URL at all: others may be
            continue
        for family, kind, protocol, _, address in found:
            try:
                with socket.socket(family, kind, protocol) as probe:
                    probe.connect(address)
                    return str(probe.getsockname()[0])
            except OSError:
                continue
    return ""


def _memory_use() -> float:
    try:
        text = Path("/proc/meminfo").read_text("ascii")
    except FileNotFoundError:
        return 0.0
    kib = {name: int(rest.split()[0]) for name, _, rest in (line.partition(":") for line in text.splitlines())}
    return 1.0 - kib["MemAvailable"] / kib["MemTotal"]
