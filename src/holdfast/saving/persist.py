"""Persist: an image's bytes become data files, and a manifest that lists them. Committing is the caller's act."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field

from blake3 import blake3

from holdfast.catalog.content import open_file
from holdfast.catalog.keys import data_prefix
from holdfast.core.names import file_stems
from holdfast.format.datafile import StoredTensor, encode_header, lay_out
from holdfast.format.digest import OWN_BLOCK_BYTES, cut_blocks, digest
from holdfast.format.manifest import FileEntry, Manifest, Part
from holdfast.saving.image import Image, PartImage
from holdfast.stores import Store

__all__ = ["KnownTensors", "new_attempt", "persist_parts"]


@dataclass(frozen=True, slots=True)
class _Known:
    """A tensor that a live checkpoint holds: what it is, its digests, and its file."""

    dtype: str
    shape: tuple[int, ...]
    stride: tuple[int, ...] | None
    digests: tuple[bytes, ...]
    file: FileEntry


@dataclass(slots=True)
class KnownTensors:
    """What the checkpoint before holds, so that an unchanged tensor is referred to instead of written again."""

    parts: dict[str, dict[str, _Known]] = field(default_factory=dict)
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
                    if t.nbytes >= OWN_BLOCK_BYTES:
                        digests = tuple(file.header.digests[i] for i in file.blocks_of(t.start, t.end))
                        tensors[t.name] = _Known(t.dtype, t.shape, t.stride, digests, entry)
                    else:
                        tensors.pop(t.name, None)
        return known


def new_attempt() -> str:
    """Return a random id that keeps this attempt's data apart from every other's."""
    return secrets.token_hex(4)


def persist_parts(
    store: Store, step: int, attempt: str, image: Image, known: KnownTensors
) -> tuple[dict[str, Part], KnownTensors, int]:
    """Write what is new of an image; return the manifest's parts, what is known afterwards, and the bytes written."""
    prefix = data_prefix(step, attempt)
    parts: dict[str, Part] = {}
    now_known = KnownTensors()
    written = 0
    stems = file_stems(image.parts)
    for name, part in image.parts.items():
        key = f"{prefix}/{stems[name]}.safetensors"
        image.wait(part.offset + len(part.data))
        result, tensors = _persist_part(
            store, key, part, known.parts.get(name, {}), known.files.get(name, [])
        )
        parts[name] = result
        now_known.parts[name], now_known.files[name] = tensors, list(result.files)
        written += sum(f.size for f in result.files if f.key == key)
    return parts, now_known, written


def _persist_part(
    store: Store, key: str, part: PartImage, before: Mapping[str, _Known], files_before: list[FileEntry]
) -> tuple[Part, dict[str, _Known]]:
    own = _own_digests(part)
    kept = {
        t.name: before[t.name] for t in part.tensors if t.name in before and _same(t, own, before[t.name])
    }
    changed = [t for t in part.tensors if t.name not in kept]
    files: list[FileEntry] = []
    known = dict(kept)
    if changed:
        entry = _write_file(store, key, part, changed, own)
        files.append(entry)
        known |= {
            t.name: _Known(t.dtype, t.shape, t.stride, own[t.name], entry) for t in changed if t.name in own
        }
    needed = {k.file.key for k in kept.values()}
    files += [
        f for f in files_before if f.key in needed
    ]  # the first listed file that has a name has the last word
    return Part(part.tree, part.kind, files, part.aliases), known


def _own_digests(part: PartImage) -> dict[str, tuple[bytes, ...]]:
    """Return the digests of the tensors that are large enough for blocks of their own."""
    found: dict[str, list[bytes]] = {}
    for block in cut_blocks([(t.nbytes, t.shape) for t in part.tensors]):
        t = part.tensors[block.first]
        if t.nbytes >= OWN_BLOCK_BYTES:
            found.setdefault(t.name, []).append(digest(part.data[block.start : block.end]))
    return {name: tuple(d) for name, d in found.items()}


def _same(t: StoredTensor, own: Mapping[str, tuple[bytes, ...]], known: _Known) -> bool:
    return (t.dtype, t.shape, t.stride) == (known.dtype, known.shape, known.stride) and own.get(
        t.name
    ) == known.digests


def _write_file(
    store: Store,
    key: str,
    part: PartImage,
    changed: list[StoredTensor],
    own: Mapping[str, tuple[bytes, ...]],
) -> FileEntry:
    where = {t.name: part.data[t.start : t.end] for t in changed}
    tensors = changed if len(changed) == len(part.tensors) else lay_out(changed)
    header = encode_header(tensors, _block_digests(tensors, where, own))
    store.write(key, [header, *_runs(part, changed)])
    size = len(header) + sum(len(v) for v in where.values())
    return FileEntry(key, size, len(header), digest(header).hex())


def _block_digests(
    tensors: list[StoredTensor], where: Mapping[str, memoryview], own: Mapping[str, tuple[bytes, ...]]
) -> list[bytes]:
    out: list[bytes] = []
    for block in cut_blocks([(t.nbytes, t.shape) for t in tensors]):
        first = tensors[block.first]
        if first.nbytes >= OWN_BLOCK_BYTES:
            if block.start == first.start:
                out.extend(own[first.name])
            continue
        hasher = blake3()
        for t in tensors[block.first : block.last + 1]:
            hasher.update(where[t.name])
        out.append(hasher.digest())
    return out


def _runs(part: PartImage, changed: list[StoredTensor]) -> list[memoryview]:
    """Return the bytes to write, in order, as few contiguous pieces of the arena as possible."""
    spans: list[list[int]] = []
    for t in changed:
        if spans and spans[-1][1] == t.start:
            spans[-1][1] = t.end
        else:
            spans.append([t.start, t.end])
    return [part.data[start:end] for start, end in spans if end > start]
