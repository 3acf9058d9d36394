"""The arena: page-aligned host memory that snapshots are copied into, kept and reused from save to save.

Copying into memory that was touched before is several times faster than into fresh pages, so the arena only grows.
"""

from __future__ import annotations

import mmap

__all__ = ["Arena"]

PAGE = 4096


class Arena:
    """One anonymous mapping, handed out in page-aligned pieces; reserving again takes all pieces back."""

    def __init__(self) -> None:
        self._map: mmap.mmap | None = None
        self._view = memoryview(b"")

    @property
    def capacity_bytes(self) -> int:
        """Bytes the arena holds at present."""
        return len(self._view)

    def reserve(self, sizes: list[int]) -> list[memoryview]:
        """Return one writable piece of memory for each size; earlier pieces become invalid."""
        starts: list[int] = []
        position = 0
        for size in sizes:
            starts.append(position)
            position += -(-size // PAGE) * PAGE
        if position > self.capacity_bytes:
            self._view = memoryview(b"")
            self._map = mmap.mmap(-1, position)
            self._view = memoryview(self._map)
        return [self._view[start : start + size] for start, size in zip(starts, sizes, strict=True)]
