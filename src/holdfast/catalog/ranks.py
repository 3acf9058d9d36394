"""What a checkpoint of several ranks is to one of them, to as many others, or to a single process.

At the number of ranks that saved it every rank finds what was its own. At another, all find what rank 0 had for itself,
with what only others had beside it; only of the random generators rank i takes those of rank i.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import msgspec

from holdfast.catalog.content import DataFile, open_file
from holdfast.core.errors import InvalidFormat
from holdfast.format.datafile import StoredTensor
from holdfast.format.manifest import FileEntry, Manifest, Part
from holdfast.format.ranks import (
    ELSEWHERE,
    MARK,
    RANK_APART,
    OwnValues,
    is_ranks,
    own_part,
    rank_mark,
    rank_of,
)
from holdfast.format.values import encode_value, tensor_leaves
from holdfast.stores import Store

__all__ = ["Own", "View", "read_own", "view_of"]

RNG = "rng"
Files = tuple[FileEntry, ...]


@dataclass(frozen=True, slots=True)
class Own:
    """What one rank has for itself: values of parts that differ from rank 0's, and names of tensors."""

    values: Mapping[str, OwnValues] = field(default_factory=dict)
    names: frozenset[str] = frozenset()


@dataclass(slots=True)
class View:
    """A checkpoint as one process sees it: the parts of its state; the files of those tensors that are looked for among
    a rank's own, by name; whether it was put together from what several ranks had; what is not as it was saved; and
    what the keys of the files have in them that this very rank wrote."""

    manifest: Manifest
    own: dict[str, Files] = field(default_factory=dict)
    merged: bool = False
    notes: list[str] = field(default_factory=list)
    mine: str = ""


def read_own(files: Sequence[DataFile]) -> Own:
    """Return what the files of a rank's own part hold.

    Raises:
        IntegrityError: bytes are not what was committed.
    """
    values: dict[str, OwnValues] = {}
    names: set[str] = set()
    for file in files:
        for t in file.header.tensors:
            if not t.name.startswith(f"{MARK}/"):
                names.add(t.name)
                continue
            try:
                found = msgspec.json.decode(_bytes_of(file, t), type=OwnValues)
            except (ValueError, RecursionError) as e:
                raise InvalidFormat(f"{file.key}: {t.name[:80]!r} does not hold values of a part: {e}") from e
            values.setdefault(t.name[len(MARK) + 1 :], found)
    return Own(values, frozenset(names))


def _bytes_of(file: DataFile, t: StoredTensor) -> bytes:
    found = bytearray()
    for index in file.blocks_of(t.start, t.end):
        block = file.header.blocks[index]
        first, end = max(t.start, block.start), min(t.end, block.end)
        found += file.read_block(index)[first - block.start : end - block.start]
    return bytes(found)


def view_of(store: Store, manifest: Manifest, rank: int = 0, world: int = 1, *, wide: bool = False) -> View:
    """Return a checkpoint as `rank` of so many sees it. What ranks have for themselves is read as far as it is needed.

    `wide`: also at the number of ranks that saved it, with what only others had beside what the rank had itself, for
    ranks that are laid out otherwise than then.

    Raises:
        IntegrityError, StoreError: it cannot be.
    """
    then = manifest.world_size
    if then == 1:
        return View(manifest, merged=world > 1)
    parts = {name: part for name, part in manifest.parts.items() if not is_ranks(part)}
    view = View(msgspec.structs.replace(manifest, parts=parts))
    if then == world:
        view.mine = rank_mark(rank, world)
        if rank:
            _give_own(view, manifest, rank, _own(store, manifest, rank))
        if wide:
            view.merged = True
            for name, part in manifest.parts.items():
                if part.kind == RANK_APART and rank_of(name) != rank:
                    _merge(view, manifest, rank_of(name), _own(store, manifest, rank_of(name)))
            if rank:
                _merge_first(view, manifest)
        _drop_elsewhere(parts)
        return view
    view.merged = True
    view.notes.append(
        f"saved by {then} ranks and restored by {world}: what a rank had for itself alone is taken from rank 0"
    )
    for name, part in manifest.parts.items():
        if part.kind == RANK_APART:
            _merge(view, manifest, rank_of(name), _own(store, manifest, rank_of(name)))
    _drop_elsewhere(parts)
    if RNG in parts and rank:
        if rank < then:
            _give_own(view, manifest, rank, _own(store, manifest, rank), only=RNG)
        else:
            view.notes.append(f"random generators: there was no rank {rank}; derived from those of rank 0")
    return view


def _own(store: Store, manifest: Manifest, rank: int) -> Own:
    part = manifest.parts.get(own_part(rank))
    return Own() if part is None else read_own([open_file(store, entry) for entry in part.files])


def _files_of(manifest: Manifest, rank: int) -> Files:
    return tuple(manifest.parts[own_part(rank)].files)


def _drop_elsewhere(parts: dict[str, Part]) -> None:
    for name in [name for name, part in parts.items() if part.kind == ELSEWHERE]:
        del parts[name]


def _give_own(view: View, manifest: Manifest, rank: int, own: Own, *, only: str = "") -> None:
    """Put what a rank had for itself in the place of what rank 0 had."""
    parts = view.manifest.parts
    for name, values in own.values.items():
        if (not only or name == only) and not (manifest.demoted and name not in parts):
            parts[name] = Part(
                values.tree, values.kind, parts[name].files if name in parts else [], values.aliases
            )
    view.own.update(
        (name, _files_of(manifest, rank)) for name in own.names if not only or name.partition("/")[0] == only
    )


def _merge(view: View, manifest: Manifest, rank: int, own: Own) -> None:
    """Add what a rank had of parts that held other tensors there than on rank 0, such as a stage of a pipeline."""
    parts = view.manifest.parts
    for name, values in own.values.items():
        if not values.apart or (manifest.demoted and name not in parts):
            continue
        there = parts.get(name)
        theirs = Part(values.tree, values.kind, there.files if there is not None else [], values.aliases)
        before: set[str] = set()
        if there is not None and there.kind != ELSEWHERE:
            mine = there.values(name)
            before = {leaf.name for leaf in tensor_leaves(mine)}
            whole = _joined(mine, theirs.values(name))
            tree = msgspec.Raw(msgspec.json.encode(encode_value(whole, name)))
            theirs = Part(tree, there.kind, there.files, values.aliases | there.aliases)
        parts[name] = theirs
        for leaf in tensor_leaves(theirs.values(name)):
            if leaf.name in own.names and leaf.name not in before:
                view.own.setdefault(leaf.name, _files_of(manifest, rank))


def _merge_first(view: View, manifest: Manifest) -> None:
    """Add what rank 0 had of each part."""
    parts = view.manifest.parts
    for name, first in manifest.parts.items():
        there = parts.get(name)
        if is_ranks(first) or first.kind == ELSEWHERE or there is None or there.tree == first.tree:
            continue
        whole = _joined(there.values(name), first.values(name))
        tree = msgspec.Raw(msgspec.json.encode(encode_value(whole, name)))
        parts[name] = Part(tree, there.kind, there.files, first.aliases | there.aliases)


def _joined(mine: object, theirs: object) -> object:
    """Return two value trees as one: dictionaries take in each other's keys, the parameter groups of an optimizer each
    other's names; where both say something the first is right."""
    if isinstance(mine, dict) and isinstance(theirs, dict):
        both = {key: _joined(value, theirs[key]) if key in theirs else value for key, value in mine.items()}
        return type(mine)({**both, **{k: v for k, v in theirs.items() if k not in mine}})
    groups = (mine, theirs)
    if all(
        isinstance(g, list) and g and all(isinstance(e, dict) and "params" in e for e in g) for g in groups
    ):
        return _joined_groups(mine, theirs)  # type: ignore[arg-type]
    return mine


def _joined_groups(
    mine: Sequence[dict[str, object]], theirs: Sequence[dict[str, object]]
) -> list[dict[str, object]]:
    found = [dict(group) for group in mine]
    for index, group in enumerate(theirs):
        if index >= len(found):
            found.append(dict(group))
            continue
        names, more = found[index]["params"], group["params"]
        if isinstance(names, list) and isinstance(more, list):
            known = set(names)
            found[index]["params"] = [*names, *(name for name in more if name not in known)]
    return found
