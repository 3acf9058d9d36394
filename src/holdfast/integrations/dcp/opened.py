"""A checkpoint of a run, whoever saved it, as DCP sees it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch.distributed.checkpoint.metadata import (
    STORAGE_TYPES,
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from holdfast.checkpoint import Checkpoint
from holdfast.core.errors import MissingDependency
from holdfast.format.values import TensorLeaf, tensor_leaves
from holdfast.integrations.dcp.naming import Entry, entries_of
from holdfast.integrations.dcp.trees import rebuilt
from holdfast.restoring.reader import Reader
from holdfast.state.adapters.torch_placing import TORCH_DTYPES
from holdfast.state.tensors import TensorSpec

__all__ = ["Opened", "open_for_dcp"]


@dataclass(frozen=True, slots=True)
class Opened:
    """A checkpoint as DCP sees it."""

    checkpoint: Checkpoint
    entries: Mapping[str, Entry]

    @property
    def reader(self) -> Reader:
        return self.checkpoint.reader

    def spec(self, entry: Entry) -> TensorSpec:
        """Return what the tensor of an entry is."""
        assert isinstance(entry.node, TensorLeaf)
        return self.reader.spec(entry.node.name)

    def value(self, entry: Entry) -> object:
        """Return the value of an entry that is no tensor. Raises IntegrityError."""
        names = {self.reader.aliases.get(leaf.name, leaf.name) for leaf in tensor_leaves(entry.node)}
        read = self.reader.read(names)
        return rebuilt(
            entry.node, {**read, **{a: read[n] for a, n in self.reader.aliases.items() if n in read}}
        )

    def metadata(self) -> Metadata:
        """Return DCP's metadata. Each tensor is one chunk: a reader finds any box of it."""
        stored: dict[str, STORAGE_TYPES] = {}
        for fqn, entry in self.entries.items():
            if not isinstance(entry.node, TensorLeaf) or not entry.node.kind.startswith("torch."):
                stored[fqn] = BytesStorageMetadata()
                continue
            spec = self.spec(entry)
            if spec.dtype not in TORCH_DTYPES:
                raise MissingDependency(f"{fqn}: this torch has no {spec.dtype}; install a newer one")
            size = torch.Size(spec.shape)
            chunk = ChunkStorageMetadata(torch.Size([0] * len(size)), size)
            stored[fqn] = TensorStorageMetadata(
                TensorProperties(dtype=TORCH_DTYPES[spec.dtype]), size, [chunk]
            )
        return Metadata(
            stored,
            planner_data={fqn: entry.path for fqn, entry in self.entries.items()},
            storage_data={},
            storage_meta=StorageMeta(),
        )


def open_for_dcp(checkpoint: Checkpoint) -> Opened:
    """Return a checkpoint, whoever saved it, as DCP sees it."""
    return Opened(checkpoint, entries_of(checkpoint.tree, checkpoint.environment))
