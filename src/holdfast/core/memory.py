"""Page-aligned memory, touched in big strokes, and shared with another process.

Where memory was never touched, the kernel provides it page by page in the middle of whatever touches it first, which
costs more than the copy or the read itself. Huge pages, and asking for many pages in one call ahead of their use, take
most of that away.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import weakref
from collections.abc import Callable

__all__ = ["NO_MEMORY", "PAGE", "Memory", "Pinning", "Spare", "address", "map_pages", "page_aligned", "touch"]

PAGE = 4096
HUGE_PAGE = 2 << 20
STRETCH_BYTES = 16 << 20
_POPULATE_WRITE = 23  # Linux 5.14; refused where it is not known, and then nothing is lost

NO_MEMORY = memoryview(bytearray())

# Pins memory, given its address and size; returns what takes that back, or None where it does not work.
Pinning = Callable[[int, int], "Callable[[], None] | None"]


def page_aligned(size: int) -> int:
    """Return `size` bytes rounded up to whole pages."""
    return -(-size // PAGE) * PAGE


def map_pages(size: int) -> memoryview:
    """Return `size` writable bytes of new memory that begin at a page; it goes when nothing refers to it any more."""
    private = getattr(mmap, "MAP_PRIVATE", 0) | getattr(mmap, "MAP_ANONYMOUS", 0)
    whole = -(-size // HUGE_PAGE) * HUGE_PAGE if size >= HUGE_PAGE else max(size, 1)
    made = mmap.mmap(-1, whole, flags=private) if private else mmap.mmap(-1, whole)
    if whole >= HUGE_PAGE and hasattr(mmap, "MADV_HUGEPAGE"):
        made.madvise(mmap.MADV_HUGEPAGE)
    return memoryview(made)[:size]


def address(view: memoryview) -> int:
    """Return where the bytes of a writable view begin."""
    return ctypes.addressof(ctypes.c_char.from_buffer(view))


def touch(view: memoryview) -> None:
    """Make the kernel provide the pages of writable memory that begins at a page, stretch by stretch, without holding
    up other threads."""
    madvise = getattr(ctypes.CDLL(None), "madvise", None)
    if madvise is None or not len(view):
        return
    start = address(view)
    for offset in range(0, len(view), STRETCH_BYTES):
        length = min(STRETCH_BYTES, len(view) - offset)
        if madvise(ctypes.c_void_p(start + offset), ctypes.c_size_t(length), _POPULATE_WRITE):
            return


class Spare:
    """Memory that nobody needs for a while and that was touched before, handed out from its first page on."""

    def __init__(self, memory: memoryview) -> None:
        self._memory = memory
        self._taken = 0

    def take(self, size: int) -> memoryview | None:
        """Return `size` bytes that begin at a page, with whatever is in them, or None where so many are not left."""
        start = self._taken
        if start + size > len(self._memory):
            return None
        self._taken = min(start + page_aligned(size), len(self._memory))
        return self._memory[start : start + size]


class Memory:
    """A mapping of whole pages, and the file descriptor by which another process can map it too, -1 without."""

    def __init__(self, view: memoryview, fd: int = -1) -> None:
        self.view = view
        self.fd = fd
        self._pinned = False
        if fd >= 0:
            weakref.finalize(self, os.close, fd).atexit = False  # it may still be sent then

    def __len__(self) -> int:
        return len(self.view)

    def pin(self, pinning: Pinning) -> None:
        """Pin all of it until it goes; done once, and tried once."""
        if not self._pinned and len(self.view):
            self._pinned = True
            unpin = pinning(address(self.view), len(self.view))
            if unpin is not None:
                weakref.finalize(self, unpin).atexit = False

    @classmethod
    def private(cls, size: int) -> Memory:
        """Map memory of this process alone."""
        return cls(map_pages(size))

    @classmethod
    def shared(cls, size: int) -> Memory:
        """Map memory that another process can map as well, while either of the two lives (Linux)."""
        fd = os.memfd_create("holdfast-arena")
        try:
            os.ftruncate(fd, size)
            return cls(memoryview(mmap.mmap(fd, size, flags=mmap.MAP_SHARED)), fd)
        except BaseException:
            os.close(fd)
            raise

    def grown(self, size: int) -> Memory:
        """Return a larger mapping that begins with this one's pages, or new memory where it has no file descriptor.

        What was touched stays so, and to let it go would take long. This mapping stays as it is, for who still looks at
        it.
        """
        if self.fd < 0:
            return Memory.private(size)
        fd = os.dup(self.fd)
        try:
            os.ftruncate(fd, size)
            return Memory(memoryview(mmap.mmap(fd, size, flags=mmap.MAP_SHARED)), fd)
        except BaseException:
            os.close(fd)
            raise

    @classmethod
    def of(cls, fd: int) -> Memory:
        """Map what another process shares. Writable only because Python tells the address of no other memory.

        Its pages are there already and are not asked for in one go: while the other process copies into them that slows
        it down to a third.
        """
        return cls(memoryview(mmap.mmap(fd, os.fstat(fd).st_size, flags=mmap.MAP_SHARED)), fd)
