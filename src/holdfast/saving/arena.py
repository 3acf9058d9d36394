"""The arena: host memory that snapshots are copied into, kept and reused from save to save.

It only grows, and is touched ahead of its first use where there is time.
"""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Iterator, Sequence

from holdfast.core.machine import available_memory
from holdfast.core.memory import NO_MEMORY, Memory, Pinning, page_aligned, touch
from holdfast.saving.image import Image

__all__ = ["NOTHING_LENT", "Arena", "Arenas", "Lent"]


class Arena:
    """One mapping, handed out in page-aligned pieces; reserving again takes all pieces back.

    A `shared` one can be mapped by the writer process.
    """

    def __init__(self, *, shared: bool = False) -> None:
        self._map = Memory.shared if shared else Memory.private
        self._memory: Memory | None = None
        self._warming: threading.Thread | None = None
        self.kept: tuple[str, Image] | None = None  # what lies in it, and the attempt it was committed as
        self.pinning: Pinning | None = None  # what makes its memory such as devices copy to by themselves

    @property
    def memory(self) -> Memory | None:
        """The memory that the newest pieces lie in, from its first byte on."""
        return self._memory

    def reserve(self, sizes: Sequence[int]) -> list[memoryview]:
        """Return one writable piece of memory for each size; earlier pieces become invalid."""
        self.kept = None
        starts: list[int] = []
        position = 0
        for size in sizes:
            starts.append(position)
            position += page_aligned(size)
        self._join()
        self._hold(position)
        self._pin()
        view = self._memory.view if self._memory is not None else NO_MEMORY
        return [view[start : start + size] for start, size in zip(starts, sizes, strict=True)]

    def adopt(self, memory: Memory, attempt: str, image: Image) -> None:
        """Be memory in which the image of a committed checkpoint lies already."""
        self._memory = memory
        self.kept = attempt, image

    def fits(self, sizes: Sequence[int]) -> bool:
        """Return whether there is memory for these pieces already."""
        return sum(map(page_aligned, sizes)) <= _size(self._memory)

    def prewarm(self, sizes: Sequence[int]) -> None:
        """Map and touch the memory that `reserve` will need, in the background. No piece may be in use."""
        self._join()
        total = sum(map(page_aligned, sizes))
        if self._hold(total) and self._memory is not None:
            self._warming = threading.Thread(
                target=self._warm, args=(self._memory,), name="holdfast-prewarm", daemon=True
            )
            self._warming.start()

    def _warm(self, memory: Memory) -> None:
        touch(memory.view)
        self._pin()

    def _pin(self) -> None:
        if self._memory is not None and self.pinning is not None:
            self._memory.pin(self.pinning)

    def _hold(self, size: int) -> bool:
        """Have memory of this size; return whether there was less."""
        if size <= _size(self._memory):
            return False
        if self._memory is not None and self._memory.fd >= 0:
            self._memory = self._memory.grown(size)
        else:
            self._memory = None  # let the smaller one go first
            self._memory = self._map(size)
        return True

    def _join(self) -> None:
        """Wait for pages that are on their way: to touch them from here too would take as long."""
        if self._warming is not None:
            self._warming.join()
            self._warming = None


def _size(memory: Memory | None) -> int:
    return len(memory) if memory is not None else 0


class Lent:
    """Arenas that nobody needs for a while, and the checkpoints that still lie in them."""

    def __init__(self, arenas: Sequence[Arena]) -> None:
        self._arenas = arenas

    def image_of(self, attempt: str) -> Image | None:
        """Return the image of a checkpoint, as long as there is one."""
        kept = [arena.kept for arena in self._arenas if arena.kept is not None]
        return next((image for of, image in kept if of == attempt), None)

    def forget(self) -> None:
        """Take nothing of what lies there for a checkpoint any more."""
        for arena in self._arenas:
            arena.kept = None

    def spare(self) -> memoryview:
        """Return memory, as far as it was mapped, to be written to; what lies there is forgotten."""
        self.forget()
        return next((arena.memory.view for arena in self._arenas if arena.memory is not None), NO_MEMORY)


NOTHING_LENT = Lent(())


class Arenas:
    """The arenas of a run: one, and a second when a snapshot is due while the first is still being written and there is
    memory for it."""

    def __init__(self, *, shared: bool, budget_bytes: int | None, sharers: int = 1) -> None:
        self.first = Arena(shared=shared)
        self._shared = shared
        self._budget = budget_bytes
        self._sharers = sharers
        self._second: Arena | None = None
        self._free = deque([self.first])
        self._changed = threading.Condition()

    @property
    def budget_bytes(self) -> int | None:
        """Bytes that all snapshots together may take, or None: as much as half of what the machine has to give, to each
        of its `sharers` the same."""
        if self._budget is not None:
            return self._budget
        found = available_memory()
        return None if found is None else (found + _size(self.first.memory)) // (2 * self._sharers)

    def adopt(self, memory: Memory, attempt: str, image: Image) -> bool:
        """Take memory in which a snapshot lies already for the first arena; return False if it is more than may be."""
        if self.first.memory is not None or not self._fits(len(memory)):
            return False
        self.first.adopt(memory, attempt, image)
        return True

    def take(self) -> Arena:
        """Return an arena that no image lies in, when there is one."""
        with self._changed:
            if not self._free and self._second is None and self._fits(2 * _size(self.first.memory)):
                self._second = Arena(shared=self._shared)
                return self._second
            self._changed.wait_for(lambda: self._free)
            return self._free.popleft()

    def give_back(self, arena: Arena) -> None:
        """Say that the image in an arena is no longer needed."""
        with self._changed:
            self._free.appendleft(arena) if arena is self.first else self._free.append(arena)
            self._changed.notify_all()

    @contextlib.contextmanager
    def lent(self) -> Iterator[Lent]:
        """Lend the arenas whose images nobody writes any more."""
        with self._changed:
            arenas = list(self._free)
            self._free.clear()
        try:
            yield Lent(arenas)
        finally:
            for arena in reversed(arenas):
                self.give_back(arena)

    def allow(self, nbytes: int) -> bool:
        """Return whether a snapshot may take so much."""
        return nbytes <= _size(self.first.memory) or self._fits(nbytes)

    def _fits(self, total: int) -> bool:
        budget = self.budget_bytes
        return budget is None or total <= budget
