"""What is referred to instead of written: whatever is saved by however many ranks, what is read is what was saved.

The plans are made by hand, so that the same tensor is cut otherwise and given to other ranks from save to save, and
values come back that were there before: then a file of an older save holds what is wanted, behind one that does not.
"""

from __future__ import annotations

import itertools
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType

import holdfast
from holdfast import last
from holdfast.integrations.dcp import HoldfastWriter

SHAPES = {"large": (64, 512), "wide": (8, 4096), "small": (5, 3), "tiny": (2,), "other": (6, 7)}


class Slices(DefaultSavePlanner):
    """Gives the boxes that a plan speaks of."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        super().__init__()
        self.tensors = tensors

    def lookup_object(self, index: MetadataIndex) -> torch.Tensor:
        raise AssertionError("there are no values")

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor:
        chunk = write_item.tensor_data.chunk  # type: ignore[union-attr]
        box = tuple(slice(o, o + n) for o, n in zip(chunk.offsets, chunk.sizes, strict=True))
        return self.tensors[write_item.index.fqn][box]


def cut(shape: tuple[int, ...], dim: int, pieces: int) -> list[ChunkStorageMetadata]:
    edges = [shape[dim] * i // pieces for i in range(pieces + 1)]
    found = []
    for a, b in itertools.pairwise(edges):
        offsets, sizes = [0] * len(shape), list(shape)
        offsets[dim], sizes[dim] = a, b - a
        found.append(ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)))
    return found


def save(run: Path, tensors: dict[str, torch.Tensor], dice: random.Random) -> None:
    """Save as `dcp.save` does on a random number of ranks, the tensors cut at random."""
    world = dice.choice([1, 2, 3])
    plans: list[list[WriteItem]] = [[] for _ in range(world)]
    stored = {}
    for fqn, t in tensors.items():
        shape = tuple(t.shape)
        # Mostly as before, for else nothing is found again.
        pieces = 2 if dice.random() < 0.8 else dice.choice([1, 3])
        chunks = cut(shape, 0 if dice.random() < 0.8 else len(shape) - 1, pieces)
        properties = TensorProperties(dtype=t.dtype)
        stored[fqn] = TensorStorageMetadata(properties, t.shape, chunks)
        first = dice.randrange(world)
        for number, chunk in enumerate(chunks):
            data = TensorWriteData(chunk, properties, t.shape)
            item = WriteItem(MetadataIndex(fqn, chunk.offsets, number), WriteItemType.SHARD, tensor_data=data)
            plans[(first + number) % world].append(item)
    metadata = Metadata(stored, planner_data={fqn: ("m", fqn) for fqn in tensors})  # type: ignore[arg-type]
    writers = [HoldfastWriter(run, keep=last(2)) for _ in range(world)]
    local = []
    for rank, (writer, items) in enumerate(zip(writers, plans, strict=True)):
        writer.set_up_storage_writer(rank == 0, rank=rank, use_collectives=True)
        local.append(writer.prepare_local_plan(SavePlan(items, planner_data=metadata.planner_data)))
    ordered = writers[0].prepare_global_plan(local)
    results = [w.write_data(p, Slices(tensors)).wait() for w, p in zip(writers, ordered, strict=True)]
    writers[0].finish(metadata, results)


@pytest.mark.parametrize("seed", range(4))
def test_what_is_read_is_what_was_saved(tmp_path: Path, seed: int) -> None:
    dice = random.Random(seed)
    values = {
        (fqn, n): torch.from_numpy(np.random.default_rng(n).standard_normal(shape, np.float32))
        for fqn, shape in SHAPES.items()
        for n in range(2)
    }
    state = {fqn: values[fqn, 0] for fqn in SHAPES}
    spared = 0
    for _ in range(25):
        for fqn in dice.sample(sorted(SHAPES), dice.choice([1, 2])):
            state[fqn] = state[fqn].clone()  # one half of it, that one rank may hold
            half = (
                slice(0, len(state[fqn]) // 2) if dice.random() < 0.5 else slice(len(state[fqn]) // 2, None)
            )
            state[fqn][half] = values[fqn, dice.randrange(2)][half]
        save(tmp_path / "run", state, dice)
        checkpoint = holdfast.open(tmp_path / "run")
        for fqn, t in state.items():
            assert np.array_equal(checkpoint[f"m/{fqn}"].read(), t.numpy()), fqn
        assert not checkpoint.verify()
        spared += any(checkpoint.manifest.attempt not in key for key in checkpoint.manifest.file_keys)
    assert spared > 2
    needed = {k for c in holdfast.Run(tmp_path / "run") for k in c.manifest.file_keys}
    there = {str(p.relative_to(tmp_path / "run")) for p in (tmp_path / "run" / "data").rglob("*.safetensors")}
    assert there == needed


def test_an_unchanged_state_is_not_written_at_all(tmp_path: Path) -> None:
    state = {fqn: torch.randn(shape) for fqn, shape in SHAPES.items()}
    for _ in range(2):
        save(tmp_path / "run", state, random.Random(5))
    assert holdfast.open(tmp_path / "run").manifest.new_bytes == 0
