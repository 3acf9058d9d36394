"""The image: a snapshot as the writer sees it. Knows no live object, so that a process without them can persist it."""

from __future__ import annotations

from dataclasses import dataclass

import msgspec

from holdfast.core.memory import Memory
from holdfast.distributed.words import NOTHING_AGREED, Agreement
from holdfast.format.datafile import StoredTensor
from holdfast.saving.progress import Progress

__all__ = ["Image", "PartImage"]


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

    Its bytes may still be on their way, as `progress` says: nothing may be read that was not waited for, and nothing
    committed before `wait(end)` has returned. `memory` is what another process can map to see the bytes; without it
    none can.
    """

    parts: dict[str, PartImage]
    progress: Progress | None = None
    memory: Memory | None = None
    agreement: Agreement = NOTHING_AGREED  # of several ranks

    def wait(self, end: int) -> None:
        """Return when the first `end` bytes of the memory hold the copy. Raises what the copy failed with."""
        if self.progress is not None:
            self.progress.wait(end)

    @property
    def end(self) -> int:
        """Where the last of the parts' bytes end in the memory."""
        return max((p.offset + len(p.data) for p in self.parts.values()), default=0)
