"""Read a checkpoint's tensors: only the bytes that are needed, verified block by block."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType

from holdfast.catalog.content import DataFile, open_file
from holdfast.catalog.derived import DerivedTensor
from holdfast.catalog.pieces import Piece, find
from holdfast.core.dtypes import DTYPES
from holdfast.core.names import name_in_file
from holdfast.format.boxes import Run, runs
from holdfast.format.digest import OWN_BLOCK_BYTES
from holdfast.format.manifest import DERIVED_DTYPE, FileEntry, Manifest
from holdfast.format.values import tensor_leaves
from holdfast.restoring.assembling import assemble, assemble_runs
from holdfast.restoring.staging import Slab, read_slabs, slabs_of
from holdfast.state.restoring import BoxWanted
from holdfast.state.tensors import HostTensor, TensorSpec
from holdfast.stores import Store

__all__ = ["Reader"]

NOTHING_OWN: Mapping[str, Sequence[FileEntry]] = MappingProxyType({})
NO_PARTS: Mapping[str, BoxWanted] = MappingProxyType({})
NOTHING_READ: Mapping[str, HostTensor] = MappingProxyType({})


class Reader:
    """The values and tensors of one checkpoint, or of some of its parts; `trees` gives decoded (and cut) value trees,
    `own` the files of tensors that one of several ranks has for itself.

    Opening it reads headers only, and only of the files that hold a wanted tensor. `specs` has every stored tensor by
    its full name.
    """

    def __init__(
        self,
        store: Store,
        manifest: Manifest,
        parts: Iterable[str] | None = None,
        trees: Mapping[str, object] | None = None,
        own: Mapping[str, Sequence[FileEntry]] = NOTHING_OWN,
    ) -> None:
        self._own = own
        self.manifest = manifest
        self.specs: dict[str, TensorSpec] = {}
        self._store = store
        self._places: dict[str, tuple[DataFile, int]] = {}  # of what lies in one file: nearly all
        self._pieces: dict[str, tuple[Piece, ...]] = {}  # of what was saved in parts
        self._derived: dict[str, DerivedTensor] = {}  # of what follows from other tensors
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
        """Find what holds each tensor: the first file its part lists that has the name, and where that has a part of it
        only, the next ones for the rest."""
        owners: dict[str, str] = {}  # of what lies in one place, most often many tensors
        derived = self.manifest.derived
        for name in names:
            if name in self.specs:
                continue
            if name in derived:
                d = derived[name]
                self._derived[name] = DerivedTensor.of(self.manifest, name, d, self._open)
                self.specs[name] = TensorSpec(name, DERIVED_DTYPE, d.shape, d.stride)
                continue
            if name in self._own:
                self._find(name, name, self._own[name])
                continue
            above = name.rpartition("/")[0]
            part = name if name in self.manifest.parts else owners.get(above)
            if part is None:
                part = owners[above] = self.manifest.part_of(name)
            inside = name_in_file(part, name)
            self._find(name, inside, self.manifest.parts[part].files)

    def _find(self, name: str, inside: str, entries: Sequence[FileEntry]) -> None:
        for entry in entries:
            file = self._open(entry)
            index = file.by_name.get(inside)
            if index is None:
                continue
            t = file.header.tensors[index]
            if t.box is not None and 0 not in t.whole_shape:
                break
            self._places[name] = (file, index)
            self.specs[name] = TensorSpec(name, t.dtype, t.whole_shape, t.stride)
            return
        found = find(map(self._open, entries), inside, name)
        self._pieces[name] = found.pieces
        self.specs[name] = TensorSpec(name, found.tensor.dtype, found.tensor.whole_shape, found.tensor.stride)

    def _open(self, entry: FileEntry) -> DataFile:
        file = self._opened.get(entry.key)
        if file is None:
            file = self._opened[entry.key] = open_file(self._store, entry)
        return file

    def is_own(self, name: str) -> bool:
        """Return whether a tensor is what one of several ranks has for itself."""
        return name in self._own

    def spec(self, name: str) -> TensorSpec:
        """Return what a tensor is; a tied name stands for the tensor it is tied to."""
        return self.specs[self.aliases.get(name, name)]

    def derived(self, name: str) -> DerivedTensor | None:
        """Return how a tensor follows from another one, or None for one that is stored; a tied name is its tensor's."""
        return self._derived.get(self.aliases.get(name, name))

    def pieces(self, name: str) -> tuple[Piece, ...]:
        """Return where the bytes of a tensor lie, in their order; a tied name is its tensor's. Of one that follows from
        another one it is the other's."""
        name = self.aliases.get(name, name)
        if name in self._derived:
            return self._derived[name].pieces
        if name in self._pieces:
            return self._pieces[name]
        file, index = self._places[name]
        t = file.header.tensors[index]
        return (Piece(file, 0, t.start, t.nbytes),) if t.nbytes else ()

    def places(self, name: str) -> list[tuple[str, int, int]]:
        """Return (file key, first byte, end byte) of each stretch of files that a tensor's bytes lie in, in order."""
        starts = [(p.file, p.start, p.size) for p in self.pieces(name)]
        if not starts:
            file, index = self._places[self.aliases.get(name, name)]
            starts = [(file, file.header.tensors[index].start, 0)]
        firsts = [(file.entry.key, file.header.data_start + start, size) for file, start, size in starts]
        return [(key, first, first + size) for key, first, size in firsts]

    def read(self, names: Iterable[str], parts: Mapping[str, BoxWanted] = NO_PARTS) -> dict[str, HostTensor]:
        """Return tensors by name, and `parts` of tensors by their keys, every byte verified. Of what is wanted in part
        no more is read than the blocks that it lies in.

        Raises:
            IntegrityError: bytes are not what was committed; names the file and the tensors.
        """
        wanted: dict[str, list[tuple[int, str]]] = {key: [] for key in sorted(self._opened)}
        split: list[str] = []
        following: list[str] = []
        for name in names:
            if name in self._derived:
                following.append(name)
                continue
            if name in self._pieces:
                split.append(name)
                continue
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
        for name in split:
            spec = self.specs[name]
            out[name] = HostTensor(spec, assemble(self._pieces[name], 0, spec.nbytes), owned=True)
        for name in following:
            out[name] = self._follow(self._derived[name], out)
        self._read_parts(parts, out)
        return out

    def _follow(self, tensor: DerivedTensor, there: Mapping[str, HostTensor] = NOTHING_READ) -> HostTensor:
        """Return a tensor that follows from another one, which may be there already."""
        source = there.get(tensor.entry.source)
        if source is not None:
            data = tensor.make(source.data)
        else:
            data = tensor.make(assemble(tensor.pieces, 0, tensor.source_bytes))
        return HostTensor(self.specs[tensor.name], data, owned=True)

    def _read_parts(self, parts: Mapping[str, BoxWanted], out: dict[str, HostTensor]) -> None:
        keys: list[tuple[str, TensorSpec]] = []
        wanted: list[tuple[tuple[Piece, ...], Iterable[Run], int]] = []
        for key, (name, box, shape) in parts.items():
            spec = TensorSpec(name, self.spec(name).dtype, shape)
            if not spec.nbytes:
                out[key] = HostTensor(spec, memoryview(b""))
                continue
            derived = self.derived(name)
            if derived is not None:
                whole = self._follow(derived, out).data
                part = memoryview(bytearray(spec.nbytes))
                for run in runs(shape, box, None, DTYPES[spec.dtype].itemsize):
                    part[run.source : run.source + run.size] = whole[run.at : run.at + run.size]
                out[key] = HostTensor(spec, part)
                continue
            keys.append((key, spec))
            wanted.append(
                (self.pieces(name), runs(shape, box, None, DTYPES[spec.dtype].itemsize), spec.nbytes)
            )
        for (key, spec), data in zip(keys, assemble_runs(wanted), strict=True):
            out[key] = HostTensor(spec, data)

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
        whole = self.spec(name)
        row = whole.nbytes // whole.shape[0] if whole.shape and whole.shape[0] else 0
        spec = TensorSpec(name, whole.dtype, (stop - start, *whole.shape[1:]), None)
        if not spec.nbytes:
            return HostTensor(spec, memoryview(b""))
        first, end = start * row, stop * row
        derived = self.derived(name)
        if derived is not None:
            return HostTensor(spec, self._follow(derived).data[first:end])
        pieces = self.pieces(name)
        if len(pieces) != 1:
            return HostTensor(spec, assemble(pieces, first, end))
        piece = pieces[0]
        slabs = slabs_of(piece.file, piece.file.blocks_of(piece.start + first, piece.start + end))
        read_slabs(slabs)
        return HostTensor(spec, slabs[0].memory, start=slabs[0].place_of(piece.start + first))
