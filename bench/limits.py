"""What the machine itself can do, measured in the same rounds as everything else."""

from __future__ import annotations

import mmap
import os
import pathlib
import time

import torch

from bench.disk import delete, drop_caches
from bench.states import ONE_TENSOR, STATES

CHUNK = 32 << 20
PAGE = 4096

Figures = dict[str, float]


class Limit:
    """Copies, writes and reads of tensors' bytes through warm, page-aligned memory."""

    def __init__(self, tensors: list[torch.Tensor], path: pathlib.Path) -> None:
        size = -(-sum(t.nbytes for t in tensors) // PAGE) * PAGE
        self._memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._memory.madvise(mmap.MADV_HUGEPAGE)
        self.view = memoryview(self._memory)
        self.path = path
        self._sources = tensors
        self._targets: list[torch.Tensor] = []
        offset = 0
        for t in tensors:
            flat = torch.frombuffer(self.view, dtype=t.dtype, count=t.numel(), offset=offset)
            self._targets.append(flat.view(t.shape))
            offset += t.nbytes

    def copy(self) -> float:
        """Copy every tensor, in one call; return the seconds, as all these do."""
        started = time.perf_counter()
        with torch.no_grad():
            torch._foreach_copy_(self._targets, self._sources)
        return time.perf_counter() - started

    def write(self) -> float:
        """Write what was copied past the page cache, and sync it."""
        started = time.perf_counter()
        fd = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_DIRECT)
        try:
            for offset in range(0, len(self.view), CHUNK):
                os.write(fd, self.view[offset : offset + CHUNK])
            os.fsync(fd)
        finally:
            os.close(fd)
        return time.perf_counter() - started

    def read(self, nbytes: int, flags: int) -> float:
        """Read so many bytes of it in place."""
        drop_caches(self.path)
        started = time.perf_counter()
        fd = os.open(self.path, os.O_RDONLY | flags)
        try:
            for offset in range(0, nbytes, CHUNK):
                os.preadv(fd, [self.view[offset : min(offset + CHUNK, -(-nbytes // PAGE) * PAGE)]], offset)
        finally:
            os.close(fd)
        return time.perf_counter() - started


class LimitDesk(Limit):
    """The limit in a contestant's place."""

    def __init__(self, state: str, quick: bool, scratch: pathlib.Path) -> None:
        self.subject = STATES[state](quick)
        super().__init__(
            [t for part in self.subject.tensors().values() for t in part.values()], scratch / "limit"
        )

    def open(self) -> None:
        """Warm the memory up."""
        self.copy()

    def rest(self) -> None:
        """Nothing goes on before a save."""

    def save(self) -> Figures:
        """Copy every tensor into warm memory, in one call; write that memory past the page cache, and fsync."""
        os.sync()
        return {"held": self.copy(), "durable": self.write()}

    def turn(self) -> Figures:
        """What a loop has to wait for, at the least, when a save is a copy."""
        torch.set_num_threads(1)
        return {"held": self.copy()}

    def load(self) -> Figures:
        """Read what was written into warm memory, in place: through the page cache, and past it."""
        return {
            "load": self.read(len(self.view), 0),
            "load, O_DIRECT": self.read(len(self.view), os.O_DIRECT),
        }

    def roll_back(self) -> Figures:
        """Copy every tensor from memory to memory."""
        return {"rolled back": self.copy()}

    def load_one(self) -> Figures:
        """Read the bytes of one tensor."""
        part, name = ONE_TENSOR
        nbytes = self.subject.tensors()[part][name].nbytes
        return {"load one": self.read(nbytes, 0), "load one, O_DIRECT": self.read(nbytes, os.O_DIRECT)}

    def stored_bytes(self) -> int:
        return self.subject.nbytes()

    def close(self) -> None:
        delete(self.path)
