"""float32 to bfloat16: to the nearest, a tie to the even one; infinities stay, and every NaN becomes 0x7FC0.

So do the programs that train in bfloat16 from a float32 master copy. Integers alone, so that it is the same on every
machine. Source: IEEE 754-2019, 4.3.1, for the upper half of the 32 bits. numpy is loaded when it is asked for: a writer
that derives nothing does without.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from holdfast.core.buffers import Buffer

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["is_rounded", "rounded"]

STRETCH = 1 << 16  # elements at a time: they stay in a processor's cache
HALF = 0x7FFF
INFINITY = 0x7F800000
NAN = 0x7FC0


def rounded(data: Buffer) -> memoryview:
    """Return the bfloat16 bytes that float32 bytes, whole elements, round to."""
    import numpy as np

    wide = np.frombuffer(data, "<u4")
    out = np.empty(len(wide), "<u2")
    for at in range(0, len(wide), STRETCH):
        out[at : at + STRETCH] = _round(wide[at : at + STRETCH])
    return out.data.cast("B") if len(out) else memoryview(b"")


def is_rounded(source: Buffer, data: Buffer) -> bool:
    """Return whether bfloat16 bytes are what float32 bytes, of as many elements, round to."""
    import numpy as np

    wide, narrow = np.frombuffer(source, "<u4"), np.frombuffer(data, "<u2")
    stretches = range(0, len(wide), STRETCH)
    return all(np.array_equal(_round(wide[at : at + STRETCH]), narrow[at : at + STRETCH]) for at in stretches)


def _round(wide: NDArray[np.uint32]) -> NDArray[np.uint32]:
    work = wide.copy()
    work >>= 16
    work &= 1
    work += HALF
    work += wide  # of a NaN it may run over, and that is put right below
    work >>= 16
    magnitude = wide.copy()
    magnitude <<= 1  # without the sign
    if magnitude.max() > INFINITY << 1:
        work[magnitude > INFINITY << 1] = NAN
    return work
