"""Large page-aligned memory: mapped, shared with another process, and touched before it is used.

Copying into memory that was touched before is many times faster than into fresh pages.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import weakref

__all__ = ["PAGE", "Memory", "page_aligned"]

PAGE = 4096
STRETCH_BYTES = 64 << 20
_POPULATE_READ, _POPULATE_WRITE = (
    22,
    23,
)  # Linux 5.14; refused where they are not known, and then nothing is lost


def page_aligned(size: int) -> int:
    """Return `size` bytes rounded up to whole pages."""
    return -(-size // PAGE) * PAGE


class Memory:
    """A mapping of whole pages, and the file descriptor by which another process can map it too, -1 without."""

    def __init__(self, mapping: mmap.mmap, fd: int = -1) -> None:
        self.view = memoryview(mapping)
        self.fd = fd
        if fd >= 0:
            weakref.finalize(self, os.close, fd)

    def __len__(self) -> int:
        return len(self.view)

    @classmethod
    def private(cls, size: int) -> Memory:
        """Map memory of this process alone."""
        flags = getattr(mmap, "MAP_PRIVATE", 0) | getattr(mmap, "MAP_ANONYMOUS", 0)
        made = mmap.mmap(-1, page_aligned(size), flags=flags) if flags else mmap.mmap(-1, page_aligned(size))
        if hasattr(mmap, "MADV_HUGEPAGE"):
            with contextlib.suppress(OSError):
                made.madvise(mmap.MADV_HUGEPAGE)
        return cls(made)

    @classmethod
    def shared(cls, size: int) -> Memory:
        """Map memory that another process can map as well, while either of the two lives (Linux)."""
        fd = os.memfd_create("holdfast-arena")
        try:
            os.ftruncate(fd, page_aligned(size))
            return cls(mmap.mmap(fd, page_aligned(size), flags=mmap.MAP_SHARED), fd)
        except BaseException:
            os.close(fd)
            raise

    @classmethod
    def of(cls, fd: int) -> Memory:
        """Map, to read, what another process shares."""
        made = mmap.mmap(fd, os.fstat(fd).st_size, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ)
        if hasattr(mmap.mmap, "madvise"):
            with contextlib.suppress(OSError):
                made.madvise(_POPULATE_READ)
        return cls(made, fd)

    def touch(self) -> None:
        """Make the kernel provide the pages, stretch by stretch, without holding up other threads."""
        madvise = getattr(ctypes.CDLL(None), "madvise", None)
        if madvise is None:
            return
        start = ctypes.addressof(ctypes.c_char.from_buffer(self.view))
        for offset in range(0, len(self.view), STRETCH_BYTES):
            length = min(STRETCH_BYTES, len(self.view) - offset)
            if madvise(ctypes.c_void_p(start + offset), ctypes.c_size_t(length), _POPULATE_WRITE):
                return
