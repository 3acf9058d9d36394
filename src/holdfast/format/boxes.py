"""Parts of tensors: where in the whole the bytes of a box lie.

All is said in bytes of the whole tensor in C order, so that a part of any shape is a list of runs, and to put a tensor
together from parts is to fill gaps in one line.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

__all__ = ["MAX_EXTENT", "Box", "Gap", "Rows", "Run", "fill", "fits", "is_bounded", "runs"]

MAX_DIMENSIONS = 64  # of torch and of numpy
MAX_EXTENT = 2**62  # in bytes, of what a shape or a stride spans, so that no reader overflows

Box = tuple[tuple[int, ...], tuple[int, ...]]  # offsets in the whole, shape of the whole
Rows = tuple[tuple[int, int], ...]  # first and end of several stretches of rows of the whole
Gap = tuple[int, int]  # bytes of the whole that nobody has given yet: first, end


class Run(NamedTuple):
    """`size` bytes that lie together in the whole, from `at` on, and in its part, from `source` on."""

    at: int
    source: int
    size: int


def is_bounded(shape: tuple[int, ...], stride: tuple[int, ...] | None, itemsize: int) -> bool:
    """Return whether no reader's arithmetic overflows; empty dimensions count as 1, as they do in numpy."""
    if len(shape) > MAX_DIMENSIONS or min(shape, default=0) < 0:
        return False
    if math.prod(max(n, 1) for n in shape) * itemsize > MAX_EXTENT:
        return False
    return stride is None or (
        len(stride) == len(shape) and all(0 <= s * itemsize <= MAX_EXTENT for s in stride)
    )


def fits(shape: Sequence[int], box: Box, rows: Rows | None, largest: int) -> bool:
    """Return whether a part of this shape lies inside its whole, no size of which exceeds `largest`.

    Stretches of rows must be several, in rising order and apart from each other, so that a part has one form only.
    """
    offsets, whole = box
    if not len(offsets) == len(whole) == len(shape):
        return False
    if not all(o >= 0 and o + n <= w <= largest for o, n, w in zip(offsets, shape, whole, strict=True)):
        return False
    if rows is None:
        return True
    if not shape or len(rows) < 2 or rows[0][0] != offsets[0] or rows[-1][1] > whole[0]:
        return False
    apart = all(one[1] < after[0] for one, after in itertools.pairwise(rows))
    return apart and all(a < b for a, b in rows) and sum(b - a for a, b in rows) == shape[0]


def runs(shape: Sequence[int], box: Box | None, rows: Rows | None, itemsize: int) -> Iterator[Run]:
    """Yield the runs of a part, or of a whole tensor (no box), in rising order."""
    size = math.prod(shape) * itemsize
    if not size:
        return
    if box is None:
        yield Run(0, 0, size)
        return
    if rows is None:
        yield from _runs_of_box(shape, box, itemsize, 0)
        return
    source, row = 0, size // shape[0]
    for first, end in rows:
        stretch = ((first, *box[0][1:]), box[1])
        yield from _runs_of_box((end - first, *shape[1:]), stretch, itemsize, source)
        source += (end - first) * row


def _runs_of_box(shape: Sequence[int], box: Box, itemsize: int, source: int) -> Iterator[Run]:
    offsets, whole = box
    cut = len(shape) - 1  # the last dimension that the box does not have all of
    while cut > 0 and shape[cut] == whole[cut]:
        cut -= 1
    strides = [math.prod(whole[d + 1 :]) * itemsize for d in range(len(shape))]
    size = math.prod(shape[max(cut, 0) :]) * itemsize
    first = sum(o * s for o, s in zip(offsets, strides, strict=True))
    for index in itertools.product(*map(range, shape[: max(cut, 0)])):
        yield Run(first + sum(i * s for i, s in zip(index, strides, strict=False)), source, size)
        source += size


def fill(gaps: Sequence[Gap], given: Iterable[Run]) -> tuple[list[Run], list[Gap]]:
    """Return what of some runs, in rising order, fills gaps, and the gaps that are left."""
    used: list[Run] = []
    left: list[Gap] = []
    rest = iter(given)
    run = next(rest, None)
    for first, end in gaps:
        position = first
        while run is not None and run.at < end:
            begin, stop = max(run.at, position), min(run.at + run.size, end)
            if begin < stop:
                if position < begin:
                    left.append((position, begin))
                used.append(Run(begin, run.source + begin - run.at, stop - begin))
                position = stop
            if run.at + run.size > end:
                break  # the next gap may want of it too
            run = next(rest, None)
        if position < end:
            left.append((position, end))
    return used, left
