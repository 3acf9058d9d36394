"""Read a checkpoint's tensors: only the bytes that are needed, verified block by block."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

from holdfast.catalog.content import DataFile, open_file
from holdfast.catalog.pieces import Piece, find
from holdfast.core.dtypes import DTYPES
from holdfast.core.errors import MissingObject
from holdfast.core.names import name_in_file
from holdfast.format.boxes import Run, runs
from holdfast.format.digest import OWN_BLOCK_BYTES
from holdfast.format.manifest import FileEntry, Manifest
from holdfast.format.values import tensor_leaves
from holdfast.restoring.assembling import assemble, assemble_runs
from holdfast.restoring.staging import Slab, read_slabs, slabs_of
from holdfast.state.restoring import BoxWanted
from holdfast.state.tensors import HostTensor, TensorSpec
from holdfast.stores import Store

__all__ = ["Reader"]

NOTHING_OWN: Mapping[str, Sequence[FileEntry]] = MappingProxyType({})
_Wanted = tuple[int, str, TensorSpec]  # place in a file, name in what is returned, what it is
NO_PARTS: Mapping[str, BoxWanted] = MappingProxyType({})


class _Boxed(NamedTuple):
    """A tensor that was saved in parts: its name in the files, those that may hold some of it, and of the first one
    that does, its place there."""

    name: str
    entries: Sequence[FileEntry]
    file: DataFile
    place: int


class Reader:
    """The values and tensors of one checkpoint, or of some of its parts; `trees` gives decoded (and cut) value trees,
    `own` the files of tensors that one of several ranks has for itself.

    Opening it reads headers only, and only of the files that hold a wanted tensor. `specs` has every stored tensor by
    its full name. `in_part`: of tensors that were saved in parts no more is wanted, most often, than the first file
    holds; where the rest lies is found out when it is asked for.
    """

    def __init__(
        self,
        store: Store,
        manifest: Manifest,
        parts: Iterable[str] | None = None,
        trees: Mapping[str, object] | None = None,
        own: Mapping[str, Sequence[FileEntry]] = NOTHING_OWN,
        *,
        in_part: bool = False,
    ) -> None:
        self._own = own
        self._in_part = in_part
        self.manifest = manifest
        self.specs: dict[str, TensorSpec] = {}
        self._store = store
        self._places: dict[str, tuple[DataFile, int]] = {}  # of what lies in one file: nearly all
        self._boxed: dict[str, _Boxed] = {}  # what was saved in parts
        self._pieces: dict[str, tuple[Piece, ...]] = {}  # of that, where they were asked for
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
        """Find what holds each tensor, all or some of it: the first file its part lists that has the name."""
        owners: dict[str, str] = {}  # of what lies in one place, most often many tensors
        for name in names:
            if name in self.specs:
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
                self._boxed[name] = _Boxed(inside, entries, file, index)
                if not self._in_part:
                    self.pieces(name)  # all of it must be there
            else:
                self._places[name] = (file, index)
            self.specs[name] = TensorSpec(name, t.dtype, t.whole_shape, t.stride)
            return
        raise MissingObject(f"{name}: no data file of the checkpoint holds this tensor")

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

    def pieces(self, name: str) -> tuple[Piece, ...]:
        """Return where the bytes of a tensor lie, in their order; a tied name is its tensor's."""
        name = self.aliases.get(name, name)
        boxed = self._boxed.get(name)
        if boxed is not None:
            if name not in self._pieces:
                self._pieces[name] = find(map(self._open, boxed.entries), boxed.name, name).pieces
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
        wanted: dict[str, list[_Wanted]] = {key: [] for key in sorted(self._opened)}
        split: list[str] = []
        for name in names:
            if name in self._boxed:
                split.append(name)
                continue
            file, index = self._places[name]
            wanted[file.entry.key].append((index, name, self.specs[name]))
        cut = self._find_parts(parts, wanted)
        slabs: dict[str, list[Slab]] = {}
        for key, found in wanted.items():
            found.sort()
            file = self._opened[key]
            tensors = file.header.tensors
            filled = [index for index, _, _ in found if tensors[index].start < tensors[index].end]
            slabs[key] = slabs_of(file, file.blocks_that_hold(filled))
        read_slabs([slab for of_file in slabs.values() for slab in of_file])
        out: dict[str, HostTensor] = {}
        for key, found in wanted.items():
            _cut(self._opened[key], found, slabs[key], out)
        for name in split:
            spec = self.specs[name]
            out[name] = HostTensor(spec, assemble(self.pieces(name), 0, spec.nbytes), owned=True)
        out |= self._assembled(cut)
        return out

    def _find_parts(
        self, parts: Mapping[str, BoxWanted], wanted: dict[str, list[_Wanted]]
    ) -> dict[str, BoxWanted]:
        """Note which wanted parts lie in a file just as they are wanted, as those of a rank do that resumes as it was;
        return the others."""
        others: dict[str, BoxWanted] = {}
        for key, part in parts.items():
            name, box, shape = part
            boxed = self._boxed.get(name)
            t = boxed.file.header.tensors[boxed.place] if boxed is not None else None
            if boxed is not None and t is not None and t.rows is None and (t.box, t.shape) == (box, shape):
                spec = TensorSpec(name, t.dtype, shape)
                wanted[boxed.file.entry.key].append((boxed.place, key, spec))
            else:
                others[key] = part
        return others

    def _assembled(self, parts: Mapping[str, BoxWanted]) -> dict[str, HostTensor]:
        out: dict[str, HostTensor] = {}
        keys: list[tuple[str, TensorSpec]] = []
        wanted: list[tuple[tuple[Piece, ...], Iterable[Run], int]] = []
        for key, (name, box, shape) in parts.items():
            spec = TensorSpec(name, self.spec(name).dtype, shape)
            if not spec.nbytes:
                out[key] = HostTensor(spec, memoryview(b""))
                continue
            keys.append((key, spec))
            wanted.append(
                (self.pieces(name), runs(shape, box, None, DTYPES[spec.dtype].itemsize), spec.nbytes)
            )
        for (key, spec), data in zip(keys, assemble_runs(wanted), strict=True):
            out[key] = HostTensor(spec, data)
        return out

    def read_rows(self, name: str, start: int, stop: int) -> HostTensor:
        """Return rows `start` to `stop` of a tensor, reading and verifying only the blocks they lie in."""
        whole = self.spec(name)
        row = whole.nbytes // whole.shape[0] if whole.shape and whole.shape[0] else 0
        spec = TensorSpec(name, whole.dtype, (stop - start, *whole.shape[1:]), None)
        if not spec.nbytes:
            return HostTensor(spec, memoryview(b""))
        first, end = start * row, stop * row
        pieces = self.pieces(name)
        if len(pieces) != 1:
            return HostTensor(spec, assemble(pieces, first, end))
        piece = pieces[0]
        slabs = slabs_of(piece.file, piece.file.blocks_of(piece.start + first, piece.start + end))
        read_slabs(slabs)
        return HostTensor(spec, slabs[0].memory, start=slabs[0].place_of(piece.start + first))


def _cut(file: DataFile, found: list[_Wanted], slabs: list[Slab], out: dict[str, HostTensor]) -> None:
    """Put some tensors of a file, in data order, into `out`, from the slabs that hold them."""
    tensors, blocks = file.header.tensors, file.header.blocks
    rest = iter(slabs)
    end, memory, shift = 0, memoryview(b""), 0
    for index, name, spec in found:
        t = tensors[index]
        if t.start == t.end:
            out[name] = HostTensor(spec, memoryview(b""))
            continue
        while t.end > end:
            slab = next(rest)
            end, memory, shift = blocks[slab.blocks[-1]].end, slab.memory, slab.place_of(0)
        out[name] = HostTensor(spec, memory, t.end - t.start >= OWN_BLOCK_BYTES, t.start + shift)
