"""A data file on its way from one store to another: read ahead, verified, and passed on in whole pages.

A few blocks that lie together are read in one go and verified while those before them are being written. What is
passed on begins at a page in the file and in memory, so both disks take it without a copy.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from holdfast.catalog.content import DataFile
from holdfast.core.memory import PAGE, map_pages

__all__ = ["verified_pieces"]

STRETCH_BYTES = 16 << 20
AHEAD = 2  # stretches that are read while another one is written


@dataclass(frozen=True, slots=True)
class _Stretch:
    """Some blocks of a file, `begin` to `stop`, which lie together."""

    begin: int
    stop: int


def verified_pieces(
    file: DataFile, progress: Callable[[int], None] = lambda done: None
) -> Iterator[memoryview]:
    """Yield the data region of a file in pieces, each verified; `progress` is told the bytes of each.

    A piece has memory of its own, which goes when nobody refers to it any more.

    Raises:
        IntegrityError: bytes are not what was committed; names the file and the tensors.
    """
    stretches = _stretches(file)
    reading: deque[Future[memoryview]] = deque()
    carried = memoryview(b"")  # the last bytes of a stretch, which do not fill a page
    with ThreadPoolExecutor(AHEAD, thread_name_prefix="holdfast-copy") as pool:
        try:
            for index, stretch in enumerate(stretches):
                while len(reading) <= AHEAD and index + len(reading) < len(stretches):
                    reading.append(pool.submit(_read, file, stretches[index + len(reading)]))
                memory = reading.popleft().result()
                memory[: len(carried)] = carried
                last = index + 1 == len(stretches)
                whole = len(memory) if last else len(memory) // PAGE * PAGE
                carried = memory[whole:]
                if whole:
                    yield memory[:whole]
                progress(_bytes_of(file, stretch))
        finally:  # also when the writer gives up
            pool.shutdown(wait=True, cancel_futures=True)


def _stretches(file: DataFile) -> list[_Stretch]:
    """Cut a file into stretches of about `STRETCH_BYTES`, of one block where that is larger."""
    blocks = file.header.blocks
    found: list[_Stretch] = []
    begin = 0
    for index, block in enumerate(blocks):
        if index > begin and block.end - blocks[begin].start > STRETCH_BYTES:
            found.append(_Stretch(begin, index))
            begin = index
    return [*found, _Stretch(begin, len(blocks))] if blocks else []


def _bytes_of(file: DataFile, stretch: _Stretch) -> int:
    blocks = file.header.blocks
    return blocks[stretch.stop - 1].end - blocks[stretch.begin].start


def _read(file: DataFile, stretch: _Stretch) -> memoryview:
    """Return the bytes of a stretch, verified, and before them those that share its first page."""
    blocks = file.header.blocks[stretch.begin : stretch.stop]
    first, end = file.pages_of(blocks[0].start, blocks[-1].end)
    lead = first % PAGE  # of a packed file, which is not read in pages
    memory = map_pages(lead + end - first)
    file.read(first, memory[lead:])
    origin = first - lead - file.header.data_start
    for index, block in enumerate(blocks, stretch.begin):
        file.check(index, memory[block.start - origin : block.end - origin])
    return memory[: blocks[-1].end - origin]
