"""A map-style dataset whose samples draw from every global generator, and a collate that does so too."""

from __future__ import annotations

import random

import numpy as np
import torch
from torch.utils.data import Dataset, default_collate


def draw() -> list[float]:
    """Draw from python, numpy and torch."""
    return [random.random(), float(np.random.rand()), float(torch.rand((), dtype=torch.float64))]


class Noisy(Dataset[torch.Tensor]):
    """Return [index, augmentation...]; remember the indices read in this process."""

    def __init__(self, length: int) -> None:
        self.length = length
        self.reads: list[int] = []
        self.offset = 0.0

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> torch.Tensor:
        self.reads.append(int(index))
        return torch.tensor([index + self.offset, *draw()], dtype=torch.float64)


class Columnar(Noisy):
    """Read whole batches, one draw for all."""

    def __getitems__(self, indices: list[int]) -> list[torch.Tensor]:
        noise = draw()
        return [torch.tensor([index, *noise], dtype=torch.float64) for index in indices]


class Brittle(Noisy):
    """Fail at one index."""

    def __init__(self, length: int, bad: int) -> None:
        super().__init__(length)
        self.bad = bad

    def __getitem__(self, index: int) -> torch.Tensor:
        if index == self.bad:
            raise ValueError(f"sample {index} is broken")
        return super().__getitem__(index)


def noisy_collate(samples: list[torch.Tensor]) -> torch.Tensor:
    """Collate, with batch-level randomness (as mixup has)."""
    return default_collate(samples) + torch.tensor([0.0, *draw()], dtype=torch.float64)


def add_offset(worker_id: int) -> None:
    """Change the dataset from a worker_init_fn, as users do."""
    info = torch.utils.data.get_worker_info()
    assert info is not None
    info.dataset.offset = 1000.0
    assert info.dataset.length == len(info.dataset)


def as_bytes(batches: object) -> list[bytes]:
    """Return the exact bytes of each batch."""
    return [batch.numpy().tobytes() for batch in batches]  # type: ignore[attr-defined]
