"""Writing past the page cache: large, page-aligned stretches go from memory to the disk without a copy in between.

O_DIRECT asks for an aligned address, file position and length. What does not meet that (a header, the last bytes) is
written through the page cache on the same descriptor, and so is everything where the file system does not play along:
succeeding to set the flag proves nothing, the first write does.
"""

from __future__ import annotations

import ctypes
import errno
from collections.abc import Sequence

from holdfast.core.buffers import Buffer
from holdfast.stores.disk import Disk

__all__ = ["write_buffers"]

ALIGNMENT = 4096
WORTH_BYTES = 1 << 20
CHUNK_BYTES = 32 << 20


def write_buffers(disk: Disk, fd: int, data: Sequence[Buffer]) -> None:
    """Write buffers to a new file, one after the other. The caller makes them durable with fsync."""
    position, direct, possible = 0, False, True
    for buffer in data:
        view = memoryview(buffer).cast("B")
        while len(view):
            stretch = _direct_bytes(view, position) if possible else 0
            if direct != (stretch > 0):
                direct = disk.set_direct(fd, on=stretch > 0) and stretch > 0
                possible = possible and (direct or not stretch)
            size = min(CHUNK_BYTES, stretch) if direct else _until_aligned(view, position)
            try:
                done = disk.write(fd, view[:size])
            except OSError as e:
                if not direct or e.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
                    raise
                possible = direct = False
                disk.set_direct(fd, on=False)
                continue
            position += done
            view = view[done:]


def _direct_bytes(view: memoryview, position: int) -> int:
    """Return how many bytes at the start of `view` can go directly to file position `position`; 0 for few or none."""
    if view.readonly or len(view) < WORTH_BYTES or position % ALIGNMENT or _address(view) % ALIGNMENT:
        return 0
    return len(view) // ALIGNMENT * ALIGNMENT


def _until_aligned(view: memoryview, position: int) -> int:
    """Return how much to write through the page cache: up to where a direct write may start, else all of it."""
    missing = -position % ALIGNMENT
    if missing and not view.readonly and _direct_bytes(view[missing:], position + missing):
        return missing
    return min(len(view), CHUNK_BYTES)


def _address(view: memoryview) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(view))
