"""Data files that hold parts of tensors, made by hand."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import msgspec
import numpy as np

from holdfast.format.datafile import StoredTensor, lay_out, open_header
from holdfast.format.digest import digest
from holdfast.format.manifest import FileEntry, Manifest, Part
from holdfast.format.values import TensorLeaf, encode_value
from holdfast.stores import MemoryStore

__all__ = ["Slices", "file_of", "manifest_of", "part_of"]

Slices = tuple[slice, ...]
numbers = itertools.count()


def file_of(store: MemoryStore, tensors: Sequence[tuple[StoredTensor, np.ndarray]]) -> FileEntry:
    """Write a data file that holds some tensors or parts of them."""
    bytes_of = {t.name: a.tobytes() for t, a in tensors}
    laid = lay_out([t for t, _ in tensors])
    data = b"".join(bytes_of[t.name] for t in laid)
    header = open_header(laid)
    head = header.close([digest(data[b.start : b.end]) for b in header.blocks])
    key = f"data/000000000000-{next(numbers):08x}/m.safetensors"
    store.write(key, [head, data])
    return FileEntry(key, len(head) + len(data), len(head), digest(head).hex())


def part_of(name: str, whole: np.ndarray, cut: Slices) -> tuple[StoredTensor, np.ndarray]:
    held = whole[cut]
    box = (tuple(s.start for s in cut), whole.shape)
    return StoredTensor(name, str(whole.dtype), held.shape, None, 0, 0, box), held


def manifest_of(files: list[FileEntry], *names: str) -> Manifest:
    tree = {name: TensorLeaf(f"m/{name}", "numpy.ndarray") for name in names}
    part = Part(msgspec.Raw(msgspec.json.encode(encode_value(tree, "m"))), "values", files, {})
    return Manifest(1, "r" * 32, 0, "a" * 8, 1, 0.0, (0, 0, 0, 0, 0.0), {"m": part})
