"""The dozen operating-system calls that a local store is made of.

They stand behind one small interface so that tests can stop, fail or kill at each of them.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import mmap
import os
from collections.abc import Iterator
from typing import Protocol

from holdfast.core.buffers import Buffer

__all__ = ["Disk", "OsDisk"]


class Disk(Protocol):
    """The file-system calls of a local store; paths are absolute."""

    def open_new(self, path: str) -> int: ...
    def open_append(self, path: str) -> int: ...
    def open_read(self, path: str) -> int: ...
    def write(self, fd: int, data: Buffer) -> int: ...
    def seek(self, fd: int, position: int) -> None: ...
    def set_direct(self, fd: int, *, on: bool) -> bool: ...
    def pread_into(self, fd: int, target: memoryview, offset: int) -> int: ...
    def is_cached(self, fd: int, offset: int, size: int) -> bool: ...
    def fsync(self, fd: int) -> None: ...
    def close(self, fd: int) -> None: ...
    def fsync_dir(self, path: str) -> None: ...
    def link(self, source: str, target: str) -> None: ...
    def rename(self, source: str, target: str) -> None: ...
    def unlink(self, path: str) -> None: ...
    def mkdir(self, path: str) -> None: ...
    def rmdir(self, path: str) -> None: ...
    def stat(self, path: str | int) -> os.stat_result: ...
    def walk(self, path: str) -> Iterator[str]: ...
    def room(self, path: str) -> int: ...


class OsDisk:
    """The calls as the operating system offers them."""

    def open_new(self, path: str) -> int:
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)

    def open_append(self, path: str) -> int:
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
        return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)  # a link or a pipe is none of ours

    def open_read(self, path: str) -> int:
        return os.open(
            path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK
        )  # a pipe in the place of a file must not wait

    def write(self, fd: int, data: Buffer) -> int:
        return os.write(fd, data)

    def seek(self, fd: int, position: int) -> None:
        os.lseek(fd, position, os.SEEK_SET)

    def set_direct(self, fd: int, *, on: bool) -> bool:
        """Turn reading and writing past the page cache on or off; return whether that was done."""
        flag = getattr(os, "O_DIRECT", 0)
        if not flag:
            return False
        flags = fcntl.fcntl(fd, fcntl.F_GETFL)
        try:
            fcntl.fcntl(fd, fcntl.F_SETFL, flags | flag if on else flags & ~flag)
        except OSError:  # tmpfs and others: no such thing there
            return False
        return True

    def pread_into(self, fd: int, target: memoryview, offset: int) -> int:
        return os.preadv(fd, [target], offset)

    def is_cached(self, fd: int, offset: int, size: int) -> bool:
        """Return whether the page cache holds most of `size` bytes; `offset` is a multiple of the page size."""
        mincore = getattr(ctypes.CDLL(None), "mincore", None)
        if mincore is None:
            return False
        try:
            pages = mmap.mmap(fd, size, flags=mmap.MAP_PRIVATE, offset=offset)
        except (OSError, ValueError):  # a file system that maps nothing, or a file that ends before
            return False
        with pages:
            found = (ctypes.c_ubyte * -(-size // mmap.PAGESIZE))()
            first = ctypes.c_ubyte.from_buffer(pages)
            asked = mincore(ctypes.c_void_p(ctypes.addressof(first)), ctypes.c_size_t(size), found)
            del first  # it would keep the mapping from being closed
        return asked == 0 and bytes(found).count(1) > len(found) // 2

    def fsync(self, fd: int) -> None:
        os.fsync(fd)

    def close(self, fd: int) -> None:
        os.close(fd)

    def fsync_dir(self, path: str) -> None:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    def link(self, source: str, target: str) -> None:
        os.link(source, target)

    def rename(self, source: str, target: str) -> None:
        os.rename(source, target)

    def unlink(self, path: str) -> None:
        os.unlink(path)

    def mkdir(self, path: str) -> None:
        os.mkdir(path)

    def rmdir(self, path: str) -> None:
        os.rmdir(path)

    def stat(self, path: str | int) -> os.stat_result:
        return os.stat(path)

    def walk(self, path: str) -> Iterator[str]:
        """Yield every regular file below `path`, but for directories that no store makes: hidden ones (.snapshot), and
        deeper ones that may not be read (lost+found)."""
        try:
            entries = list(os.scandir(path))
        except (FileNotFoundError, NotADirectoryError):
            return
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                if not entry.name.startswith("."):
                    with contextlib.suppress(PermissionError):
                        yield from self.walk(entry.path)
            elif entry.is_file(follow_symlinks=False):
                yield entry.path

    def room(self, path: str) -> int:
        """Return how many bytes an unprivileged process may still write to the file system of `path`."""
        found = os.statvfs(path)
        return found.f_bavail * found.f_frsize
