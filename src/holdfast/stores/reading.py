"""Reading past the page cache: large, page-aligned stretches come from the disk without a copy in between.

O_DIRECT asks for an aligned address, file position and length. What does not meet that (the last bytes of a file) is
read through the page cache, and so is what the page cache holds already, and everything where the file system does not
play along: succeeding to set the flag proves nothing, the first read does.
"""

from __future__ import annotations

import errno

from holdfast.core.memory import PAGE, address
from holdfast.stores.disk import Disk

__all__ = ["read_buffer"]

WORTH_BYTES = 1 << 20


def read_buffer(disk: Disk, fd: int, start: int, target: memoryview) -> int:
    """Fill `target` with a file's bytes from `start` on; return how many there were. Nobody else uses `fd`."""
    stretch = _direct_bytes(start, target)
    direct = stretch > 0 and not disk.is_cached(fd, start, stretch)
    done = _read_direct(disk, fd, start, target[:stretch]) if direct else 0
    while done < len(target):
        got = disk.pread_into(fd, target[done:], start + done)
        if got == 0:
            break
        done += got
    return done


def _direct_bytes(start: int, target: memoryview) -> int:
    """Return how many bytes from file position `start` on can go directly into `target`; 0 for few or none."""
    if len(target) < WORTH_BYTES or start % PAGE or address(target) % PAGE:
        return 0
    return len(target) // PAGE * PAGE


def _read_direct(disk: Disk, fd: int, start: int, target: memoryview) -> int:
    """Read as much as goes directly, and leave the descriptor as it was."""
    done = 0
    if not disk.set_direct(fd, on=True):
        return done
    try:
        while done < len(target):
            got = disk.pread_into(fd, target[done:], start + done)
            if got == 0:
                break
            done += got
    except OSError as e:
        if e.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
            raise
    finally:
        disk.set_direct(fd, on=False)
    return done
