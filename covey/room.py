"""Memory that a reader lends out to have it filled: bytes get there by one copy, and it is used again and again."""

import mmap


class Room:
    """Memory of one size, filled from its front. It begins with a page: disks want that of what they copy."""

    __slots__ = ("_memory", "size_bytes")

    def __init__(self, limit_bytes: int) -> None:
        self._memory = memoryview(mmap.mmap(-1, limit_bytes))
        self.size_bytes = 0  # filled

    @property
    def filled(self) -> memoryview:
        return self._memory[: self.size_bytes]

    @property
    def free(self) -> memoryview:
        return self._memory[self.size_bytes :]

    @property
    def full(self) -> bool:
        return self.size_bytes == len(self._memory)

    def clear(self) -> None:
        self.size_bytes = 0

    def take(self, content: memoryview) -> memoryview:
        """Copy what fits; what did not."""
        free = self.free
        size = min(len(free), len(content))
        free[:size] = content[:size]
        self.size_bytes += size
        return content[size:]
