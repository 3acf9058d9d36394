"""Captured tensors copied the way the product copies them, each into memory of its own."""

from __future__ import annotations

from collections.abc import Sequence

from holdfast.state.tensors import TensorSource
from holdfast.state.transfer import Stretch, Transfer

__all__ = ["copied"]


def copied(sources: Sequence[TensorSource]) -> list[memoryview]:
    buffers = [memoryview(bytearray(b"\xcc" * s.spec.nbytes)) for s in sources]
    stretches = [Stretch(b, 0, [(0, len(b))]) for b in buffers]
    Transfer(sources, [False] * len(sources), stretches).copy(sources)
    return buffers
