"""Figures of the host the agent runs on, for the node's word: how busy its processors and memory are."""

import os
import socket
from collections.abc import Iterable
from pathlib import Path
from urllib.parse import urlsplit


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
        parts = urlsplit(url)
        try:
            found = socket.getaddrinfo(parts.hostname, parts.port or 80, type=socket.SOCK_DGRAM)
        except OSError:
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
