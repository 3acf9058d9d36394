"""Bring verified blocks of data files into memory as fast as the disk gives them.

Blocks that lie together are read in one go, in whole pages, by a few threads, while two more touch the memory ahead
of them. A block is verified as soon as its last byte is there, while others are read.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from holdfast.catalog.content import DataFile
from holdfast.core.memory import Spare, map_pages, touch

__all__ = ["Slab", "read_slabs", "slabs_of"]

READERS = 4
TOUCHERS = 2
CHUNK_BYTES = 16 << 20
SLAB_BYTES = 32 << 20
GAP_BYTES = 1 << 20  # bytes that nobody wants are read over where stopping and starting again would cost more


@dataclass(slots=True, eq=False)
class Slab:
    """Some blocks of a file in one piece of memory.

    `first` to `end` are the whole pages around them, as positions in the file; `memory` begins with byte `first`. What
    is in a `passing` one is copied on, and its memory is not kept.
    """

    file: DataFile
    blocks: list[int]
    first: int = 0
    end: int = 0
    memory: memoryview = field(default_factory=lambda: memoryview(b""))
    passing: bool = False

    def place_of(self, offset: int) -> int:
        """Return where in `memory` byte `offset` of the file's data region lies."""
        return self.file.header.data_start + offset - self.first

    def block(self, index: int) -> memoryview:
        """Return the bytes of a block."""
        block = self.file.header.blocks[index]
        start = self.place_of(block.start)
        return self.memory[start : start + block.end - block.start]


@dataclass(slots=True, eq=False)
class _Chunk:
    """What one thread reads at once: pages of a slab that no other chunk has, and the blocks that lie in them."""

    slab: Slab
    first: int
    end: int
    blocks: list[int]


def slabs_of(file: DataFile, blocks: Iterable[int], *, cut: bool = False) -> list[Slab]:
    """Group some blocks of a file, in rising order, into slabs that have no memory yet.

    No tensor lies in two slabs, unless they may be `cut`. A tensor that is kept keeps the memory of its slab, so slabs
    of many are small.
    """
    slabs: list[Slab] = []
    begin = stop = tensor = -1
    for index in blocks:
        block = file.header.blocks[index]
        apart = block.start - stop > GAP_BYTES or block.end - begin > SLAB_BYTES
        if not slabs or (apart and (cut or block.first != tensor)):
            begin = block.start
            slabs.append(Slab(file, []))
        slabs[-1].blocks.append(index)
        slabs[-1].first, slabs[-1].end = file.pages_of(begin, block.end)
        stop, tensor = block.end, block.last
    return slabs


def read_slabs(slabs: Sequence[Slab], spare: Spare | None = None) -> None:
    """Give every slab memory, passing ones of what there is to `spare`, and fill it; return when every block in them
    has been verified.

    Raises:
        IntegrityError: bytes are not what was committed; names the file and the tensors.
    """
    fresh: list[Slab] = []
    for slab in slabs:
        found = spare.take(slab.end - slab.first) if spare is not None and slab.passing else None
        if found is None:
            fresh.append(slab)
        slab.memory = map_pages(slab.end - slab.first) if found is None else found
    chunks = [chunk for slab in slabs for chunk in _chunks_of(slab)]
    missing = Counter((id(chunk.slab), index) for chunk in chunks for index in chunk.blocks)
    lock, failed = threading.Lock(), threading.Event()

    def read(chunk: _Chunk) -> None:
        slab = chunk.slab
        slab.file.read(chunk.first, slab.memory[chunk.first - slab.first : chunk.end - slab.first])
        with lock:
            missing.subtract((id(slab), index) for index in chunk.blocks)
            whole = [index for index in chunk.blocks if not missing[id(slab), index]]
        for index in whole:
            slab.file.check(index, slab.block(index))

    untouched = iter(fresh)

    def touch_ahead() -> None:
        while not failed.is_set():
            with lock:
                slab = next(untouched, None)
            if slab is None:
                return
            touch(slab.memory)

    if len(chunks) < 2:
        for chunk in chunks:
            read(chunk)
        return
    with ThreadPoolExecutor(READERS + TOUCHERS, thread_name_prefix="holdfast-read") as pool:
        jobs = [pool.submit(touch_ahead) for _ in fresh[:TOUCHERS]] + [pool.submit(read, c) for c in chunks]
        try:
            for job in jobs:
                job.result()
        except BaseException:
            failed.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _chunks_of(slab: Slab) -> Iterator[_Chunk]:
    header = slab.file.header
    position = 0  # in slab.blocks: the first one that is not behind us
    for first in range(slab.first, slab.end, CHUNK_BYTES):
        end = min(slab.end, first + CHUNK_BYTES)
        inside: list[int] = []
        for at in range(position, len(slab.blocks)):
            block = header.blocks[slab.blocks[at]]
            if header.data_start + block.start >= end:
                break
            inside.append(slab.blocks[at])
            if header.data_start + block.end <= end:
                position = at + 1
        yield _Chunk(slab, first, end, inside)
