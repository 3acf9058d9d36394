"""A rank's share of a save: its tensors, streamed into one data file for each part, and its values, encoded.

Tensors are taken one by one, as the file comes to them; nothing is copied that lies in host memory already.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem, WriteItemType

from holdfast.core.errors import SaveFailed, StateError, UnsupportedValue
from holdfast.core.names import file_stems, name_in_file
from holdfast.format.datafile import OpenHeader, StoredTensor, lay_out, open_header
from holdfast.format.digest import digest
from holdfast.format.manifest import FileEntry
from holdfast.integrations.dcp.naming import Place, paths_in, place_of
from holdfast.integrations.dcp.trees import captured, object_of
from holdfast.integrations.dcp.unchanged import Key, Stretch
from holdfast.saving.environment import fingerprint
from holdfast.state.adapters.torch_placing import NAMES
from holdfast.state.adapters.torch_tensors import tensor_spec
from holdfast.state.registry import dispatch
from holdfast.state.tensors import TensorSource
from holdfast.stores import Store, Stream

__all__ = ["Share", "Writing", "items_of", "write_share"]


@dataclass(frozen=True, slots=True)
class Share:
    """What a rank has made durable: by part its new files and the older ones that it refers to, and the encoded values
    by DCP's key. `tensors` is how many tensor items its plan had."""

    rank: int
    new: dict[str, list[FileEntry]]
    referred: dict[str, list[FileEntry]]
    values: dict[str, bytes]
    tensors: int
    environment: dict[str, str]

    @property
    def new_bytes(self) -> int:
        return sum(entry.size for entries in self.new.values() for entry in entries)


class Writing(NamedTuple):
    """Where a share goes: the prefix of its files, and the end of their names."""

    prefix: str
    mark: str


class _Piece(NamedTuple):
    """A tensor to write, and what gives its bytes in C order."""

    tensor: StoredTensor
    data: Callable[[], memoryview]

    @property
    def key(self) -> Key:
        t = self.tensor
        return (t.name, t.dtype, t.shape, t.box)


@dataclass(slots=True)
class Items:
    """What a plan has to write: pieces by part, and values by key."""

    pieces: dict[str, list[_Piece]] = field(default_factory=dict)
    values: dict[str, bytes] = field(default_factory=dict)
    tensors: int = 0


def items_of(plan: SavePlan, planner: SavePlanner) -> Items:
    """Find out what a rank writes. Values are taken at once, tensors later.

    Raises:
        UnsupportedValue: something cannot be stored without running code at load; named, and nothing was written.
    """
    found = Items()
    paths = paths_in(plan.planner_data)
    for item in plan.items:
        place = place_of(item.index.fqn, paths.get(item.index.fqn))
        if item.type == WriteItemType.BYTE_IO:
            found.values[item.index.fqn], inside = captured(object_of(planner, item), place)
            for source in inside:
                piece = _piece_of_source(source, place.part)
                found.pieces.setdefault(place.part, []).append(piece)
            continue
        found.tensors += 1
        piece_of_it = _piece(item, place, planner)
        if piece_of_it is not None:
            found.pieces.setdefault(place.part, []).append(piece_of_it)
    return found


def names_of(plan: SavePlan) -> dict[str, list[str]]:
    """Return by part the names, inside it, of the tensors that a plan has a rank write."""
    paths = paths_in(plan.planner_data)
    found: dict[str, list[str]] = {}
    for item in plan.items:
        if item.type != WriteItemType.BYTE_IO:
            place = place_of(item.index.fqn, paths.get(item.index.fqn))
            found.setdefault(place.part, []).append(name_in_file(place.part, place.tensor))
    return found


def _piece(item: WriteItem, place: Place, planner: SavePlanner) -> _Piece | None:
    """Return what is to be written of a tensor item; None for an empty part of a tensor that is not empty."""
    data = item.tensor_data
    assert data is not None
    whole, shape, offsets = tuple(data.size), tuple(data.chunk.sizes), tuple(data.chunk.offsets)
    dtype = NAMES.get(data.properties.dtype)
    if dtype is None:
        raise UnsupportedValue(
            f"{item.index.fqn}: elements of type {data.properties.dtype} cannot be stored; convert the tensor"
        )
    if 0 in whole:
        shape, offsets = whole, (0,) * len(whole)
    elif 0 in shape:
        return None
    box = (offsets, whole) if shape != whole else None
    name = name_in_file(place.part, place.tensor)
    stored = StoredTensor(name, dtype, shape, None, 0, 0, box)

    def bytes_of_it() -> memoryview:
        if 0 in shape:
            return memoryview(b"")
        made = planner.resolve_data(item)
        if not isinstance(made, torch.Tensor):
            raise StateError(
                f"{item.index.fqn}: the planner planned a tensor and gave a {type(made).__name__}"
            )
        found = tensor_spec(made.detach(), item.index.fqn)
        if (found.dtype, found.shape) != (dtype, shape):
            raise StateError(
                f"{item.index.fqn}: the planner planned {dtype}{list(shape)} and gave {found.describe()}"
            )
        return _host_bytes(made)

    return _Piece(stored, bytes_of_it)


def _host_bytes(t: torch.Tensor) -> memoryview:
    """Return the bytes of a tensor in C order, without a copy where they lie so in host memory."""
    host = t.detach().resolve_conj().resolve_neg().cpu().contiguous()
    return memoryview(host.reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]


def _piece_of_source(source: TensorSource, part: str) -> _Piece:
    """Return what is to be written of a tensor that stands inside a value."""
    spec = source.spec
    if spec.shard is not None and spec.shape != spec.shard.box[1]:
        raise UnsupportedValue(
            f"{spec.name}: a tensor inside a value is spread over processes; keep it in a dict"
        )

    def bytes_of_it() -> memoryview:
        engine = next(e for e in dispatch().engines.values() if e.owns(source.value))
        memory = memoryview(bytearray(spec.nbytes))
        if spec.nbytes:
            engine.copy_out([source.value], engine.targets([spec], [memory]))
        return memory

    stored = StoredTensor(name_in_file(part, spec.name), spec.dtype, spec.shape, spec.stride, 0, 0)
    return _Piece(stored, bytes_of_it)


# ---- writing --------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _File:
    """A data file on its way. The digests are taken while its bytes go by."""

    key: str
    header: OpenHeader
    pieces: Sequence[_Piece]  # in data order
    size: int
    digests: list[bytes] = field(default_factory=list)
    entry: FileEntry | None = None

    def body(self) -> Iterator[memoryview]:
        blocks = self.header.blocks
        at = 0
        while at < len(blocks):
            block = blocks[at]
            data = self._bytes_of(block.first, block.last)
            end = at + 1
            while end < len(blocks) and blocks[end].first == block.first:  # of one large tensor
                end += 1
            for one in blocks[at:end]:
                piece = data[one.start - block.start : one.end - block.start]
                self.digests.append(digest(piece))
                yield piece
            at = end

    def _bytes_of(self, first: int, last: int) -> memoryview:
        if first == last:
            return self.pieces[first].data()
        return memoryview(b"".join(p.data() for p in self.pieces[first : last + 1]))

    def head(self) -> bytes:
        head = self.header.close(self.digests)
        self.entry = FileEntry(self.key, self.header.size + self.size, self.header.size, digest(head).hex())
        return head


def write_share(store: Store, writing: Writing, items: Items, known: Sequence[Stretch], rank: int) -> Share:
    """Make a rank's share durable: what `known` has is referred to, the rest is written.

    Raises:
        StoreError: a file could not be written; none of this share's files stays.
    """
    referred: dict[str, list[FileEntry]] = {}
    left = {part: {p.key: p for p in pieces} for part, pieces in items.pieces.items()}
    for stretch in known:
        if stretch.part in left and _is_unchanged(stretch, left[stretch.part]):
            for key in stretch.tensors:
                del left[stretch.part][key]
            older = referred.setdefault(stretch.part, [])
            if stretch.entry not in older:
                older.append(stretch.entry)
    stems = file_stems(left)
    files = [
        (part, _file(f"{writing.prefix}/{stems[part]}{writing.mark}{more}.safetensors", together))
        for part, pieces in left.items()
        for more, together in _in_files(pieces.values())
    ]
    store.write_streams(Stream(f.key, f.header.size, f.body(), f.head, body_bytes=f.size) for _, f in files)
    new: dict[str, list[FileEntry]] = {}
    for part, file in files:
        if file.entry is None:
            raise SaveFailed(f"{file.key}: the store did not ask for all of the file")
        new.setdefault(part, []).append(file.entry)
    return Share(rank, new, referred, items.values, items.tensors, fingerprint())


def _in_files(pieces: Iterable[_Piece]) -> Iterator[tuple[str, list[_Piece]]]:
    """Yield the pieces of each file of a part, and what its name ends with: in one file a name stands once, so of a
    tensor of which a rank holds several boxes the second goes into a second file."""
    files: list[dict[str, _Piece]] = []
    for piece in pieces:
        free = next((f for f in files if piece.tensor.name not in f), None)
        if free is None:
            files.append(free := {})
        free[piece.tensor.name] = piece
    for number, together in enumerate(files):
        yield f"-more{number:05d}" if number else "", list(together.values())


def _file(key: str, pieces: list[_Piece]) -> _File:
    laid_out = lay_out([p.tensor for p in pieces])
    data = {p.tensor.name: p.data for p in pieces}
    ordered = [_Piece(t, data[t.name]) for t in laid_out]
    return _File(key, open_header(laid_out), ordered, laid_out[-1].end)


def _is_unchanged(stretch: Stretch, pieces: Mapping[Key, _Piece]) -> bool:
    if not all(key in pieces for key in stretch.tensors):
        return False
    found = [pieces[key].data() for key in stretch.tensors]
    data = found[0] if len(found) == 1 else memoryview(b"".join(found))
    start = 0
    for size, expected in stretch.blocks:
        if digest(data[start : start + size]) != expected:
            return False
        start += size
    return start == len(data)
