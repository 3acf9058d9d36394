"""Writing past the page cache: large stretches go from memory to the disk without the kernel's copy in between.

O_DIRECT asks for an aligned address, file position and length. What is large but lies unaligned in memory goes through
a small aligned buffer, which still beats the page cache. The rest (the bytes up to an aligned position, the last ones,
small pieces) is written through the page cache on the same descriptor, and so is everything where the file system does
not play along: succeeding to set the flag proves nothing, the first write does.
"""

from __future__ import annotations

import errno
import mmap

from holdfast.core.buffers import Buffer
from holdfast.core.memory import address
from holdfast.stores.disk import Disk

__all__ = ["FileWriter"]

ALIGNMENT = 4096
WORTH_BYTES = 1 << 20
CHUNK_BYTES = 32 << 20
BOUNCE_BYTES = 4 << 20


class FileWriter:
    """Writes to a new file from `position` on, piece after piece. The caller makes it durable with fsync."""

    def __init__(self, disk: Disk, fd: int, position: int = 0) -> None:
        self.fd = fd
        self._disk = disk
        self._position = 0
        self._direct = False
        self._possible = True
        self._bounce: memoryview | None = None
        if position:
            self.seek(position)

    def seek(self, position: int) -> None:
        """Go on at another place. What lies between and is never written reads as zeros."""
        self._disk.seek(self.fd, position)
        self._position = position

    def write(self, data: Buffer) -> None:
        """Write all of `data`."""
        view = memoryview(data).cast("B")
        while len(view):
            view = view[self._some(view) :]

    def _some(self, view: memoryview) -> int:
        """Write the first bytes of `view` and return how many."""
        missing = -self._position % ALIGNMENT
        if not self._possible or len(view) - missing < WORTH_BYTES:
            return self._cached(view[:CHUNK_BYTES])
        if missing:
            return self._cached(view[:missing])
        if not self._direct:
            self._direct = self._possible = self._disk.set_direct(self.fd, on=True)
            if not self._direct:
                return 0
        try:
            done = self._disk.write(self.fd, self._aligned(view))
        except OSError as e:
            if e.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
                raise
            self._possible = False
            return 0
        self._position += done
        return done

    def _cached(self, view: memoryview) -> int:
        if self._direct:
            self._disk.set_direct(self.fd, on=False)
            self._direct = False
        done = self._disk.write(self.fd, view)
        self._position += done
        return done

    def _aligned(self, view: memoryview) -> memoryview:
        """Return first bytes of `view`, whole blocks of them, at an aligned address."""
        size = min(CHUNK_BYTES, len(view) // ALIGNMENT * ALIGNMENT)
        if not view.readonly and address(view) % ALIGNMENT == 0:
            return view[:size]
        if self._bounce is None:
            self._bounce = memoryview(mmap.mmap(-1, BOUNCE_BYTES))
        size = min(size, BOUNCE_BYTES)
        self._bounce[:size] = view[:size]
        return self._bounce[:size]
