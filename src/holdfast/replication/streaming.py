"""A data file on its way from one store to another: read ahead, verified, and passed on in whole pages.

A few blocks that lie together are read in one go and verified while those before them are being written. What is
passed on begins at a page in the file and in memory, so both disks take it without a copy. Where several copies of a
file are at hand a block comes from the first one in which it verifies.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

from holdfast.catalog.content import DataFile
from holdfast.core.errors import DigestMismatch, IntegrityError, StoreError
from holdfast.core.memory import PAGE, map_pages
from holdfast.core.workers import Workers

__all__ = ["verified_pieces"]

STRETCH_BYTES = 16 << 20
AHEAD = 2  # stretches that are read while another one is written


@dataclass(frozen=True, slots=True)
class _Stretch:
    """Some blocks of a file, `begin` to `stop`, which lie together."""

    begin: int
    stop: int


def verified_pieces(
    copies: Sequence[DataFile], progress: Callable[[int], None] = lambda done: None
) -> Generator[memoryview, None, None]:
    """Yield the data region of a file in pieces, each verified; `progress` is told the bytes of each.

    `copies` are of one file, the preferred first. A piece has memory of its own, which goes when nobody refers to it.
    Who does not take all of them closes this (`contextlib.closing`), so that its threads end.

    Raises:
        IntegrityError: bytes are in no copy what was committed; names the file and the tensors.
    """
    stretches = _stretches(copies[0])
    reading: deque[Future[memoryview]] = deque()
    carried = memoryview(b"")  # the last bytes of a stretch, which do not fill a page
    with Workers(AHEAD, "holdfast-copy") as pool:
        try:
            for index, stretch in enumerate(stretches):
                while len(reading) <= AHEAD and index + len(reading) < len(stretches):
                    reading.append(pool.submit(_read, copies, stretches[index + len(reading)]))
                memory = reading.popleft().result()
                memory[: len(carried)] = carried
                last = index + 1 == len(stretches)
                whole = len(memory) if last else len(memory) // PAGE * PAGE
                carried = memory[whole:]
                if whole:
                    yield memory[:whole]
                progress(_bytes_of(copies[0], stretch))
        finally:  # also when the writer gives up
            pool.close(cancel=True)


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


def _read(copies: Sequence[DataFile], stretch: _Stretch) -> memoryview:
    """Return the bytes of a stretch, verified, and before them the place of those that share its first page."""
    file = copies[0]
    blocks = file.header.blocks[stretch.begin : stretch.stop]
    data_start = file.header.data_start
    origin = (data_start + blocks[0].start) // PAGE * PAGE
    first, end = file.pages_of(blocks[0].start, blocks[-1].end)
    memory = map_pages(end - origin)
    there = True
    try:
        file.read(first, memory[first - origin :])
    except (IntegrityError, StoreError):
        if len(copies) == 1:
            raise
        there = False
    for index, block in enumerate(blocks, stretch.begin):
        place = data_start + block.start - origin
        _settle(copies, index, memory[place : place + block.end - block.start], there=there)
    return memory[: data_start + blocks[-1].end - origin]


def _settle(copies: Sequence[DataFile], index: int, data: memoryview, *, there: bool) -> None:
    """Make `data` the bytes of a block, of the first copy in which it verifies; `there`: it has those of the first."""
    failures: list[IntegrityError | StoreError] = []
    for file in copies:
        try:
            if file is copies[0] and there:
                file.check(index, data)
            else:
                data[:] = file.read_block(index)
            return
        except (IntegrityError, StoreError) as e:
            failures.append(e)
    if len(copies) == 1:
        raise failures[0]
    told = "; ".join(f"{file.store.url}: {e}" for file, e in zip(copies, failures, strict=True))
    raise DigestMismatch(f"block {index} is whole in no copy: {told}")
