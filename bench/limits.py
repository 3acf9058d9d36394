"""What the machine itself can do, measured in the same round as everything else."""

from __future__ import annotations

import mmap
import os
import pathlib
import time

import torch

CHUNK = 32 << 20


class Limits:
    """Copies, writes and reads of `nbytes` bytes through warm, page-aligned memory."""

    def __init__(self, tensors: list[torch.Tensor], scratch: pathlib.Path) -> None:
        self.tensors = tensors
        self.nbytes = sum(t.nbytes for t in tensors)
        size = -(-self.nbytes // 4096) * 4096
        self.memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.memory.madvise(mmap.MADV_HUGEPAGE)
        self.view = memoryview(self.memory)
        self.path = scratch / "limit"
        self.targets: list[torch.Tensor] = []
        offset = 0
        for t in sorted(tensors, key=lambda t: -t.element_size()):
            flat = torch.frombuffer(self.view, dtype=t.dtype, count=t.numel(), offset=offset)
            self.targets.append(flat.view(t.shape))
            offset += t.nbytes
        self.sources = sorted(tensors, key=lambda t: -t.element_size())
        self.copy()

    def copy(self) -> float:
        """Copy every tensor into warm memory, in one call; return seconds."""
        started = time.perf_counter()
        with torch.no_grad():
            torch._foreach_copy_(self.targets, self.sources)
        return time.perf_counter() - started

    def write(self) -> float:
        """Write the memory past the page cache and fsync; return seconds."""
        started = time.perf_counter()
        fd = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | getattr(os, "O_DIRECT", 0))
        try:
            for offset in range(0, len(self.view), CHUNK):
                os.write(fd, self.view[offset : offset + CHUNK])
            os.fsync(fd)
        finally:
            os.close(fd)
        return time.perf_counter() - started

    def read(self) -> float:
        """Read what `write` wrote into the memory, in place; return seconds."""
        drop_caches(self.path)
        started = time.perf_counter()
        fd = os.open(self.path, os.O_RDONLY)
        try:
            for offset in range(0, len(self.view), CHUNK):
                os.preadv(fd, [self.view[offset : offset + CHUNK]], offset)
        finally:
            os.close(fd)
        return time.perf_counter() - started


def drop_caches(path: pathlib.Path) -> None:
    """Make the next read of a file, or of the files below a directory, come from the disk."""
    files = [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]
    for file in files:
        fd = os.open(file, os.O_RDONLY)
        try:
            os.fsync(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)


def sync_tree(path: pathlib.Path) -> None:
    """Make a file, or everything below a directory, durable: what its writer left out."""
    paths = [path] if path.is_file() else [*path.rglob("*"), path]
    for each in paths:
        fd = os.open(each, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
