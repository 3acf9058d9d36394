"""What of a part is written: tensors that changed, of large ones the blocks that changed, and what old files hold too
thinly.

Blocks that did not change stay where they are, in older files. So that a tensor is never scattered over many of them,
and an old file is not kept for a little of it, what such a file holds is written again, and the file is let go.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from holdfast.core.dtypes import DTYPES
from holdfast.format.datafile import StoredTensor
from holdfast.format.digest import OWN_BLOCK_BYTES
from holdfast.format.manifest import FileEntry
from holdfast.saving.known import KnownTensor, Look

__all__ = ["Change", "settle"]

MOST_FILES = 8  # that the blocks of a part's tensors lie in, and what reading them has to open
MOST_SPREAD = 2  # bytes of these files and the new one, for each byte of the part


@dataclass(frozen=True, slots=True)
class Change:
    """What is written of a tensor that is known: blocks `written` of it, all, some or none; what was seen of it."""

    tensor: StoredTensor
    look: Look

    @property
    def written(self) -> list[int]:
        return sorted(self.look.changed)

    @property
    def whole(self) -> bool:
        return len(self.look.changed) == len(self.look.blocks)

    @property
    def digests(self) -> list[bytes | None]:
        """The digests of the written blocks, where they were taken."""
        return [self.look.digests.get(i) for i in self.written]

    def stretches(self) -> list[tuple[int, int]]:
        """Return from where to where in the tensor's bytes what is written lies."""
        found: list[tuple[int, int]] = []
        for block in (self.look.blocks[i] for i in self.written):
            if found and found[-1][1] == block.start:
                found[-1] = (found[-1][0], block.end)
            else:
                found.append((block.start, block.end))
        return found

    def stored(self) -> StoredTensor:
        """Return what is written as a tensor of a data file: the tensor itself, or these rows of it."""
        t = self.tensor
        if self.whole:
            return t
        row = t.nbytes // t.shape[0]
        offsets, whole = t.box or ((0,) * len(t.shape), t.shape)
        rows = tuple((offsets[0] + start // row, offsets[0] + end // row) for start, end in self.stretches())
        box = ((rows[0][0], *offsets[1:]), whole)
        shape = (sum(end - first for first, end in rows), *t.shape[1:])
        size = math.prod(shape) * DTYPES[t.dtype].itemsize
        return StoredTensor(t.name, t.dtype, shape, t.stride, 0, size, box, rows if len(rows) > 1 else None)

    def known(self, entry: FileEntry, digests: Sequence[bytes]) -> KnownTensor:
        """Return what is known when the written blocks, with these digests, lie in `entry`."""
        before = self.look.known
        news = dict(zip(self.written, digests, strict=True))
        return replace(
            before,
            digests=tuple(news.get(i, d) for i, d in enumerate(before.digests)),
            files=tuple(entry if i in news else file for i, file in enumerate(before.files)),
            samples=self.look.samples,
        )

    def held(self) -> Iterator[tuple[str, int, int]]:
        """Yield (file key, file size, bytes) of each block that is referred to."""
        for index, (block, file) in enumerate(zip(self.look.blocks, self.look.known.files, strict=True)):
            if index not in self.look.changed:
                yield file.key, file.size, block.end - block.start


def settle(changes: Sequence[Change], part_bytes: int, fresh_bytes: int) -> None:
    """Add to what is written what cannot, or should not, stay in older files.

    `part_bytes` is the size of the whole part, `fresh_bytes` what of it is written in any case, besides `changes`.
    """
    for change in changes:
        if change.look.changed and not _has_rows(change):
            change.look.changed.update(range(len(change.look.blocks)))
    while True:
        written = fresh_bytes + sum(b - a for c in changes for a, b in c.stretches())
        sizes = {key: size for c in changes for key, size, _ in c.held()}
        loose = _loose(changes)
        spread = written + sum(sizes[key] for key in loose) > MOST_SPREAD * part_bytes
        if not loose or (len(loose) <= MOST_FILES and not spread):
            break
        thinnest = min(loose, key=lambda key: (loose[key], key))
        for change in changes:
            files = change.look.known.files
            change.look.changed.update(i for i, file in enumerate(files) if file.key == thinnest)
    for change in changes:
        _round_up(change)


def _has_rows(change: Change) -> bool:
    """Return whether a tensor's blocks are whole rows, so that some of them are a part of it."""
    t, blocks = change.tensor, change.look.blocks
    return len(blocks) > 1 and (blocks[0].end - blocks[0].start) % (t.nbytes // t.shape[0]) == 0


def _loose(changes: Sequence[Change]) -> Mapping[str, int]:
    """Return the older files that only tensors in several files need, and the bytes that these have there."""
    firm: set[str] = set()
    loose: Counter[str] = Counter()
    for change in changes:
        mine: Counter[str] = Counter()
        for key, _, size in change.held():
            mine[key] += size
        if len(mine) == 1 and not change.look.changed:
            firm.update(mine)
        else:
            loose.update(mine)
    return {key: size for key, size in loose.items() if key not in firm}


def _round_up(change: Change) -> None:
    """Let a part be large enough to have blocks of its own, so that they are those of the whole."""
    size = sum(end - start for start, end in change.stretches())
    if 0 < size < OWN_BLOCK_BYTES:
        change.look.changed.add(min(change.look.changed) - 1)
