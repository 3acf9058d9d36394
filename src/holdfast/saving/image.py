"""The image: a snapshot as the writer sees it. Knows no live object, so that a process without them can persist it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import msgspec

from holdfast.format.datafile import StoredTensor

__all__ = ["Image", "PartImage"]


def _all_there(end: int) -> None:
    """The copy is complete."""


@dataclass(frozen=True, slots=True)
class PartImage:
    """One top-level key of the state: its encoded values, what kind of object it is, tied names, tensors
    in data order, and their bytes, which begin `offset` bytes into the image's memory."""

    tree: msgspec.Raw
    kind: str
    aliases: dict[str, str]
    tensors: list[StoredTensor]
    data: memoryview
    offset: int


@dataclass(frozen=True, slots=True)
class Image:
    """A whole state in host memory, parts one after the other in it; valid until that memory is used again.

    Its bytes may still be on their way: `wait(end)` returns when the memory's first `end` bytes hold the copy, and
    raises what made the copy fail. One thread at a time waits. Nothing may be read that was not waited for, and nothing
    committed before `wait(end)` has returned for the last of the memory.
    """

    parts: dict[str, PartImage]
    wait: Callable[[int], None] = _all_there

    @property
    def end(self) -> int:
        """Where the last of the parts' bytes end in the memory."""
        return max((p.offset + len(p.data) for p in self.parts.values()), default=0)

    @property
    def nbytes(self) -> int:
        """Bytes of tensor data."""
        return sum(len(p.data) for p in self.parts.values())
