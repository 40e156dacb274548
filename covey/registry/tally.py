"""What the processes of one server count, in a small file that all of them map: sums without asking anybody.

Each process owns one row and is the only one that writes there; whoever is asked for figures adds up the rows. A row
stays when its process dies, and the process that takes its place goes on counting there: counters never fall.

    row:  [ pid of the process that serves | counter | counter | … ]     8 bytes each

A counter is written with one aligned store, so a reader sees the old number or the new one. Reading all rows is no
snapshot: two figures may be a moment apart, as in every scrape.
"""

import mmap
import os
import tempfile
from collections.abc import Mapping
from enum import IntEnum

from covey import server

_ROW = 128  # numbers


class Count(IntEnum):
    """The columns."""

    SERVING = 0  # the process id; 0: it does not serve
    REQUESTS_1XX = 1
    REQUESTS_2XX = 2
    REQUESTS_3XX = 3
    REQUESTS_4XX = 4
    REQUESTS_5XX = 5
    RECEIVED_BYTES = 6
    SENT_BYTES = 7
    BUSY_MICROSECONDS = 8  # from a request's first line to its answer's last byte
    CONNECTIONS = 9  # open at this moment


class Tally:
    """`rows` processes, of which this one is `mine`. `file` is what children inherit."""

    def __init__(self, rows: int, mine: int = 0, file: int | None = None) -> None:
        size = rows * _ROW * 8
        if file is None:
            with tempfile.TemporaryFile() as made:
                made.truncate(size)
                file = os.dup(made.fileno())
        self.file = file
        self.rows = rows
        self.mine = mine
        self._row = mine * _ROW
        self._map = mmap.mmap(file, size)
        self._numbers = memoryview(self._map).cast("q")

    def close(self) -> None:
        self._numbers.release()
        self._map.close()
        os.close(self.file)

    def add(self, count: Count, more: int = 1) -> None:
        self._numbers[self._row + count] += more

    def put(self, count: Count, value: int) -> None:
        self._numbers[self._row + count] = value

    def row(self, number: int) -> Mapping[Count, int]:
        return {count: self._numbers[number * _ROW + count] for count in Count}

    def sums(self) -> dict[Count, int]:
        """Over all rows."""
        return {count: sum(self._numbers[row * _ROW + count] for row in range(self.rows)) for count in Count}

    def served(self, one: server.Served) -> None:
        """Count one request."""
        self.add(Count(min(max(one.status // 100, 1), 5)))
        self.add(Count.RECEIVED_BYTES, one.received_bytes)
        self.add(Count.SENT_BYTES, one.sent_bytes)
        self.add(Count.BUSY_MICROSECONDS, int(one.took_s * 1e6))
