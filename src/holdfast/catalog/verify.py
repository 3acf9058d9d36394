"""Read everything a checkpoint stands on and say what is wrong, by name."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from queue import SimpleQueue

from holdfast.catalog.content import DataFile, open_file
from holdfast.core.errors import HoldfastError
from holdfast.core.memory import map_pages
from holdfast.core.names import name_in_file
from holdfast.format.manifest import FileEntry, Manifest
from holdfast.format.values import tensor_leaves
from holdfast.stores import Store

__all__ = ["Problem", "unheld_tensors", "verify_file", "verify_manifest"]

THREADS = 3


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
    held: dict[str, set[str]] = {}
    whole = True
    seen: set[str] = set()
    for part_name, part in manifest.parts.items():
        names = held.setdefault(part_name, set())
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
            names.update(file.by_name)
            if first_time:
                yield from _verify_blocks(file, progress)
    if whole:
        for name in unheld_tensors(manifest, held):
            yield Problem(name, f"{name}: no listed data file holds this tensor")


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


def unheld_tensors(manifest: Manifest, held: Mapping[str, Collection[str]]) -> list[str]:
    """Return the tensors that a checkpoint's values refer to and none of its files hold. `held` has the names in the
    files of each part."""
    missing: set[str] = set()
    for part_name, part in manifest.parts.items():
        for leaf in tensor_leaves(part.values(part_name)):
            name = part.aliases.get(leaf.name, leaf.name)
            owner = manifest.part_of(name)
            if name_in_file(owner, name) not in held[owner]:
                missing.add(name)
    return sorted(missing)


def _verify_blocks(file: DataFile, progress: Callable[[int], None]) -> Iterator[Problem]:
    """Yield what is wrong with a file's blocks, in their order; some are read while others are checked."""
    spans = [file.pages_of(b.start, b.end) for b in file.header.blocks]
    room = max((end - first for first, end in spans), default=0)
    free: SimpleQueue[memoryview] = SimpleQueue()
    for _ in range(min(THREADS, len(spans))):
        free.put(map_pages(room))

    def verify(index: int) -> int | Problem:
        memory = free.get()
        try:
            return len(file.read_block_into(index, memory))
        except HoldfastError as e:  # a byte that cannot be read is as bad as one that is wrong
            return Problem(file.entry.key, str(e))
        finally:
            free.put(memory)

    with ThreadPoolExecutor(THREADS, thread_name_prefix="holdfast-verify") as pool:
        for found in pool.map(verify, range(len(spans))):
            if isinstance(found, Problem):
                yield found
            else:
                progress(found)
