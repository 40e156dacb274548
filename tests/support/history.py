"""What clients asked and were told: every call with its times, in a file of JSON lines.

A call has begun when its request may have left, and has returned when its whole answer was here. A call without a
definite answer (no reply, a broken one, a 5xx) returns never: what it asked for may have been done, may be done later,
or not at all (promise I9). Times are of the clock that never jumps and that all processes of a machine share, so they
compare with what nodes note down.
"""

import dataclasses
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def now_ns() -> int:
    """Nanoseconds since the machine was started."""
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME)


@dataclasses.dataclass(frozen=True, slots=True)
class Call:
    """One call of one client. `returned_ns` None: nobody knows what came of it; `answer` then says why."""

    who: str
    via: str
    what: str  # start, show, list, terminate, …
    called_ns: int
    returned_ns: int | None
    request: Any
    answer: Any

    @property
    def known(self) -> bool:
        return self.returned_ns is not None


class Recorder:
    """Appends calls to a file as they end. One write per line: a killed client leaves whole lines."""

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        self.count = 0

    def note(self, call: Call) -> None:
        os.write(self._file, json.dumps(dataclasses.astuple(call), separators=(",", ":")).encode() + b"\n")
        self.count += 1

    def close(self) -> None:
        os.close(self._file)


def read(path: Path) -> Iterator[Call]:
    """In the order in which calls ended. A last line that was cut is left out: its call never ended."""
    with path.open("rb") as lines:
        for line in lines:
            if line.endswith(b"\n"):
                yield Call(*json.loads(line))
