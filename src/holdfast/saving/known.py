"""What is known of the tensors that a checkpoint holds: whether one of the next save is the same is decided by digest.

To digest a tensor before it is written costs time that a writer does not have. So a few bytes of each tensor are
remembered too: where these differ the tensor has changed for certain and is written at once, and only where they are
equal the digests must speak first.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass, field, replace

from holdfast.catalog.content import open_file
from holdfast.format.datafile import StoredTensor
from holdfast.format.digest import OWN_BLOCK_BYTES, cut_blocks, digest
from holdfast.format.manifest import FileEntry, Manifest
from holdfast.stores import Store

__all__ = ["KnownTensor", "KnownTensors", "is_large", "look_at", "sample"]

SPOTS = 64
SPOT_BYTES = 8


@dataclass(frozen=True, slots=True)
class KnownTensor:
    """A tensor that a live checkpoint holds: what it is, its digests, its file, and its `sample` where it was seen."""

    dtype: str
    shape: tuple[int, ...]
    stride: tuple[int, ...] | None
    digests: tuple[bytes, ...]
    file: FileEntry
    sample: int | None = None


@dataclass(slots=True)
class KnownTensors:
    """What the checkpoint before holds, so that an unchanged tensor is referred to instead of written again.

    Only tensors with digest blocks of their own are known.
    """

    parts: dict[str, dict[str, KnownTensor]] = field(default_factory=dict)
    files: dict[str, list[FileEntry]] = field(default_factory=dict)  # each part's, in the manifest's order

    @classmethod
    def of(cls, store: Store, manifest: Manifest) -> KnownTensors:
        """Return what a committed checkpoint holds, from its files' headers."""
        known = cls()
        for name, part in manifest.parts.items():
            tensors = known.parts.setdefault(name, {})
            known.files[name] = list(part.files)
            for entry in reversed(part.files):  # the first listed file has the last word
                file = open_file(store, entry)
                for t in file.header.tensors:
                    if is_large(t):
                        digests = tuple(file.header.digests[i] for i in file.blocks_of(t.start, t.end))
                        tensors[t.name] = KnownTensor(t.dtype, t.shape, t.stride, digests, entry)
                    elif tensors:
                        tensors.pop(t.name, None)
        return known


def is_large(t: StoredTensor) -> bool:
    """Return whether a tensor has digest blocks of its own."""
    return t.end - t.start >= OWN_BLOCK_BYTES


def sample(data: memoryview) -> int:
    """Return a checksum of a few bytes spread over a tensor's `data`: another one means another tensor."""
    words = data[: len(data) // SPOT_BYTES * SPOT_BYTES].cast("Q")
    return zlib.crc32(words[:: max(1, len(words) // SPOTS)].tobytes())


def look_at(
    t: StoredTensor, data: memoryview, known: KnownTensor
) -> tuple[KnownTensor | None, tuple[bytes, ...]]:
    """Return what is known of a tensor if it is unchanged (None if not), and its digests if they had to be taken."""
    if (t.dtype, t.shape, t.stride) != (known.dtype, known.shape, known.stride):
        return None, ()
    seen = sample(data)
    if known.sample not in (None, seen):
        return None, ()
    digests = tuple(digest(data[b.start : b.end]) for b in cut_blocks([(len(data), t.shape)]))
    return (replace(known, sample=seen) if digests == known.digests else None), digests
