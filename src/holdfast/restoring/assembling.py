"""Put a tensor, or a range of its bytes, together from the pieces that hold it.

What is wanted is cut with what is stored; the blocks around that are read in long stretches, verified, and copied to
their place. Of the stretches only a few are in memory at a time.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

from holdfast.catalog.content import DataFile
from holdfast.catalog.pieces import Piece
from holdfast.core.memory import NO_MEMORY, Spare, map_pages, page_aligned
from holdfast.format.boxes import Run
from holdfast.restoring.staging import Slab, read_slabs, slabs_of

__all__ = ["assemble", "assemble_runs"]

AT_ONCE_BYTES = 256 << 20
ALIGNED_BYTES = 64


def assemble(pieces: Sequence[Piece], first: int, end: int) -> memoryview:
    """Return bytes `first` to `end` of a tensor, in memory of their own, every one verified.

    Raises:
        IntegrityError: bytes are not what was committed; names the file and the tensors.
    """
    return _gather(_cut(pieces, first, end), end - first)


def assemble_runs(
    wanted: Iterable[tuple[Sequence[Piece], Iterable[Run], int]], spare: Spare | None = None
) -> list[memoryview]:
    """Return for each (pieces of a tensor, runs of it, size) the bytes of the runs, each where its `source` says, in
    memory of that size, `spare` where there is enough. What lies together is read together, whichever tensor it is of.

    Raises:
        IntegrityError: bytes are not what was committed; names the file and the tensors.
    """
    requests = list(wanted)
    places: list[int] = []
    total = 0
    for _, _, size in requests:
        places.append(total)
        total += -(-size // ALIGNED_BYTES) * ALIGNED_BYTES
    moved = (
        replace(piece, at=piece.at + place)
        for place, (pieces, runs, _) in zip(places, requests, strict=True)
        for piece in _cut_runs(pieces, runs)
    )
    target = _gather(moved, total, spare)
    return [target[p : p + size] for p, (_, _, size) in zip(places, requests, strict=True)]


def _gather(wanted_pieces: Iterable[Piece], size: int, spare: Spare | None = None) -> memoryview:
    target = _memory(size, spare)
    wanted = _by_file(wanted_pieces)
    batches = list(_batches(slab for key in sorted(wanted) for slab in _slabs(*wanted[key])))
    between = _memory(max(map(_bytes_of, batches), default=0), spare)  # of all batches, one after the other
    for batch in batches:
        read_slabs(batch, Spare(between))
        for slab in batch:
            _copy(slab, wanted[slab.file.entry.key][1], target)
            slab.memory = memoryview(b"")
    return target


def _memory(size: int, spare: Spare | None) -> memoryview:
    found = spare.take(size) if spare is not None else None
    return found if found is not None else map_pages(size) if size else NO_MEMORY


def _bytes_of(batch: Iterable[Slab]) -> int:
    return sum(page_aligned(slab.end - slab.first) for slab in batch)


def _cut(pieces: Iterable[Piece], first: int, end: int) -> Iterator[Piece]:
    """Yield what of the pieces lies between two bytes of the tensor, counted from the first of these."""
    for p in pieces:
        begin, stop = max(p.at, first), min(p.at + p.size, end)
        if begin < stop:
            yield Piece(p.file, begin - first, p.start + begin - p.at, stop - begin)


def _cut_runs(pieces: Sequence[Piece], wanted: Iterable[Run]) -> Iterator[Piece]:
    """Yield what of the pieces, in their order, lies in some runs, in rising order, at the place it has in these."""
    index = 0
    for run in wanted:
        end = run.at + run.size
        while index < len(pieces) and pieces[index].at + pieces[index].size <= run.at:
            index += 1
        at = index
        while at < len(pieces) and pieces[at].at < end:
            p = pieces[at]
            begin, stop = max(p.at, run.at), min(p.at + p.size, end)
            yield Piece(p.file, run.source + begin - run.at, p.start + begin - p.at, stop - begin)
            at += 1


def _by_file(pieces: Iterable[Piece]) -> dict[str, tuple[DataFile, list[Piece]]]:
    """Return the pieces of each file in the order in which they lie there."""
    found: dict[str, tuple[DataFile, list[Piece]]] = {}
    for piece in pieces:
        found.setdefault(piece.file.entry.key, (piece.file, []))[1].append(piece)
    for _, in_file in found.values():
        in_file.sort(key=lambda piece: piece.start)
    return found


def _slabs(file: DataFile, pieces: Sequence[Piece]) -> list[Slab]:
    blocks: list[int] = []
    for piece in pieces:
        covering = file.blocks_of(piece.start, piece.start + piece.size)
        blocks.extend(i for i in covering if not blocks or i > blocks[-1])
    slabs = slabs_of(file, blocks, cut=True)
    for slab in slabs:
        slab.passing = True
    return slabs


def _batches(slabs: Iterable[Slab]) -> Iterator[list[Slab]]:
    """Yield slabs that are in memory at once."""
    batch: list[Slab] = []
    size = 0
    for slab in slabs:
        if batch and size + slab.end - slab.first > AT_ONCE_BYTES:
            yield batch
            batch, size = [], 0
        batch.append(slab)
        size += slab.end - slab.first
    if batch:
        yield batch


def _copy(slab: Slab, pieces: Sequence[Piece], target: memoryview) -> None:
    """Copy what a slab holds of a file's pieces to where it belongs."""
    blocks = slab.file.header.blocks
    first, end = blocks[slab.blocks[0]].start, blocks[slab.blocks[-1]].end
    for p in pieces[_first_beyond(pieces, first) :]:
        if p.start >= end:
            return
        begin, stop = max(p.start, first), min(p.start + p.size, end)
        at, source = p.at + begin - p.start, slab.place_of(begin)
        target[at : at + stop - begin] = slab.memory[source : source + stop - begin]


def _first_beyond(pieces: Sequence[Piece], position: int) -> int:
    """Return the index of the first piece, in rising order, that ends beyond `position` in the file."""
    return bisect.bisect_right(pieces, position, key=lambda p: p.start + p.size)
