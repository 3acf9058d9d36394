"""The bytes behind a manifest: headers and tensors, read and verified."""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Sequence

from holdfast.catalog.keys import packed_key
from holdfast.catalog.unpacking import Unpacking, open_packed
from holdfast.core.errors import DigestMismatch, MissingObject, NotFound, Truncated
from holdfast.core.memory import PAGE, map_pages, page_aligned
from holdfast.format.datafile import DataHeader, StoredTensor, decode_header
from holdfast.format.digest import Block, digest
from holdfast.format.manifest import FileEntry
from holdfast.stores import Store

__all__ = ["DataFile", "check_block", "describe_block", "open_file"]


class DataFile:
    """A data file of a checkpoint with its verified header.

    `packed` decodes it where the store holds it packed; `key` is that of the object the store holds.
    """

    def __init__(
        self, store: Store, entry: FileEntry, header: DataHeader, packed: Unpacking | None = None
    ) -> None:
        self.store = store
        self.entry = entry
        self.header = header
        self.packed = packed
        self.key = entry.key if packed is None else packed.key
        self.by_name = {t.name: i for i, t in enumerate(header.tensors)}
        self._starts = [b.start for b in header.blocks]

    def blocks_of(self, start: int, end: int) -> range:
        """Return the indices of the blocks that cover bytes `start` to `end` of the data region."""
        if start >= end:
            return range(0)
        first = bisect.bisect_right(self._starts, start) - 1
        last = bisect.bisect_left(self._starts, end)
        return range(first, last)

    def blocks_that_hold(self, indices: Iterable[int]) -> list[int]:
        """Return the indices of the blocks that some tensors, given by index in rising order, lie in."""
        blocks, found, at = self.header.blocks, list[int](), 0
        last = -1  # tensor of the newest block found: those before it lie in that block alone
        for index in indices:
            if index < last:
                continue
            while at < len(blocks) and blocks[at].last < index:
                at += 1
            while at < len(blocks) and blocks[at].first <= index:
                if not found or found[-1] < at:
                    found.append(at)
                    last = blocks[at].last
                if blocks[at].last > index:
                    break
                at += 1
        return found

    def pages_of(self, start: int, end: int) -> tuple[int, int]:
        """Return (first byte, end byte) in the file of the whole pages around bytes `start` to `end` of the data
        region; what is read so into memory that begins at a page comes from the disk without a copy. Of a packed file
        they are these bytes alone: nothing is decoded that nobody asked for."""
        first, last = self.header.data_start + start, self.header.data_start + end
        if self.packed is not None:
            return first, last
        return first // PAGE * PAGE, min(page_aligned(last), self.entry.size)

    def read(self, position: int, target: memoryview) -> None:
        """Fill `target` with bytes from `position` in the file on, unverified."""
        try:
            if self.packed is not None:
                self.packed.read_into(position, target)
            else:
                self.store.read_into(self.key, position, target)
        except NotFound as e:
            raise MissingObject(f"{self.key}: the data file is gone") from e

    def check(self, index: int, data: memoryview) -> None:
        """Raise DigestMismatch when the bytes of block `index` are not what was committed."""
        check_block(self.header, index, data, self.key)

    def read_block(self, index: int) -> memoryview:
        """Return the bytes of block `index`, verified."""
        block = self.header.blocks[index]
        first, end = self.pages_of(block.start, block.end)
        return self.read_block_into(index, map_pages(end - first))

    def read_block_into(self, index: int, memory: memoryview) -> memoryview:
        """Return the bytes of block `index`, verified, in `memory`, which must be large enough for its pages."""
        block = self.header.blocks[index]
        first, end = self.pages_of(block.start, block.end)
        self.read(first, memory[: end - first])
        offset = self.header.data_start + block.start - first
        data = memory[offset : offset + block.end - block.start]
        self.check(index, data)
        return data


def open_file(store: Store, entry: FileEntry) -> DataFile:
    """Return a data file, plain or packed, with its header read and verified.

    Raises:
        MissingObject, Truncated, DigestMismatch, InvalidFormat: it is not what the manifest says.
    """
    packed: Unpacking | None = None
    try:
        size = store.info(entry.key).size
        if size != entry.size:
            raise Truncated(f"{entry.key}: has {size} bytes; {entry.size} were committed")
        raw = store.read(entry.key, 0, entry.header_size)
    except NotFound as e:
        packed = open_packed(store, packed_key(entry.key), (entry.size, entry.header_size))
        if packed is None:
            raise MissingObject(f"{entry.key}: the data file is gone") from e
        raw = packed.tail.raw_header
    key = entry.key if packed is None else packed.key
    if digest(raw).hex() != entry.header_digest:
        raise DigestMismatch(
            f"{key}: its header does not match the manifest's digest, so at least one byte changed"
        )
    header = decode_header(raw, key)
    if header.file_bytes != entry.size:
        raise Truncated(f"{key}: its header describes {header.file_bytes} bytes; {entry.size} were committed")
    return DataFile(store, entry, header, packed)


def describe_block(tensors: Sequence[StoredTensor], block: Block) -> str:
    """Return which tensors a block holds, for a message."""
    first, last = tensors[block.first].name, tensors[block.last].name
    if block.first == block.last:
        return f"tensor {first!r}"
    return f"{block.last - block.first + 1} small tensors, {first!r} to {last!r}"


def check_block(header: DataHeader, index: int, data: memoryview, key: str) -> None:
    """Raise DigestMismatch, naming file and tensors, when `data` is not block `index`."""
    block = header.blocks[index]
    if digest(data) != header.digests[index]:
        start, end = header.data_start + block.start, header.data_start + block.end
        raise DigestMismatch(
            f"{key}: bytes {start} to {end} do not match their digest, so at least one byte changed in "
            f"{describe_block(header.tensors, block)}"
        )
