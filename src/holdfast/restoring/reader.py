"""Read a checkpoint's tensors: only the bytes that are needed, verified block by block."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np

from holdfast.catalog.content import DataFile, open_file
from holdfast.core.errors import MissingObject
from holdfast.core.names import name_in_file
from holdfast.format.datafile import StoredTensor
from holdfast.format.digest import OWN_BLOCK_BYTES
from holdfast.format.manifest import Manifest
from holdfast.format.values import tensor_leaves
from holdfast.state.tensors import HostTensor, TensorSpec
from holdfast.stores import Store

__all__ = ["Reader"]

T = TypeVar("T")

THREADS = 4


class Reader:
    """The values and tensors of one checkpoint, or of some of its parts; `trees` gives decoded (and cut) value trees.

    Opening it reads headers only, and only of the files that hold a wanted tensor.
    """

    def __init__(
        self,
        store: Store,
        manifest: Manifest,
        parts: Iterable[str] | None = None,
        trees: Mapping[str, object] | None = None,
    ) -> None:
        self.manifest = manifest
        self._store = store
        self._places: dict[str, tuple[DataFile, int]] = {}
        self._opened: dict[str, DataFile] = {}
        self.tree: dict[str, object] = {}
        self.aliases: dict[str, str] = {}
        for name in manifest.parts if parts is None else parts:
            part = manifest.parts[name]
            self.tree[name] = part.values(name) if trees is None else trees[name]
            self.aliases |= part.aliases
            for leaf in tensor_leaves(self.tree[name]):
                self._place(part.aliases.get(leaf.name, leaf.name))

    def _place(self, name: str) -> None:
        """Find the file that holds a tensor: the first one its part lists that has the name."""
        if name in self._places:
            return
        part = self.manifest.part_of(name)
        inside = name_in_file(part, name)
        for entry in self.manifest.parts[part].files:
            if entry.key not in self._opened:
                self._opened[entry.key] = open_file(self._store, entry)
            file = self._opened[entry.key]
            if inside in file.by_name:
                self._places[name] = (file, file.by_name[inside])
                return
        raise MissingObject(f"{name}: no data file of step {self.manifest.step} holds this tensor")

    @property
    def specs(self) -> dict[str, TensorSpec]:
        """Every stored tensor by its full name."""
        return {name: self.spec(name) for name in self._places}

    def spec(self, name: str) -> TensorSpec:
        """Return what a tensor is; a tied name stands for the tensor it is tied to."""
        _, t = self.locate(name)
        return TensorSpec(self.aliases.get(name, name), t.dtype, t.shape, t.stride)

    def place(self, name: str) -> tuple[str, int, int]:
        """Return (file key, first byte, end byte) of a tensor's bytes."""
        file, t = self.locate(name)
        return file.entry.key, file.header.data_start + t.start, file.header.data_start + t.end

    def locate(self, name: str) -> tuple[DataFile, StoredTensor]:
        """Return the file that holds a tensor and the tensor's entry in its header; a tied name is its tensor's."""
        file, index = self._places[self.aliases.get(name, name)]
        return file, file.header.tensors[index]

    def read(self, names: Iterable[str]) -> dict[str, HostTensor]:
        """Return tensors by name, every byte verified.

        Raises:
            IntegrityError: bytes are not what was committed; names the file and the tensors.
        """
        wanted: dict[str, list[tuple[int, str]]] = {}
        opened: dict[str, DataFile] = {}
        for name in names:
            file, index = self._places[name]
            opened[file.entry.key] = file
            wanted.setdefault(file.entry.key, []).append((index, name))
        out: dict[str, HostTensor] = {}
        for key, found in wanted.items():
            found.sort()
            out |= _read_from(opened[key], found, self)
        return out

    def read_rows(self, name: str, start: int, stop: int) -> HostTensor:
        """Return rows `start` to `stop` of a tensor, reading and verifying only the blocks they lie in."""
        file, t = self.locate(name)
        row = t.nbytes // t.shape[0] if t.shape and t.shape[0] else 0
        first, end = t.start + start * row, t.start + stop * row
        spec = TensorSpec(name, t.dtype, (stop - start, *t.shape[1:]), None)
        data = bytearray()
        blocks = file.blocks_of(first, end)
        for i in blocks:
            data += file.read_block(i)
        offset = first - file.header.blocks[blocks.start].start if blocks else 0
        return HostTensor(spec, memoryview(data)[offset : offset + end - first])


def _read_from(file: DataFile, found: Sequence[tuple[int, str]], reader: Reader) -> dict[str, HostTensor]:
    """Read the blocks of some tensors of one file, each verified as soon as it is there.

    A tensor with blocks of its own gets memory of its own, which whoever asked for it may keep.
    """
    header = file.header
    held: dict[
        int, tuple[int, memoryview]
    ] = {}  # block -> (first byte of its memory in the data region, the memory)
    for index, _ in found:
        t = header.tensors[index]
        for b in file.blocks_of(t.start, t.end):
            block = header.blocks[b]
            if block.first != block.last or block.start == t.start:
                start, end = (t.start, t.end) if block.first == block.last else (block.start, block.end)
                if b not in held:
                    memory = (start, np.empty(end - start, np.uint8).data.cast("B"))
                    held |= dict.fromkeys(file.blocks_of(start, end), memory)

    def read(b: int) -> None:
        block, (start, memory) = header.blocks[b], held[b]
        piece = memory[block.start - start : block.end - start]
        file.read(block.start, piece)
        file.check(b, piece)

    _in_parallel(read, sorted(held))
    out: dict[str, HostTensor] = {}
    for index, name in found:
        t = header.tensors[index]
        covering = file.blocks_of(t.start, t.end)
        start, memory_of_it = held[covering.start] if covering else (t.start, memoryview(b""))
        piece = memory_of_it[t.start - start : t.end - start]
        out[name] = HostTensor(reader.spec(name), piece, owned=len(piece) >= OWN_BLOCK_BYTES)
    return out


def _in_parallel(act: Callable[[T], None], items: Sequence[T]) -> None:
    if len(items) < 2:
        for item in items:
            act(item)
        return
    with ThreadPoolExecutor(THREADS, thread_name_prefix="holdfast-read") as pool:
        for done in [pool.submit(act, item) for item in items]:
            done.result()
