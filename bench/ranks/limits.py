"""What the machine itself can do when every rank copies, writes and reads its share at once."""

from __future__ import annotations

import os
import pathlib

import torch.distributed as dist

from bench.disk import delete
from bench.limits import Figures, Limit
from bench.ranks.states import Shared
from bench.ranks.timing import processor_seconds, together
from bench.states import Recipe


class RankLimit:
    """The limit in the place of a contestant's rank."""

    def __init__(self, recipe: Recipe, scratch: pathlib.Path) -> None:
        found = recipe.subject()
        assert isinstance(found, Shared)
        self.subject = found
        tensors = [t for of in self.subject.local().values() for t in of.values()]
        self._limit = Limit(tensors, scratch / f"limit{dist.get_rank()}")

    def open(self) -> None:
        """Warm the memory up."""
        self._limit.copy()

    def save(self) -> Figures:
        """Copy every tensor; write the memory past the page cache, and sync it."""
        with together():
            spent = processor_seconds()
            copied = self._limit.copy()
            written = self._limit.write()
            spent = processor_seconds() - spent
        return {"held": copied, "durable": written} | ({"processor": spent} if dist.get_rank() == 0 else {})

    def step(self) -> Figures:
        """What a loop has to wait for, at the least, when a save is a copy."""
        with together():
            return {"held in a loop": self._limit.copy()}

    def load(self) -> Figures:
        """Copy every tensor from memory to memory; read what was written into warm memory, in place."""
        size = len(self._limit.view)
        with together():
            found: Figures = {"rolled back": self._limit.copy()}
        for key, flags in (("load", 0), ("load, O_DIRECT", os.O_DIRECT)):
            with together():
                found[key] = self._limit.read(size, flags)
        return found

    def state_bytes(self) -> int:
        return self.subject.nbytes()

    def stored_bytes(self) -> int:
        return self.subject.nbytes()

    def close(self) -> None:
        delete(self._limit.path)
