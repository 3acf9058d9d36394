"""torch_checkpointing with several ranks."""

from __future__ import annotations

import pathlib

from bench.contestants import torch_checkpointing
from bench.contestants.ranks import OneOfRanks


class TorchCheckpointing(OneOfRanks, torch_checkpointing.TorchCheckpointing):
    """As for one process. Without a resharder: what a rank has saved only that rank, of as many, can load."""

    def files_of(self, rank: int) -> list[pathlib.Path]:
        return [p for p in self.path.rglob("*") if p.is_file() and f"_{rank}" in p.name]
