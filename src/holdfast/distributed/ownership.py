"""Who writes what of a state that several ranks hold: a pure function of what each rank sees by itself.

What is spread over ranks is written by whoever holds it, and of equal replicas by the one that a hash of the name
picks. What is the same everywhere is dealt out by size, large tensors in stretches of rows. Everything else is a rank's
own.
"""

from __future__ import annotations

import heapq
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from blake3 import blake3

from holdfast.core.errors import StateError
from holdfast.core.names import check_path
from holdfast.format.datafile import METADATA, StoredTensor, lay_out
from holdfast.format.ranks import own_part
from holdfast.state.tensors import TensorSpec

__all__ = ["Division", "Taken", "divide"]

CUT_BYTES = 32 << 20  # a tensor that is the same everywhere is dealt out in pieces from this size on
PIECE_BYTES = 8 << 20  # of which each has at least so much
# Every rank that restores reads from all who wrote, so that no more write than is worth it: one for each so many bytes.
SHARE_BYTES = 64 << 20
FEW_WRITERS = 16
Rows = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Taken:
    """What goes to one place of a sheet: a captured tensor, by its number, or some rows of it."""

    source: int
    rows: Rows | None = None


@dataclass(slots=True)
class Division:
    """What one rank writes.

    `sheets` are the files, by name, and their tensors in order: a part's own name; with a number behind it for further
    boxes of the same tensors; and the rank's own part. `taken` says where each tensor comes from, in the same order;
    the same once more: `numbers` of the captured tensors, and for those `cut` their places and rows.
    `agreed` holds for each group of ranks a digest of what all in it must hold.
    """

    sheets: dict[str, list[StoredTensor]] = field(default_factory=dict)
    taken: list[Taken] = field(default_factory=list)
    agreed: dict[str, str] = field(default_factory=dict)
    numbers: list[int] = field(init=False)
    cut: list[tuple[int, Rows]] = field(init=False)

    def __post_init__(self) -> None:
        self.numbers = [taken.source for taken in self.taken]
        self.cut = [(place, t.rows) for place, t in enumerate(self.taken) if t.rows is not None]


def divide(
    specs: Sequence[TensorSpec],
    same: Mapping[str, tuple[str, Sequence[int]]],
    parts: Sequence[str],
    rank: int,
) -> Division:
    """Return what `rank` writes of captured tensors.

    `same` has the group and the ranks of each tensor, by name, that several ranks hold the same of.

    Raises:
        StateError: a tensor has the name that data files reserve.
    """
    sheets: dict[str, list[StoredTensor]] = {check_path(part): [] for part in parts}
    if rank:
        sheets[own_part(rank)] = []
    taken: dict[tuple[str, str], Taken] = {}
    agreed: dict[str, blake3] = {}
    owners = _owners([s for s in specs if s.shard is None and s.name in same], same)

    def put(sheet: str, name: str, stored: StoredTensor, source: Taken) -> None:
        wanted, number = sheet, 0
        while (sheet, name) in taken:
            number += 1
            sheet = f"{wanted}/{number}"
        sheets.setdefault(sheet, []).append(stored)
        taken[sheet, name] = source

    for number, spec in enumerate(specs):
        part, _, name = spec.name.partition("/")
        if name == METADATA:
            raise StateError(f"{spec.name}: data files reserve the name {METADATA!r}; rename that key")
        name = name or part
        shard = spec.shard
        if shard is not None:
            whole = shard.box[1]
            box = shard.box if spec.shape != whole else None
            _agree(agreed, shard.group, spec, whole)
            mine = zlib.crc32(spec.name.encode()) % shard.replicas == shard.replica
            if mine and (spec.nbytes or box is None):  # an empty share of something is no one's
                put(part, name, StoredTensor(name, spec.dtype, spec.shape, None, 0, 0, box), Taken(number))
        elif spec.name in same:
            _agree(agreed, same[spec.name][0], spec, spec.shape)
            for owner, rows in owners[spec.name]:
                if owner == rank:
                    put(part, name, _stored(name, spec, rows), Taken(number, rows))
        elif rank == 0:
            put(part, name, _stored(name, spec, None), Taken(number))
        else:
            put(own_part(rank), spec.name, _stored(spec.name, spec, None), Taken(number))
    laid_out = {sheet: lay_out(tensors) for sheet, tensors in sheets.items()}
    return Division(
        laid_out,
        [taken[sheet, t.name] for sheet, tensors in laid_out.items() for t in tensors],
        {group: found.hexdigest(16) for group, found in agreed.items()},
    )


def _agree(agreed: dict[str, blake3], group: str, spec: TensorSpec, whole: tuple[int, ...]) -> None:
    if group not in agreed:
        agreed[group] = blake3()
    agreed[group].update(f"{spec.name}\n{spec.dtype}{whole}\n".encode())


def _stored(name: str, spec: TensorSpec, rows: Rows | None) -> StoredTensor:
    if rows is None:
        return StoredTensor(name, spec.dtype, spec.shape, spec.stride, 0, 0)
    first, end = rows
    box = ((first, *(0 for _ in spec.shape[1:])), spec.shape)
    return StoredTensor(name, spec.dtype, (end - first, *spec.shape[1:]), None, 0, 0, box)


def _owners(
    specs: Sequence[TensorSpec], same: Mapping[str, tuple[str, Sequence[int]]]
) -> dict[str, list[tuple[int, Rows | None]]]:
    """Return who writes which rows of each tensor: the largest first, each to the rank that has the least to write."""
    total: Counter[str] = Counter()
    for spec in specs:
        total[same[spec.name][0]] += spec.nbytes
    loads: dict[str, list[tuple[int, int]]] = {}  # of each group, a heap
    owners: dict[str, list[tuple[int, Rows | None]]] = {}
    for spec in sorted(specs, key=lambda s: (-s.nbytes, s.name)):
        group, ranks = same[spec.name]
        if group not in loads:
            loads[group] = [(0, rank) for rank in _writers(ranks, total[group])]
        load = loads[group]
        owners[spec.name] = []
        for nbytes, rows in _cut(spec, len(load)):
            least, rank = load[0]
            owners[spec.name].append((rank, rows))
            heapq.heapreplace(load, (least + nbytes, rank))
    return owners


def _writers(ranks: Sequence[int], nbytes: int) -> list[int]:
    """Return which of some ranks write so many bytes: all if they are few, else some that stand far from each other."""
    count = min(len(ranks), max(FEW_WRITERS, nbytes // SHARE_BYTES))
    return [ranks[number * len(ranks) // count] for number in range(count)]


def _cut(spec: TensorSpec, ranks: int) -> Iterator[tuple[int, Rows | None]]:
    """Yield (bytes, rows) of the pieces that a tensor is dealt out in."""
    rows = spec.shape[0] if spec.shape else 0
    if spec.nbytes < CUT_BYTES or spec.stride is not None or rows < 2 or ranks < 2:
        yield spec.nbytes, None
        return
    step = -(-rows // min(ranks, spec.nbytes // PIECE_BYTES))
    for first in range(0, rows, step):
        end = min(first + step, rows)
        yield spec.nbytes // rows * (end - first), (first, end)
