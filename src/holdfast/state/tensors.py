"""What a tensor is to holdfast: a name, an element type, a shape, a layout, and bytes in C order."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable
from typing import NamedTuple

import msgspec

from holdfast.core.dtypes import DTYPES
from holdfast.format.boxes import Box

__all__ = [
    "JOIN_BYTES",
    "HeldBox",
    "HostTensor",
    "Shard",
    "TensorSource",
    "TensorSpec",
    "c_strides",
    "group_of",
    "layout_to_recreate",
]

# A recreated layout may take this many times the memory of its elements; beyond it C order is used. A
# column cut from a wide matrix would otherwise bring back the memory of the whole matrix.
MAX_SPREAD = 8
# Up to this size a call for each tensor costs more than to copy it; neighbours are moved together.
JOIN_BYTES = 16 << 10


class Shard(msgspec.Struct, frozen=True, gc=False):
    """What this process holds of a tensor that is spread over several: a `box` of it, of which there are so many equal
    `replicas`; this is number `replica`. `group` is the same text on all processes that hold some of the tensor."""

    box: Box
    replica: int = 0
    replicas: int = 1
    group: str = ""


class HeldBox(NamedTuple):
    """One box of a spread tensor that this process holds: where it begins in the whole, its `shape`, an alias of its
    elements, and which of how many equal replicas it is."""

    offsets: tuple[int, ...]
    shape: tuple[int, ...]
    value: object
    replica: int = 0
    replicas: int = 1


# Structs, for there is one for each tensor: they are made five times as fast as a frozen dataclass.
class TensorSpec(msgspec.Struct, frozen=True, gc=False):
    """Say what a stored tensor is.

    `name` is its tree path, `dtype` a name of `core.dtypes.DTYPES`, `stride` the live layout in elements
    where that was not C order (None: C order). The stored bytes are in C order whatever the stride. With a `shard`
    it is a part of a tensor that is spread over processes, and `shape` is the part's.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    stride: tuple[int, ...] | None = None
    shard: Shard | None = None

    @property
    def nbytes(self) -> int:
        """Return the size of the stored bytes."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize

    def describe(self) -> str:
        """Return `dtype[shape]` for messages."""
        return f"{self.dtype}[{', '.join(map(str, self.shape))}]"


class TensorSource(msgspec.Struct):
    """A live tensor whose bytes are still to be copied.

    `value` aliases the live tensor. A `volatile` one may change in a forward or backward pass; the others
    change only when the optimizer steps.
    """

    spec: TensorSpec
    value: object
    volatile: bool


class HostTensor(msgspec.Struct, frozen=True, gc=False):
    """A tensor in host memory: its bytes, in C order, lie in `memory` from byte `start` on.

    What is `owned` may be kept: a new tensor may be made around these bytes instead of a copy of them.
    """

    spec: TensorSpec
    memory: memoryview
    owned: bool = False
    start: int = 0

    @property
    def data(self) -> memoryview:
        """Return the bytes."""
        return self.memory[self.start : self.start + self.spec.nbytes]

    @property
    def whole(self) -> bool:
        """Return whether all of the bytes are there."""
        return self.start + self.spec.nbytes <= len(self.memory)


def group_of(ranks: Iterable[int]) -> str:
    """Return the text that stands for these ranks: how many, and a digest."""
    found = sorted(set(ranks))
    return f"{len(found)}:{hashlib.blake2b(repr(found).encode(), digest_size=8).hexdigest()}"


def c_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the element strides of C order; dimensions of size 0 count as 1, as in torch."""
    out, step = [], 1
    for size in reversed(shape):
        out.append(step)
        step *= max(size, 1)
    return tuple(reversed(out))


def layout_to_recreate(spec: TensorSpec) -> tuple[tuple[int, ...], int] | None:
    """Return (strides, number of elements to allocate) for a layout other than C order, or None for C order.

    Layouts that overlap in a way that is not a plain broadcast, or that would take `MAX_SPREAD` times the
    memory, come back in C order.
    """
    if spec.stride is None or len(spec.stride) != len(spec.shape) or min(spec.stride, default=0) < 0:
        return None
    real = [(st, size) for st, size in zip(spec.stride, spec.shape, strict=True) if st and size > 1]
    extent, elements = 1, 1
    for step, size in sorted(real):
        if step < extent:
            return None
        extent += step * (size - 1)
        elements *= size
    if 0 in spec.shape:
        extent = elements = 0
    if extent > MAX_SPREAD * elements + 4096:
        return None
    return spec.stride, extent
