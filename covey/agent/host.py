"""Figures of the host the agent runs on, for the node's word: how busy its processors and memory are."""

import os
from pathlib import Path


def use() -> tuple[float, float]:
    """(processors, memory) in use, each 0 to 1. Memory is 0 where the system does not say."""
    cpu = os.getloadavg()[0] / (os.cpu_count() or 1)
    return min(cpu, 1.0), _memory_use()


def idle() -> tuple[float, float]:
    """The figures of a node that is none."""
    return 0.0, 0.0


def _memory_use() -> float:
    try:
        text = Path("/proc/meminfo").read_text("ascii")
    except FileNotFoundError:
        return 0.0
    kib = {name: int(rest.split()[0]) for name, _, rest in (line.partition(":") for line in text.splitlines())}
    return 1.0 - kib["MemAvailable"] / kib["MemTotal"]
