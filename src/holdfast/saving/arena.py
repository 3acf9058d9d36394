"""The arena: page-aligned host memory that snapshots are copied into, kept and reused from save to save.

Copying into memory that was touched before is several times faster than into fresh pages, so the arena only grows, and
it is touched ahead of its first use where there is time.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

from holdfast.core.memory import map_pages, page_aligned, touch

__all__ = ["Arena", "page_aligned"]


class Arena:
    """One anonymous mapping, handed out in page-aligned pieces; reserving again takes all pieces back."""

    def __init__(self) -> None:
        self._view = memoryview(bytearray())
        self._lock = threading.Lock()

    @property
    def capacity_bytes(self) -> int:
        """Bytes the arena holds at present."""
        return len(self._view)

    def reserve(self, sizes: Sequence[int]) -> list[memoryview]:
        """Return one writable piece of memory for each size; earlier pieces become invalid."""
        starts: list[int] = []
        position = 0
        for size in sizes:
            starts.append(position)
            position += page_aligned(size)
        with self._lock:
            if position > len(self._view):
                self._view = map_pages(position)
            view = self._view
        return [view[start : start + size] for start, size in zip(starts, sizes, strict=True)]

    def prewarm(self, sizes: Sequence[int]) -> None:
        """Map and touch the memory that `reserve` will need, in the background."""
        total = sum(map(page_aligned, sizes))
        if total > self.capacity_bytes:
            threading.Thread(
                target=self._prewarm, args=(total,), name="holdfast-prewarm", daemon=True
            ).start()

    def _prewarm(self, total: int) -> None:
        view = map_pages(total)
        touch(view)
        with self._lock:
            if total > len(self._view):
                self._view = view
