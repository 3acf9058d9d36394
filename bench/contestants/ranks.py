"""What a contestant does otherwise as one of several ranks."""

from __future__ import annotations

import pathlib

import torch.distributed as dist

from bench.contestants.base import Contestant
from bench.disk import sync_file, sync_tree


class OneOfRanks(Contestant):
    """A way to save a state that is spread over ranks, on each of them; before it comes what it does on one alone."""

    def finish(self) -> None:
        """Return when the newest checkpoint is durable. Each rank syncs the files that bear its number, and rank 0
        what is left when all have."""
        self.wait()
        for file in self.files_of(dist.get_rank()):
            sync_file(file)
        dist.barrier()
        if dist.get_rank() == 0:
            sync_tree(self.path)

    def prune(self) -> None:
        if dist.get_rank() == 0:
            super().prune()

    def files_of(self, rank: int) -> list[pathlib.Path]:
        """Return the files of the newest checkpoint that this rank has written."""
        raise NotImplementedError
