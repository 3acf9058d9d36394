"""What the machine itself can do, measured in the same rounds as everything else."""

from __future__ import annotations

import mmap
import os
import pathlib
import time
from contextlib import AbstractContextManager

import torch

from bench.devices import finish
from bench.disk import delete, drop_caches
from bench.states import ONE_TENSOR, Recipe
from bench.timing import Figures, quiet

CHUNK = 32 << 20
PAGE = 4096


class Limit:
    """Copies, writes and reads of tensors' bytes through warm, page-aligned memory, pinned where they are on a GPU."""

    def __init__(self, tensors: list[torch.Tensor], path: pathlib.Path) -> None:
        self._device = tensors[0].device.type
        size = -(-sum(t.nbytes for t in tensors) // PAGE) * PAGE
        memory = _aligned(size, pinned=self._device == "cuda")
        self.view = memory.numpy().data
        self.path = path
        self._sources = tensors
        self._targets: list[torch.Tensor] = []
        offset = 0
        for t in tensors:
            self._targets.append(memory[offset : offset + t.nbytes].view(t.dtype).view(t.shape))
            offset += t.nbytes

    def copy(self) -> float:
        """Copy every tensor, in one call on one stream; return the seconds until all are there, as all these do."""
        return self._copied(self._targets, self._sources)

    def copy_back(self) -> float:
        """Copy every tensor from that memory to where it came from."""
        return self._copied(self._sources, self._targets)

    def _copied(self, to: list[torch.Tensor], of: list[torch.Tensor]) -> float:
        finish(self._device)
        started = time.perf_counter()
        with torch.no_grad():
            torch._foreach_copy_(to, of, non_blocking=True)  # pyright: ignore[reportPrivateImportUsage]
        finish(self._device)
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

    def __init__(self, recipe: Recipe, scratch: pathlib.Path, file: str = "limit") -> None:
        self.subject = recipe.subject()
        super().__init__([t for of in self.subject.local().values() for t in of.values()], scratch / file)

    def open(self) -> None:
        """Warm the memory up."""
        self.copy()

    def rest(self) -> None:
        """Nothing goes on before a save."""

    def quiet(self) -> AbstractContextManager[None]:
        return quiet(self._device)

    def save(self) -> Figures:
        """Copy every tensor into warm memory, in one call; write that memory past the page cache, and fsync."""
        with self.quiet():
            return {"held": self.copy(), "durable": self.write()}

    def turn(self) -> Figures:
        """What a loop has to wait for, at the least, when a save is a copy."""
        return {"held": self.copy()}

    def load(self) -> Figures:
        """Read what was written into warm memory, in place: through the page cache, and past it."""
        found: Figures = {}
        for key, flags in (("load", 0), ("load, O_DIRECT", os.O_DIRECT)):
            with self.quiet():
                found[key] = self.read(len(self.view), flags)
        return found

    def roll_back(self) -> Figures:
        """Copy every tensor from memory to memory."""
        with self.quiet():
            return {"rolled back": self.copy()}

    def load_one(self) -> Figures:
        """Read the bytes of one tensor."""
        part, name = ONE_TENSOR
        nbytes = self.subject.tensors()[part][name].nbytes
        return {"load one": self.read(nbytes, 0), "load one, O_DIRECT": self.read(nbytes, os.O_DIRECT)}

    def state_bytes(self) -> int:
        return self.subject.nbytes()

    def close(self) -> None:
        delete(self.path)


class DeviceLimitDesk(LimitDesk):
    """The limit of a state that is not in the memory that files are read into: a copy to its device follows."""

    def load(self) -> Figures:
        found = super().load()
        copied = self.copy_back()
        return {key: seconds + copied for key, seconds in found.items()}


def _aligned(size: int, *, pinned: bool) -> torch.Tensor:
    """Return memory of whole pages, as bytes."""
    if pinned:
        return torch.empty(size, dtype=torch.uint8, pin_memory=True)
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8)
