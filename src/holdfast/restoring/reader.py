"""Read a checkpoint's tensors: only the bytes that are needed, verified block by block."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from holdfast.catalog.content import DataFile, open_file
from holdfast.core.errors import MissingObject
from holdfast.core.names import name_in_file
from holdfast.format.datafile import StoredTensor
from holdfast.format.digest import OWN_BLOCK_BYTES
from holdfast.format.manifest import Manifest
from holdfast.format.values import tensor_leaves
from holdfast.restoring.staging import Slab, read_slabs, slabs_of
from holdfast.state.tensors import HostTensor, TensorSpec
from holdfast.stores import Store

__all__ = ["Reader"]


class Reader:
    """The values and tensors of one checkpoint, or of some of its parts; `trees` gives decoded (and cut) value trees.

    Opening it reads headers only, and only of the files that hold a wanted tensor. `specs` has every stored tensor by
    its full name.
    """

    def __init__(
        self,
        store: Store,
        manifest: Manifest,
        parts: Iterable[str] | None = None,
        trees: Mapping[str, object] | None = None,
    ) -> None:
        self.manifest = manifest
        self.specs: dict[str, TensorSpec] = {}
        self._store = store
        self._places: dict[str, tuple[DataFile, int]] = {}
        self._opened: dict[str, DataFile] = {}
        self.tree: dict[str, object] = {}
        self.aliases: dict[str, str] = {}
        for name in manifest.parts if parts is None else parts:
            part = manifest.parts[name]
            self.tree[name] = part.values(name) if trees is None else trees[name]
            self.aliases |= part.aliases
            names = [leaf.name for leaf in tensor_leaves(self.tree[name])]
            self._place([part.aliases.get(n, n) for n in names] if part.aliases else names)

    def _place(self, names: Iterable[str]) -> None:
        """Find the file that holds each tensor: the first one its part lists that has the name."""
        owners: dict[str, str] = {}  # of what lies in one place, most often many tensors
        for name in names:
            if name in self._places:
                continue
            above = name.rpartition("/")[0]
            part = name if name in self.manifest.parts else owners.get(above)
            if part is None:
                part = owners[above] = self.manifest.part_of(name)
            inside = name_in_file(part, name)
            for entry in self.manifest.parts[part].files:
                file = self._opened.get(entry.key)
                if file is None:
                    file = self._opened[entry.key] = open_file(self._store, entry)
                index = file.by_name.get(inside)
                if index is not None:
                    t = file.header.tensors[index]
                    self._places[name] = (file, index)
                    self.specs[name] = TensorSpec(name, t.dtype, t.shape, t.stride)
                    break
            else:
                raise MissingObject(f"{name}: no data file of step {self.manifest.step} holds this tensor")

    def spec(self, name: str) -> TensorSpec:
        """Return what a tensor is; a tied name stands for the tensor it is tied to."""
        return self.specs[self.aliases.get(name, name)]

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
        wanted: dict[str, list[tuple[int, str]]] = {key: [] for key in sorted(self._opened)}
        for name in names:
            file, index = self._places[name]
            wanted[file.entry.key].append((index, name))
        slabs: dict[str, list[Slab]] = {}
        for key, found in wanted.items():
            found.sort()
            file = self._opened[key]
            tensors = file.header.tensors
            filled = [index for index, _ in found if tensors[index].start < tensors[index].end]
            slabs[key] = slabs_of(file, file.blocks_that_hold(filled))
        read_slabs([slab for of_file in slabs.values() for slab in of_file])
        out: dict[str, HostTensor] = {}
        for key, found in wanted.items():
            self._cut(self._opened[key], found, slabs[key], out)
        return out

    def _cut(
        self, file: DataFile, found: list[tuple[int, str]], slabs: list[Slab], out: dict[str, HostTensor]
    ) -> None:
        """Put some tensors of a file, in data order, into `out`, from the slabs that hold them."""
        tensors, blocks, specs = file.header.tensors, file.header.blocks, self.specs
        rest = iter(slabs)
        end, memory, shift = 0, memoryview(b""), 0
        for index, name in found:
            t = tensors[index]
            if t.start == t.end:
                out[name] = HostTensor(specs[name], memoryview(b""))
                continue
            while t.end > end:
                slab = next(rest)
                end, memory, shift = blocks[slab.blocks[-1]].end, slab.memory, slab.place_of(0)
            owned = t.end - t.start >= OWN_BLOCK_BYTES
            out[name] = HostTensor(specs[name], memory, owned, t.start + shift)

    def read_rows(self, name: str, start: int, stop: int) -> HostTensor:
        """Return rows `start` to `stop` of a tensor, reading and verifying only the blocks they lie in."""
        file, t = self.locate(name)
        row = t.nbytes // t.shape[0] if t.shape and t.shape[0] else 0
        first, end = t.start + start * row, t.start + stop * row
        spec = TensorSpec(name, t.dtype, (stop - start, *t.shape[1:]), None)
        slabs = slabs_of(file, file.blocks_of(first, end))
        read_slabs(slabs)
        return (
            HostTensor(spec, slabs[0].memory, start=slabs[0].place_of(first))
            if slabs
            else HostTensor(spec, memoryview(b""))
        )
