"""Read everything a checkpoint stands on and say what is wrong, by name."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from queue import SimpleQueue

from holdfast.catalog.content import DataFile, open_file
from holdfast.catalog.derived import DerivedTensor
from holdfast.catalog.pieces import find
from holdfast.catalog.ranks import Own, read_own
from holdfast.core.errors import HoldfastError
from holdfast.core.memory import map_pages
from holdfast.core.names import name_in_file
from holdfast.core.workers import Workers
from holdfast.format.manifest import FileEntry, Manifest, Part
from holdfast.format.ranks import check_ranks, is_ranks
from holdfast.format.values import tensor_leaves
from holdfast.stores import Store

__all__ = ["Problem", "unheld_tensors", "verify_file", "verify_manifest"]

THREADS = 3
STRETCH_BYTES = 32 << 20  # read at once


@dataclass(frozen=True, slots=True)
class Problem:
    """Something that does not verify: the object's key and what is wrong with it."""

    key: str
    message: str


def verify_manifest(
    store: Store, manifest: Manifest, progress: Callable[[int], None] = lambda done: None
) -> Iterator[Problem]:
    """Yield every problem of a checkpoint: each file's size, header and data blocks, and tensors nobody holds.

    `progress` is told the number of bytes read since its last call.
    """
    try:
        check_ranks(manifest)
    except HoldfastError as e:
        yield Problem(f"step {manifest.step}", str(e))
        return
    held: dict[str, list[DataFile]] = {}
    whole = True
    seen: set[str] = set()
    for part_name, part in manifest.parts.items():
        files = held.setdefault(part_name, [])
        for entry in part.files:
            first_time = entry.key not in seen
            seen.add(entry.key)
            try:
                file = open_file(store, entry)
            except HoldfastError as e:
                whole = False
                if first_time:
                    yield Problem(entry.key, str(e))
                continue
            files.append(file)
            if first_time:
                yield from _verify_blocks(file, progress)
    if whole:
        yield from unheld_tensors(manifest, held)


def verify_file(
    store: Store, entry: FileEntry, progress: Callable[[int], None] = lambda done: None
) -> Iterator[Problem]:
    """Yield what is wrong with one data file: its size and header, then its blocks. `progress` is as above."""
    try:
        file = open_file(store, entry)
    except HoldfastError as e:
        yield Problem(entry.key, str(e))
        return
    yield from _verify_blocks(file, progress)


def unheld_tensors(manifest: Manifest, held: Mapping[str, Sequence[DataFile]]) -> Iterator[Problem]:
    """Yield the tensors that a checkpoint's values refer to and that its files do not hold, or not all of, and those
    that are not what follows from what they hold. `held` has the files of each part, in listed order."""
    for part_name, part in manifest.parts.items():
        if not is_ranks(part):
            yield from _unheld(manifest, part_name, part, held, Own(), ())
            continue
        try:
            own = read_own(held[part_name])
        except HoldfastError as e:
            yield Problem(part_name, str(e))
            continue
        for name, values in own.values.items():
            there = Part(values.tree, values.kind, [], values.aliases)
            yield from _unheld(manifest, name, there, held, own, held[part_name])


def _unheld(
    manifest: Manifest, part_name: str, part: Part, held: Mapping[str, Sequence[DataFile]],
    own: Own, own_files: Sequence[DataFile],
) -> Iterator[Problem]:  # fmt: skip
    try:
        names = {part.aliases.get(leaf.name, leaf.name) for leaf in tensor_leaves(part.values(part_name))}
    except HoldfastError as e:
        yield Problem(part_name, str(e))
        return
    derived = manifest.derived
    by_key = {file.entry.key: file for files in held.values() for file in files}
    for name in sorted(names):
        try:
            if name in derived:
                DerivedTensor.of(manifest, name, derived[name], lambda entry: by_key[entry.key]).read()
                continue
            if name in own.names:
                find(own_files, name, name)
                continue
            owner = manifest.part_of(name)
            find(held[owner], name_in_file(owner, name), name)
        except HoldfastError as e:
            yield Problem(name, str(e))


def _verify_blocks(file: DataFile, progress: Callable[[int], None]) -> Iterator[Problem]:
    """Yield what is wrong with a file's blocks, in their order; some are read while others are checked."""
    stretches = list(_stretches(file))
    room = max((end - first for _, first, end in stretches), default=0)
    free: SimpleQueue[memoryview] = SimpleQueue()
    for _ in range(min(THREADS, len(stretches))):
        free.put(map_pages(room))

    def verify(stretch: tuple[range, int, int]) -> list[int | Problem]:
        memory = free.get()
        try:
            return list(_check(file, stretch, memory))
        finally:
            free.put(memory)

    with Workers(THREADS, "holdfast-verify") as pool:
        for found in itertools.chain.from_iterable(pool.map(verify, stretches)):
            if isinstance(found, Problem):
                yield found
            else:
                progress(found)


def _stretches(file: DataFile) -> Iterator[tuple[range, int, int]]:
    """Yield the blocks that are read at once, and from where to where in the file."""
    blocks = file.header.blocks
    begin = 0
    for index in range(len(blocks)):
        if index + 1 == len(blocks) or blocks[index + 1].end - blocks[begin].start > STRETCH_BYTES:
            yield range(begin, index + 1), *file.pages_of(blocks[begin].start, blocks[index].end)
            begin = index + 1


def _check(file: DataFile, stretch: tuple[range, int, int], memory: memoryview) -> Iterator[int | Problem]:
    """Yield the size of each block that is right, and what is wrong with each other."""
    indices, first, end = stretch
    try:
        file.read(first, memory[: end - first])
        whole = True
    except HoldfastError:  # which of the blocks is it?
        whole = False
    for index in indices:
        block = file.header.blocks[index]
        start = file.header.data_start + block.start - first
        try:
            if whole:
                file.check(index, memory[start : start + block.end - block.start])
            else:
                file.read_block_into(index, memory)
            yield block.end - block.start
        except HoldfastError as e:  # a byte that cannot be read is as bad as one that is wrong
            yield Problem(file.entry.key, str(e))
