"""Bytes of a checkpoint that still lie in memory, where they were copied to be saved: a rollback asks no disk for them.

That they are the checkpoint's bytes nothing says but their digests. They are looked for by the names of tensors, and
what does not verify is read like everything else.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor

from holdfast.core.errors import DigestMismatch
from holdfast.format.datafile import StoredTensor
from holdfast.restoring.staging import Slab

__all__ = ["Remembered"]

CHECKERS = 4


class Remembered:
    """Snapshots' tensors, in data order, and the memory in which they lie one behind the other."""

    def __init__(self, parts: Iterable[tuple[Sequence[StoredTensor], memoryview]]) -> None:
        self._places: dict[str, list[tuple[StoredTensor, memoryview]]] = {}
        for tensors, memory in parts:
            for t in tensors:
                self._places.setdefault(t.name, []).append((t, memory))

    def fill(self, slabs: Sequence[Slab]) -> list[Slab]:
        """Give slabs the memory in which their blocks are found, verified; return the others."""
        if len(slabs) < 2:
            return [slab for slab in slabs if not self._find(slab)]
        with ThreadPoolExecutor(CHECKERS, thread_name_prefix="holdfast-check") as pool:
            found = list(pool.map(self._find, slabs))
        return [slab for slab, there in zip(slabs, found, strict=True) if not there]

    def _find(self, slab: Slab) -> bool:
        header = slab.file.header
        first, last = header.blocks[slab.blocks[0]], header.blocks[slab.blocks[-1]]
        wanted = header.tensors[first.first]
        for t, memory in self._places.get(wanted.name, ()):
            start = t.start + first.start - wanted.start
            end = start + last.end - first.start
            if (t.dtype, t.shape, t.box) != (wanted.dtype, wanted.shape, wanted.box) or end > len(memory):
                continue
            slab.first, slab.end = header.data_start + first.start, header.data_start + last.end
            slab.memory, slab.passing = memory[start:end], True
            if _is_right(slab):
                return True
        slab.first, slab.end = slab.file.pages_of(first.start, last.end)
        return False


def _is_right(slab: Slab) -> bool:
    try:
        for index in slab.blocks:
            slab.file.check(index, slab.block(index))
    except DigestMismatch:
        return False
    return True
