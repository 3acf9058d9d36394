"""What a save need not write again: stretches of the newest checkpoint's files that hold what a rank has now.

The coordinator reads the headers of these files once and tells each rank what it may refer to; the rank compares
digests. A stretch is a tensor with blocks of its own, or a block of small tensors that is unchanged as a whole.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from holdfast.catalog.content import DataFile, open_file
from holdfast.core.dtypes import DTYPES
from holdfast.format.boxes import Box, Gap, fill
from holdfast.format.datafile import StoredTensor
from holdfast.format.manifest import FileEntry, Manifest
from holdfast.stores import Store

__all__ = ["Known", "Stretch", "known_of", "known_to"]

READERS = 8

Key = tuple[str, str, tuple[int, ...], Box | None]  # name in the part, element type, shape, box


@dataclass(frozen=True, slots=True)
class Stretch:
    """Some tensors of a part that lie together in a file, and the (bytes, digest) of the blocks over them."""

    part: str
    entry: FileEntry
    tensors: tuple[Key, ...]
    blocks: tuple[tuple[int, bytes], ...]


@dataclass(frozen=True, slots=True)
class Known:
    """What the newest checkpoint holds, and its files by part in the manifest's order."""

    stretches: tuple[Stretch, ...] = ()
    order: Mapping[str, list[str]] | None = None


def known_of(store: Store, manifest: Manifest) -> Known:
    """Return what a committed checkpoint holds, from its files' headers.

    Raises:
        IntegrityError: one of them does not verify.
    """
    entries = {f.key: f for part in manifest.parts.values() for f in part.files}
    with ThreadPoolExecutor(READERS, thread_name_prefix="holdfast-read") as pool:
        opened = dict(zip(entries, pool.map(lambda e: open_file(store, e), entries.values()), strict=True))
    found: list[Stretch] = []
    for name, part in manifest.parts.items():
        found += _in_force(name, [opened[f.key] for f in part.files])
    return Known(tuple(found), {name: [f.key for f in part.files] for name, part in manifest.parts.items()})


def known_to(known: Known, tensors: Mapping[str, Iterable[str]]) -> tuple[Stretch, ...]:
    """Return the stretches of which a rank writes all tensors; `tensors` are their names by part."""
    mine = {part: frozenset(names) for part, names in tensors.items()}
    nothing: frozenset[str] = frozenset()
    return tuple(s for s in known.stretches if mine.get(s.part, nothing).issuperset(t[0] for t in s.tensors))


def _in_force(part: str, files: list[DataFile]) -> Iterator[Stretch]:
    """Yield the stretches whose every byte is what a reader would find: no file that is listed before has a say."""
    gaps: dict[str, list[Gap]] = {}
    specs: dict[str, tuple[str, tuple[int, ...]]] = {}
    for file in files:
        valid = [_is_in_force(t, gaps, specs) for t in file.header.tensors]
        blocks = zip(file.header.blocks, file.header.digests, strict=True)
        for (first, last), group in itertools.groupby(blocks, key=lambda b: (b[0].first, b[0].last)):
            if all(valid[first : last + 1]):
                held = [t for t in file.header.tensors[first : last + 1] if t.nbytes]
                keys = tuple((t.name, t.dtype, t.shape, t.box) for t in held if t.rows is None)
                if len(keys) == len(held):
                    yield Stretch(part, file.entry, keys, tuple((b.end - b.start, d) for b, d in group))


def _is_in_force(
    t: StoredTensor, gaps: dict[str, list[Gap]], specs: dict[str, tuple[str, tuple[int, ...]]]
) -> bool:
    if not t.nbytes:
        return True
    spec = (t.dtype, t.whole_shape)
    if specs.setdefault(t.name, spec) != spec:
        return False
    whole = math.prod(t.whole_shape) * DTYPES[t.dtype].itemsize
    used, gaps[t.name] = fill(gaps.get(t.name, [(0, whole)]), t.runs())
    return sum(run.size for run in used) == t.nbytes
