"""float32 to bfloat16: to the nearest, a tie to the even one; infinities stay, and every NaN becomes 0x7FC0.

So do the programs that train in bfloat16 from a float32 master copy. Integers alone, so that it is the same on every
machine. Source: IEEE 754-2019, 4.3.1, for the upper half of the 32 bits.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from holdfast.core.buffers import Buffer

__all__ = ["is_rounded", "rounded"]

STRETCH = 1 << 18  # elements at a time: they stay in a processor's cache
_HALF = np.uint32(0x7FFF)
_ONE = np.uint32(1)
_UPPER = np.uint32(16)
_MAGNITUDE = np.uint32(0x7FFFFFFF)
_INFINITY = np.uint32(0x7F800000)
_NAN = np.uint16(0x7FC0)


def rounded(data: Buffer) -> memoryview:
    """Return the bfloat16 bytes that float32 bytes, whole elements, round to."""
    source = np.frombuffer(data, "<u4")
    out = np.empty(len(source), "<u2")
    for at in range(0, len(source), STRETCH):
        _round(source[at : at + STRETCH], out[at : at + STRETCH])
    return out.data.cast("B")


def _round(source: NDArray[np.uint32], out: NDArray[np.uint16]) -> None:
    work = (source >> _UPPER) & _ONE
    work += _HALF
    work += source  # of a NaN it may run over, and that is put right below
    work >>= _UPPER
    out[:] = work
    wrong = (source & _MAGNITUDE) > _INFINITY
    if wrong.any():
        out[wrong] = _NAN


def is_rounded(source: Buffer, data: Buffer) -> bool:
    """Return whether bfloat16 bytes are what float32 bytes, of as many elements, round to."""
    wide, narrow = np.frombuffer(source, "<u4"), np.frombuffer(data, "<u2")
    made = np.empty(min(STRETCH, len(wide)), "<u2")
    for at in range(0, len(wide), STRETCH):
        here = narrow[at : at + STRETCH]
        _round(wide[at : at + STRETCH], made[: len(here)])
        if not np.array_equal(made[: len(here)], here):
            return False
    return True
