"""Statistics of one tensor, from a stream of its bytes."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from holdfast.analysis.blocks import Blocks
from holdfast.analysis.numbers import as_native, as_numbers, chunks
from holdfast.restoring.reader import Reader

__all__ = ["BINS", "Statistics", "describe"]

BINS = 48


@dataclass(frozen=True, slots=True)
class Statistics:
    """What the elements of a tensor are like; complex ones by their magnitude.

    `minimum` to `norm` speak of the finite elements and are None when there is none. `std` divides by their
    number. Integers keep their exact minimum and maximum. `histogram` counts `BINS` equal intervals from
    minimum to maximum.
    """

    count: int
    finite: int
    zeros: int
    nan: int
    positive_infinite: int
    negative_infinite: int
    minimum: float | int | None
    maximum: float | int | None
    mean: float | None
    std: float | None
    norm: float | None
    histogram: tuple[int, ...]


@dataclass(slots=True)
class _Running:
    """The sums so far. Chunks are merged as in Chan, Golub & LeVeque, "Updating formulae" (1979)."""

    count: int = 0
    finite: int = 0
    zeros: int = 0
    nan: int = 0
    above: int = 0
    below: int = 0
    low: float | int | None = None
    high: float | int | None = None
    mean: float = 0.0
    spread: float = 0.0
    squares: float = 0.0

    def add(self, native: NDArray[np.generic], values: NDArray[np.float64]) -> None:
        good = np.isfinite(values)
        self.count += values.size
        if not good.all():
            self.nan += int(np.isnan(values).sum())
            self.above += int(np.isposinf(values).sum())
            self.below += int(np.isneginf(values).sum())
            values = values[good]
        if not values.size:
            return
        exact = native.dtype.kind in "iu"
        low = int(native.min()) if exact else float(values.min())
        high = int(native.max()) if exact else float(values.max())
        self.low = low if self.low is None else min(self.low, low)
        self.high = high if self.high is None else max(self.high, high)
        self.zeros += int(values.size - np.count_nonzero(values))
        self._merge(values)

    def _merge(self, values: NDArray[np.float64]) -> None:
        mean = float(values.mean())
        centred = values - mean
        shift = mean - self.mean
        total = self.finite + values.size
        self.spread += float(centred @ centred) + shift * shift * (self.finite * values.size / total)
        self.mean += shift * (values.size / total)
        self.squares += float(values @ values)
        self.finite = total


def describe(reader: Reader, name: str, progress: Callable[[int], None] = lambda done: None) -> Statistics:
    """Return the statistics of a tensor, reading it twice (the second time for the histogram), verified.

    `progress` is told the number of bytes read since its last call, up to twice the tensor's size.

    Raises:
        KeyError: there is no such tensor.
        IntegrityError: bytes are not what was committed.
    """
    blocks, dtype = Blocks(reader), reader.spec(name).dtype
    sums = _Running()
    with np.errstate(over="ignore", invalid="ignore"):
        for piece in blocks.pieces(name):
            for chunk in chunks(piece, dtype):
                native = as_native(chunk, dtype)
                sums.add(native, _real(chunk, dtype))
            progress(len(piece))
        counts = np.zeros(BINS, np.int64)
        if sums.low is not None and sums.high is not None:
            for piece in blocks.pieces(name):
                for chunk in chunks(piece, dtype):
                    counts += _histogram(_real(chunk, dtype), float(sums.low), float(sums.high))
                progress(len(piece))
    return _finished(sums, counts)


def _finished(sums: _Running, counts: NDArray[np.int64]) -> Statistics:
    some = sums.finite > 0
    return Statistics(
        count=sums.count,
        finite=sums.finite,
        zeros=sums.zeros,
        nan=sums.nan,
        positive_infinite=sums.above,
        negative_infinite=sums.below,
        minimum=sums.low,
        maximum=sums.high,
        mean=sums.mean if some else None,
        std=math.sqrt(sums.spread / sums.finite) if some else None,
        norm=math.sqrt(sums.squares) if some else None,
        histogram=tuple(counts.tolist()) if some else (),
    )


def _real(chunk: memoryview, dtype: str) -> NDArray[np.float64]:
    values = as_numbers(chunk, dtype)
    magnitudes: NDArray[np.float64] = (
        np.abs(values) if values.dtype.kind == "c" else values.astype(np.float64, copy=False)
    )
    return magnitudes


def _histogram(values: NDArray[np.float64], low: float, high: float) -> NDArray[np.int64]:
    values = values[np.isfinite(values)]
    width = high / 2 - low / 2  # halved: the whole width may be more than a float holds
    if not width > 0:
        counts = np.zeros(BINS, np.int64)
        counts[BINS // 2] = values.size
        return counts
    position = (values / 2 - low / 2) / width
    bins = np.minimum((position * BINS).astype(np.int64), BINS - 1)
    return np.bincount(bins, minlength=BINS).astype(np.int64)
