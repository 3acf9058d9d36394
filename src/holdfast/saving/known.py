"""What is known of the tensors that a checkpoint holds: whether one of the next save is the same is decided by digest.

To digest a block before it is written costs time that a writer does not have. So a few bytes of each block are
remembered too: where these differ the block has changed for certain and is written at once, and only where they are
equal the digests must speak first.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field

from holdfast.catalog.content import DataFile, open_file
from holdfast.core.dtypes import DTYPES
from holdfast.format.boxes import Box
from holdfast.format.datafile import StoredTensor
from holdfast.format.digest import OWN_BLOCK_BYTES, Block, cut_blocks, digest
from holdfast.format.manifest import FileEntry, Manifest
from holdfast.stores import Store

__all__ = ["KnownTensor", "KnownTensors", "Look", "is_large", "look_at", "sample", "whole_blocks"]

SPOTS = 64
SPOT_BYTES = 8
NEWEST = 2  # of the versions of data files: how large tensors are cut today


@dataclass(frozen=True, slots=True)
class KnownTensor:
    """A tensor that a live checkpoint holds: what it is, and of each of its blocks the digest, the file that holds it,
    and the `sample` where it was seen."""

    dtype: str
    shape: tuple[int, ...]
    stride: tuple[int, ...] | None
    digests: tuple[bytes, ...]
    files: tuple[FileEntry, ...]
    samples: tuple[int, ...] = ()
    box: Box | None = None


@dataclass(slots=True)
class KnownTensors:
    """What the checkpoint before holds, so that what did not change is referred to instead of written again.

    Only tensors with digest blocks of their own are known.
    """

    parts: dict[str, dict[str, KnownTensor]] = field(default_factory=dict)
    files: dict[str, list[FileEntry]] = field(default_factory=dict)  # each part's, in the manifest's order

    @classmethod
    def of(cls, store: Store, manifest: Manifest, mark: str = "") -> KnownTensors:
        """Return what a committed checkpoint holds, from its files' headers; of several ranks' files of those with this
        `mark` in their names. What another rank's file, listed before, holds too is not known: it has the last word,
        for the tensor had another owner then."""
        known = cls()
        for name, part in manifest.parts.items():
            known.files[name] = [entry for entry in part.files if mark in entry.key]
            holders: dict[str, list[tuple[DataFile, StoredTensor]]] = {}  # in listed order
            before: dict[str, list[StoredTensor]] = {}  # what other ranks hold
            hidden: set[str] = set()
            last = max((i for i, entry in enumerate(part.files) if mark in entry.key), default=-1)
            for entry in part.files[: last + 1]:
                file = open_file(store, entry)
                for t in file.header.tensors:
                    if mark not in entry.key:
                        before.setdefault(t.name, []).append(t)
                        continue
                    holders.setdefault(t.name, []).append((file, t))
                    if any(_overlap(t, other) for other in before.get(t.name, ())):
                        hidden.add(t.name)
            found = ((t, _known(holding)) for t, holding in holders.items() if t not in hidden)
            known.parts[name] = {t: of_it for t, of_it in found if of_it is not None}
        return known


def _known(holders: Sequence[tuple[DataFile, StoredTensor]]) -> KnownTensor | None:
    """Return what the headers of the files that hold (parts of) a tensor, in listed order, say of its blocks.

    None where they were cut otherwise than today: by version 1, or by several processes.
    """
    first = holders[0][1]
    if not is_large(first):
        return None
    if first.box is not None and len(holders) == 1 and first.rows is None:
        return _known_box(*holders[0])
    shape = first.whole_shape
    blocks = whole_blocks(math.prod(shape) * DTYPES[first.dtype].itemsize, shape)
    found: dict[tuple[int, int], tuple[bytes, FileEntry]] = {}
    for file, t in holders:
        if (t.dtype, t.whole_shape) != (first.dtype, shape):
            break
        for run in t.runs():
            for index in file.blocks_of(t.start + run.source, t.start + run.source + run.size):
                block = file.header.blocks[index]
                begin = block.start - t.start - run.source + run.at
                if begin < run.at or block.end - block.start > run.at + run.size - begin:
                    return None
                place = (begin, begin + block.end - block.start)
                found.setdefault(place, (file.header.digests[index], file.entry))
        if t.box is None:
            break
    held = [found.get((b.start, b.end)) for b in blocks]
    if len(found) > len(blocks) or None in held:
        return None
    both = [h for h in held if h is not None]
    return KnownTensor(first.dtype, shape, first.stride, tuple(d for d, _ in both), tuple(f for _, f in both))


def _known_box(file: DataFile, t: StoredTensor) -> KnownTensor | None:
    """Return what the header of the one file that holds a box of a tensor says of its blocks."""
    blocks = file.blocks_of(t.start, t.end)
    if len(blocks) != len(whole_blocks(t.nbytes, t.shape)):
        return None
    digests = tuple(file.header.digests[index] for index in blocks)
    return KnownTensor(t.dtype, t.shape, t.stride, digests, (file.entry,) * len(digests), box=t.box)


def _overlap(one: StoredTensor, other: StoredTensor) -> bool:
    """Return whether two parts of a tensor have elements in common, or may have."""
    if one.box is None or other.box is None or one.whole_shape != other.whole_shape:
        return True
    return all(a < d and c < b for (a, b), (c, d) in zip(_extent(one), _extent(other), strict=True))


def _extent(t: StoredTensor) -> list[tuple[int, int]]:
    """Return from where to where a part reaches in each dimension of its whole."""
    assert t.box is not None
    reach = [(offset, offset + size) for offset, size in zip(t.box[0], t.shape, strict=True)]
    return [(reach[0][0], t.rows[-1][1]), *reach[1:]] if t.rows is not None else reach


def whole_blocks(nbytes: int, shape: tuple[int, ...]) -> list[Block]:
    """Return the blocks of a tensor that is stored whole and has blocks of its own."""
    return cut_blocks([(nbytes, shape)], NEWEST)


def is_large(t: StoredTensor) -> bool:
    """Return whether a tensor has digest blocks of its own."""
    return t.end - t.start >= OWN_BLOCK_BYTES


def sample(data: memoryview) -> int:
    """Return a checksum of a few bytes spread over `data`: another one means other data."""
    words = data[: len(data) // SPOT_BYTES * SPOT_BYTES].cast("Q")
    return zlib.crc32(words[:: max(1, len(words) // SPOTS)].tobytes())


@dataclass(slots=True)
class Look:
    """What a look at a tensor has shown: its blocks, which of them `changed`, the digests that had to be taken for it,
    by index, and the blocks' samples."""

    known: KnownTensor
    blocks: list[Block]
    changed: set[int]
    digests: dict[int, bytes]
    samples: tuple[int, ...]


def look_at(t: StoredTensor, data: memoryview, known: KnownTensor) -> Look | None:
    """Compare a tensor with what is known of one of its name; return None if that was something else altogether."""
    if (t.dtype, t.shape, t.stride, t.box) != (known.dtype, known.shape, known.stride, known.box):
        return None
    blocks = whole_blocks(len(data), t.shape)
    look = Look(known, blocks, set(), {}, tuple(sample(data[b.start : b.end]) for b in blocks))
    for index, block in enumerate(blocks):
        if not known.samples or known.samples[index] == look.samples[index]:
            look.digests[index] = digest(data[block.start : block.end])
        if look.digests.get(index) != known.digests[index]:
            look.changed.add(index)
    return look
