"""Read a checkpoint's tensors: only the bytes that are needed, verified block by block."""

from __future__ import annotations

import bisect
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from itertools import chain, groupby
from types import MappingProxyType
from typing import NamedTuple

from holdfast.catalog.content import DataFile, open_file
from holdfast.catalog.derived import DerivedTensor
from holdfast.catalog.pieces import Piece, find
from holdfast.core.dtypes import DTYPES
from holdfast.core.memory import Spare
from holdfast.core.names import name_in_file
from holdfast.format.boxes import Run, fill, runs
from holdfast.format.digest import OWN_BLOCK_BYTES
from holdfast.format.manifest import DERIVED_DTYPE, FileEntry, Manifest
from holdfast.format.values import tensor_leaves
from holdfast.restoring.assembling import assemble, assemble_runs
from holdfast.restoring.remembered import Remembered
from holdfast.restoring.staging import Slab, read_slabs, slabs_of
from holdfast.state.restoring import BoxWanted
from holdfast.state.tensors import HostTensor, TensorSpec
from holdfast.stores import Store

__all__ = ["Reader"]

NOTHING_OWN: Mapping[str, Sequence[FileEntry]] = MappingProxyType({})
_Wanted = tuple[int, str, TensorSpec]  # place in a file, name in what is returned, what it is
NO_PARTS: Mapping[str, BoxWanted] = MappingProxyType({})
NOTHING_READ: Mapping[str, HostTensor] = MappingProxyType({})


class _Parted(NamedTuple):
    """A tensor that was saved in parts: its name in the files, those that may hold some of it, and of the first one
    that does, its place there."""

    inside: str
    entries: Sequence[FileEntry]
    file: DataFile
    place: int


class _Group(NamedTuple):
    """Files of a part that were written in one save: this rank's own, and all, in the order of ranks."""

    own: list[FileEntry]
    files: list[FileEntry]


class _Listed(NamedTuple):
    """The files of a part: by the save that wrote them, and in the order in which they are asked."""

    groups: list[_Group]
    in_turn: list[FileEntry]


class Reader:
    """The values and tensors of one checkpoint, or of some of its parts; `trees` gives decoded (and cut) value trees,
    `own` the files of tensors that one of several ranks has for itself, and `mine` is in the keys of those files that
    this very rank wrote, where there are as many ranks as then.

    Opening it reads headers only, and only of the files that hold a wanted tensor; of what several ranks have saved
    just one file that holds some of it, and when it is read those that hold what is wanted. `specs` has every stored
    tensor by its full name.
    """

    def __init__(
        self,
        store: Store,
        manifest: Manifest,
        parts: Iterable[str] | None = None,
        trees: Mapping[str, object] | None = None,
        own: Mapping[str, Sequence[FileEntry]] = NOTHING_OWN,
        mine: str = "",
    ) -> None:
        self._own, self._mine = own, mine
        self.manifest = manifest
        self.specs: dict[str, TensorSpec] = {}
        self._store = store
        self._places: dict[str, tuple[DataFile, int]] = {}  # of what lies in one file: nearly all
        self._parted: dict[str, _Parted] = {}  # what was saved in parts
        self._pieces: dict[str, tuple[Piece, ...]] = {}  # of these, where all of them were looked for
        self._derived: dict[str, DerivedTensor] = {}  # what follows from other tensors
        self._known: dict[int, _Listed] = {}  # by the identity of a list of files
        self._opened: dict[str, DataFile] = {}
        self.from_memory = 0  # bytes that were found there
        self._remembered: Remembered | None = None
        self._spare: Spare | None = None
        self._passing: Container[str] = ()
        self.tree: dict[str, object] = {}
        self.aliases: dict[str, str] = {}
        for name in manifest.parts if parts is None else parts:
            part = manifest.parts[name]
            self.tree[name] = part.values(name) if trees is None else trees[name]
            self.aliases |= part.aliases
            names = [leaf.name for leaf in tensor_leaves(self.tree[name])]
            if part.aliases:
                names = [part.aliases.get(n, n) for n in names]
            self._place(name, names)

    def _place(self, part: str, names: Iterable[str]) -> None:
        """Find what holds each tensor of a part, or tied to one of it: the first file that its own part lists and that
        has the name, and where that has a part of it only, the next ones for the rest."""
        derived, files, within = self.manifest.derived, self.manifest.parts[part].files, f"{part}/"
        for name in names:
            if name in self.specs:
                continue
            if name in derived:
                d = derived[name]
                self._derived[name] = DerivedTensor.of(self.manifest, name, d, self._open)
                self.specs[name] = TensorSpec(name, DERIVED_DTYPE, d.shape, d.stride)
            elif name in self._own:
                self._find(name, name, self._own[name])
            elif name.startswith(within):
                self._find(name, name[len(within) :], files)
            else:
                owner = self.manifest.part_of(name)
                self._find(name, name_in_file(owner, name), self.manifest.parts[owner].files)

    def _find(self, name: str, inside: str, entries: Sequence[FileEntry]) -> None:
        for entry in self._listed(entries).in_turn:
            file = self._open(entry)
            index = file.by_name.get(inside)
            if index is None:
                continue
            t = file.header.tensors[index]
            self.specs[name] = TensorSpec(name, t.dtype, t.whole_shape, t.stride)
            if t.box is None or 0 in t.whole_shape:
                self._places[name] = (file, index)
                return
            self._parted[name] = _Parted(inside, entries, file, index)
            if self.manifest.world_size == 1:
                self.pieces(name)  # at once: what is missing is missed by who opens it
            return
        find((), inside, name)  # which says that it is in no file

    def _listed(self, entries: Sequence[FileEntry]) -> _Listed:
        """Return the files of a part, as listed, by the save that wrote them. What several ranks have written in one
        save does not contradict itself, so that the files of a group may be asked in any order."""
        found = self._known.get(id(entries))
        if found is None:
            groups: list[_Group] = []
            for _, group in groupby(entries, lambda entry: entry.key.rpartition("/")[0]):
                files = list(group)
                groups.append(_Group([f for f in files if self._mine and self._mine in f.key], files))
            in_turn = [file for group in groups for file in (*group.own, *group.files)]
            found = self._known[id(entries)] = _Listed(groups, in_turn)
        return found

    def _open(self, entry: FileEntry) -> DataFile:
        file = self._opened.get(entry.key)
        if file is None:
            file = self._opened[entry.key] = open_file(self._store, entry)
        return file

    def remember(self, remembered: Remembered) -> None:
        """Look there first from now on. Who gives it knows when the tensors were copied on."""
        self._remembered = remembered

    def lend(self, memory: memoryview, passing: Container[str]) -> None:
        """Lend memory, touched before, to what is read from now on. Tensors whose name or key is `passing` go there as
        far as it reaches: whoever lends it knows when they were copied on."""
        self._spare, self._passing = Spare(memory), passing

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
        if name in self._parted:
            if name not in self._pieces:
                parted = self._parted[name]
                self._pieces[name] = find(map(self._open, parted.entries), parted.inside, name).pieces
            return self._pieces[name]
        file, index = self._places[name]
        t = file.header.tensors[index]
        return (Piece(file, 0, t.start, t.nbytes),) if t.nbytes else ()

    def _pieces_of(self, name: str, wanted: Sequence[Run]) -> tuple[Piece, ...]:
        """Return pieces of a tensor in which some runs of it lie, from as few files as possible: this rank's own, then
        those of ranks that stand where the runs do, as spread tensors mostly are."""
        name = self.aliases.get(name, name)
        if name not in self._parted or name in self._pieces:
            return self.pieces(name)
        inside, entries, _, _ = self._parted[name]
        spec = self.specs[name]
        gaps = [(run.at, run.at + run.size) for run in wanted]
        pieces: list[Piece] = []
        place = wanted[0].at / spec.nbytes
        groups = (chain(group.own, _outwards(group.files, place)) for group in self._listed(entries).groups)
        asked = chain.from_iterable(groups)
        while gaps and (entry := next(asked, None)) is not None:
            file = self._open(entry)
            index = file.by_name.get(inside)
            if index is None:
                continue
            t = file.header.tensors[index]
            if (t.dtype, t.whole_shape) != (spec.dtype, spec.shape):
                break
            used, gaps = fill(gaps, t.runs())
            pieces += [Piece(file, run.at, t.start + run.source, run.size) for run in used]
        if gaps:
            return self.pieces(name)  # which says what is wrong
        return tuple(sorted(pieces, key=lambda piece: piece.at))

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
        following: list[str] = []
        for name in names:
            place = self._places.get(name)
            if place is None:
                (following if name in self._derived else split).append(name)
            else:
                wanted[place[0].entry.key].append((place[1], name, self.specs[name]))
        others = self._find_parts(parts, wanted)
        slabs: dict[str, list[Slab]] = {}
        for key, found in wanted.items():
            found.sort()
            file = self._opened[key]
            tensors = file.header.tensors
            filled = [index for index, _, _ in found if tensors[index].start < tensors[index].end]
            slabs[key] = slabs_of(file, file.blocks_that_hold(filled))
            if self._spare is not None:
                _mark(file, found, slabs[key], self._passing)
        missing = [slab for of_file in slabs.values() for slab in of_file]
        if self._remembered is not None:
            sizes = sum(slab.end - slab.first for slab in missing)
            missing = self._remembered.fill(missing)
            self.from_memory += sizes - sum(slab.end - slab.first for slab in missing)
        read_slabs(missing, self._spare)
        out: dict[str, HostTensor] = {}
        for key, found in wanted.items():
            _cut(self._opened[key], found, slabs[key], out)
        for name in split:
            spec = self.specs[name]
            out[name] = HostTensor(spec, assemble(self.pieces(name), 0, spec.nbytes), owned=True)
        for name in following:
            out[name] = self._follow(self._derived[name], out)
        return out | self._assembled(others)

    def _follow(self, tensor: DerivedTensor, there: Mapping[str, HostTensor] = NOTHING_READ) -> HostTensor:
        """Return a tensor that follows from another one, which may be there already."""
        source = there.get(tensor.entry.source)
        data = source.data if source is not None else assemble(tensor.pieces, 0, tensor.source_bytes)
        return HostTensor(self.specs[tensor.name], tensor.make(data), owned=True)

    def _find_parts(
        self, parts: Mapping[str, BoxWanted], wanted: dict[str, list[_Wanted]]
    ) -> dict[str, BoxWanted]:
        """Note which wanted parts lie in a file just as they are wanted, as those of a rank do that resumes as it was;
        return the others."""
        others: dict[str, BoxWanted] = {}
        for key, part in parts.items():
            name, box, shape = part
            parted = self._parted.get(name)
            t = parted.file.header.tensors[parted.place] if parted is not None else None
            if parted is not None and t is not None and t.rows is None and (t.box, t.shape) == (box, shape):
                wanted[parted.file.entry.key].append((parted.place, key, TensorSpec(name, t.dtype, shape)))
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
            derived = self.derived(name)
            if derived is not None:
                whole = self._follow(derived).data
                part = memoryview(bytearray(spec.nbytes))
                for run in runs(shape, box, None, DTYPES[spec.dtype].itemsize):
                    part[run.source : run.source + run.size] = whole[run.at : run.at + run.size]
                out[key] = HostTensor(spec, part)
                continue
            keys.append((key, spec))
            there = list(runs(shape, box, None, DTYPES[spec.dtype].itemsize))
            wanted.append((self._pieces_of(name, there), there, spec.nbytes))
        for (key, spec), data in zip(keys, assemble_runs(wanted, self._spare), strict=True):
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


def _mark(file: DataFile, found: list[_Wanted], slabs: list[Slab], passing: Container[str]) -> None:
    """Mark the slabs of a file in which nothing lies that is kept as it lies there; small tensors never are."""
    tensors, blocks = file.header.tensors, file.header.blocks
    ends = [blocks[slab.blocks[-1]].end for slab in slabs]
    for slab in slabs:
        slab.passing = True
    for index, name, _ in found:
        t = tensors[index]
        if t.end - t.start >= OWN_BLOCK_BYTES and name not in passing:
            slabs[bisect.bisect_left(ends, t.end)].passing = False


def _cut(file: DataFile, found: list[_Wanted], slabs: list[Slab], out: dict[str, HostTensor]) -> None:
    """Put some tensors of a file, in data order, into `out`, from the slabs that hold them."""
    tensors, blocks = file.header.tensors, file.header.blocks
    rest = iter(slabs)
    slab = Slab(file, [])
    end, memory, shift = 0, slab.memory, 0
    for index, name, spec in found:
        t = tensors[index]
        if t.start == t.end:
            out[name] = HostTensor(spec, memoryview(b""))
            continue
        while t.end > end:
            slab = next(rest)
            end, memory, shift = blocks[slab.blocks[-1]].end, slab.memory, slab.place_of(0)
        owned = t.end - t.start >= OWN_BLOCK_BYTES and not slab.passing
        out[name] = HostTensor(spec, memory, owned, t.start + shift)


def _outwards(files: Sequence[FileEntry], place: float) -> Iterator[FileEntry]:
    """Yield files, from the one on that stands at a place between 0 and 1."""
    middle = min(int(place * len(files)), len(files) - 1)
    for far in range(len(files)):
        if middle + far < len(files):
            yield files[middle + far]
        if 0 < far <= middle:
            yield files[middle - far]
