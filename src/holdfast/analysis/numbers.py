"""Stored bytes as numbers that can be added up: every element type becomes float64 or complex128."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from holdfast.core.buffers import Buffer
from holdfast.core.dtypes import DTYPES
from holdfast.state.adapters.numpy import numpy_dtype

__all__ = ["Numbers", "as_native", "as_numbers", "changed_elements", "chunks", "stored_elements"]

Numbers: TypeAlias = "NDArray[np.float64] | NDArray[np.complex128]"

CHUNK_ELEMENTS = 1 << 17  # as float64 they fit a processor's cache, with room for what is made of them

# OCP Microscaling Formats (MX) v1.0, section 5.3.3: the sixteen values of E2M1.
_FLOAT4 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float64)


def as_native(data: Buffer, dtype: str) -> NDArray[np.generic]:
    """Return the elements in a type numpy knows, without a copy where there is one (two for each packed
    float4).
    """
    raw = np.frombuffer(data, np.uint8)
    if dtype == "float4_e2m1fn_x2":
        pairs: NDArray[np.generic] = _FLOAT4[np.stack([raw & 15, raw >> 4], axis=1).reshape(-1)]
        return pairs
    if dtype == "complex32":
        halves = raw.view(np.float16).astype(np.float32)
        return halves.view(np.complex64)
    return raw.view(numpy_dtype(dtype))


def as_numbers(data: Buffer, dtype: str) -> Numbers:
    """Return the elements as float64, or complex128 for complex types. Integers above 2^53 are rounded."""
    native = as_native(data, dtype)
    return native.astype(np.complex128) if native.dtype.kind == "c" else native.astype(np.float64)


def changed_elements(before: Buffer, after: Buffer, dtype: str) -> int:
    """Return how many elements differ in any bit."""
    size = DTYPES[dtype].itemsize
    word = np.dtype(f"u{min(size, 8)}")
    differ = np.frombuffer(before, word) != np.frombuffer(after, word)
    return int(np.count_nonzero(differ if size <= 8 else differ.reshape(-1, 2).any(axis=1)))


def stored_elements(nbytes: int, dtype: str) -> int:
    """Return the number of stored elements; a pair of packed float4 is one."""
    return nbytes // DTYPES[dtype].itemsize


def chunks(data: memoryview, dtype: str) -> Iterator[memoryview]:
    """Yield the bytes in pieces of whole elements that are small once they are numbers."""
    step = CHUNK_ELEMENTS * DTYPES[dtype].itemsize
    for start in range(0, len(data), step):
        yield data[start : start + step]
