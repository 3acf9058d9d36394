"""What the machine itself can do when every rank copies, writes and reads its share at once."""

from __future__ import annotations

import pathlib
from contextlib import AbstractContextManager

import torch.distributed as dist

from bench.limits import LimitDesk
from bench.ranks.timing import Together
from bench.states import Recipe
from bench.timing import Figures


class RankLimitDesk(LimitDesk):
    """The limit in the place of a contestant's rank."""

    def __init__(self, recipe: Recipe, scratch: pathlib.Path) -> None:
        super().__init__(recipe, scratch, f"limit{dist.get_rank()}")
        self._together = Together()

    def quiet(self) -> AbstractContextManager[None]:
        return self._together.quiet()

    def save(self) -> Figures:
        return super().save() | self._together.processor()

    def step(self) -> Figures:
        """What a loop has to wait for, at the least, when a save is a copy."""
        with self.quiet():
            return {"held in a loop": self.copy()}

    def load(self) -> Figures:
        return self.roll_back() | super().load()
