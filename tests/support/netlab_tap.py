"""The lab's slow switch: frames of TAP devices, passed on by a thread that may delay, throttle, lose and repeat them.

Chance comes from one seed. Frames to an unknown address are dropped, those to a group go to everybody.
"""

import contextlib
import fcntl
import heapq
import itertools
import os
import random
import selectors
import struct
import threading
import time
from dataclasses import dataclass

_TUNSETIFF = 0x400454CA  # linux/if_tun.h
_IFF_TAP, _IFF_NO_PI = 0x0002, 0x1000
_FRAME_BYTES = 70_000  # above any frame of the largest MTU
_AT_ONCE = 64  # frames of one card before the others have their turn


@dataclass(frozen=True, slots=True)
class Shape:
    """What one direction does to frames that are not lost. Zero is "as fast as we can"."""

    delay_s: float = 0
    jitter_s: float = 0
    rate_bytes_s: float = 0
    repeated: float = 0


_STRAIGHT = Shape()


def open_card() -> int:
    """A TAP device `eth0` in the calling thread's network namespace; its file."""
    file = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    fcntl.ioctl(file, _TUNSETIFF, struct.pack("16sH", b"eth0", _IFF_TAP | _IFF_NO_PI))
    return file


class Wires:
    """add cards → start → (carries frames by itself) → close. Faults may be set at any time from any thread."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self._files: dict[str, int] = {}
        self._names: dict[bytes, str] = {}
        self._pulled: set[str] = set()
        self._lost: dict[tuple[str, str], float] = {}
        self._shapes: dict[tuple[str, str], Shape] = {}
        self._free_at: dict[tuple[str, str], float] = {}
        self._waiting: list[tuple[float, int, str, bytes]] = []
        self._count = itertools.count()
        self._end_read, self._end_write = os.pipe()
        self._thread = threading.Thread(target=self._carry, name="wires", daemon=True)

    def add(self, name: str, mac: bytes, file: int) -> None:
        self._files[name], self._names[mac] = file, name

    def start(self) -> None:
        self._thread.start()

    def drop(self, source: str, target: str, share: float) -> None:
        self._lost[source, target] = share

    def shape(self, source: str, target: str, shape: Shape) -> None:
        self._shapes[source, target] = shape

    def cable(self, name: str, up: bool) -> None:
        (self._pulled.discard if up else self._pulled.add)(name)

    def clear(self) -> None:
        self._lost.clear()
        self._shapes.clear()

    def close(self) -> None:
        if self._thread.ident is not None:
            os.write(self._end_write, b"x")
            self._thread.join()
        for file in (*self._files.values(), self._end_read, self._end_write):
            os.close(file)

    def _carry(self) -> None:
        selector = selectors.DefaultSelector()
        for name, file in self._files.items():
            selector.register(file, selectors.EVENT_READ, name)
        selector.register(self._end_read, selectors.EVENT_READ, "")
        with contextlib.closing(selector):
            while True:
                pause_s = self._deliver_due()
                for key, _ in selector.select(pause_s):
                    if not key.data:
                        return
                    self._take_from(key.data, key.fd)

    def _deliver_due(self) -> float | None:
        """Write what is due; how long until the next is."""
        while self._waiting:
            wait_s = self._waiting[0][0] - time.monotonic()
            if wait_s > 0:
                return wait_s
            _, _, target, frame = heapq.heappop(self._waiting)
            self._write(target, frame)
        return None

    def _take_from(self, source: str, file: int) -> None:
        for _ in range(_AT_ONCE):
            try:
                frame = os.read(file, _FRAME_BYTES)
            except OSError:  # nothing more, or the card is down
                return
            to = self._names.get(frame[:6])
            if to is not None:
                self._send(source, to, frame)
            elif frame[0] & 1:  # to a group
                for target in self._files.keys() - {source}:
                    self._send(source, target, frame)

    def _send(self, source: str, target: str, frame: bytes) -> None:
        way = source, target
        if source in self._pulled or target in self._pulled or self._random.random() < self._lost.get(way, 0):
            return
        shape = self._shapes.get(way, _STRAIGHT)
        if shape is _STRAIGHT:
            self._write(target, frame)
            return
        at = time.monotonic() + shape.delay_s + self._random.uniform(-1, 1) * shape.jitter_s
        if shape.rate_bytes_s:
            at = max(at, self._free_at.get(way, 0)) + len(frame) / shape.rate_bytes_s
            self._free_at[way] = at
        for _ in range(2 if self._random.random() < shape.repeated else 1):
            heapq.heappush(self._waiting, (at, next(self._count), target, frame))

    def _write(self, target: str, frame: bytes) -> None:
        with contextlib.suppress(OSError):  # its queue is full, or its card is down: frames may be lost
            os.write(self._files[target], frame)
