"""Clock and chance, handed in as an argument so that a simulation can replace them (safety S9).

Durations are taken from `boot_ns` only: it goes on while the machine sleeps (CLOCK_BOOTTIME on Linux) and never jumps
with the wall clock. `wall_ns` is for display. Waiting is asyncio's business: a simulation runs a loop of its own.
"""

import secrets
import sys
import time
import uuid
from typing import Protocol


class World(Protocol):
    def boot_ns(self) -> int:
        """Nanoseconds of a clock that neither stops nor jumps."""
        ...

    def wall_ns(self) -> int:
        """Nanoseconds since the epoch, for display."""
        ...

    def token(self) -> str:
        """A fresh random text of 16 letters and digits: transaction ids, nonces."""
        ...

    def secret(self) -> str:
        """A fresh secret with 256 random bits, URL-safe."""
        ...

    def uuid(self) -> str:
        """A fresh UUID."""
        ...


class System:
    """The real world."""

    if sys.platform == "linux":

        def boot_ns(self) -> int:
            return time.clock_gettime_ns(time.CLOCK_BOOTTIME)

    else:  # macOS: CLOCK_MONOTONIC goes on during sleep when read by clock_gettime

        def boot_ns(self) -> int:
            return time.clock_gettime_ns(time.CLOCK_MONOTONIC)

    def wall_ns(self) -> int:
        return time.time_ns()

    def token(self) -> str:
        return secrets.token_hex(8)

    def secret(self) -> str:
        return secrets.token_urlsafe(32)

    def uuid(self) -> str:
        return str(uuid.uuid4())
