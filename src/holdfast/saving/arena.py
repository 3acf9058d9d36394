"""The arena: page-aligned host memory that snapshots are copied into, kept and reused from save to save.

Copying into memory that was touched before is several times faster than into fresh pages, so the arena only grows, and
it is touched ahead of its first use where there is time.
"""

from __future__ import annotations

import ctypes
import mmap
import threading
from collections.abc import Sequence

__all__ = ["Arena", "page_aligned"]

PAGE = 4096
STRETCH_BYTES = 64 << 20
_POPULATE_WRITE = (
    23  # MADV_POPULATE_WRITE, Linux 5.14; refused where it is not known, and then nothing is lost
)


def page_aligned(size: int) -> int:
    """Return `size` bytes rounded up to whole pages."""
    return -(-size // PAGE) * PAGE


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
                self._view = _map(position)
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
        view = _map(total)
        _touch(view)
        with self._lock:
            if total > len(self._view):
                self._view = view


def _map(size: int) -> memoryview:
    private = getattr(mmap, "MAP_PRIVATE", 0) | getattr(mmap, "MAP_ANONYMOUS", 0)
    made = mmap.mmap(-1, size, flags=private) if private else mmap.mmap(-1, size)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        made.madvise(mmap.MADV_HUGEPAGE)
    return memoryview(made)


def _touch(view: memoryview) -> None:
    """Make the kernel provide the pages, stretch by stretch, without holding up other threads."""
    madvise = getattr(ctypes.CDLL(None), "madvise", None)
    if madvise is None:
        return
    start = ctypes.addressof(ctypes.c_char.from_buffer(view))
    for offset in range(0, len(view), STRETCH_BYTES):
        length = min(STRETCH_BYTES, len(view) - offset)
        if madvise(ctypes.c_void_p(start + offset), ctypes.c_size_t(length), _POPULATE_WRITE):
            return
