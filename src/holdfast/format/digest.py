"""Digest blocks: how the data region of a file is cut so that any part of it can be verified alone.

The cut is a pure function of the tensors' sizes and the file's version, so it is never stored: a tensor of at least
64 KiB has blocks of its own, aligned to its rows and at most 4 MiB (64 MiB in version 1); runs of smaller tensors share
a block of at most 1 MiB.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from blake3 import blake3

from holdfast.core.buffers import Buffer

__all__ = ["BLOCK_BYTES", "DIGEST_BYTES", "OWN_BLOCK_BYTES", "Block", "BlockDigests", "cut_blocks", "digest"]

DIGEST_BYTES = 32
BLOCK_BYTES = {1: 64 << 20, 2: 4 << 20}  # the largest block, by the version of the file
OWN_BLOCK_BYTES = 64 << 10
GROUP_BYTES = 1 << 20
_THREADED_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Block:
    """Bytes `start` to `end` of a data region, covering (parts of) tensors `first` to `last` in data order."""

    start: int
    end: int
    first: int
    last: int


_forked = False


def _note_fork() -> None:
    """BLAKE3's threads are not there in a forked child (a loader's worker, say): waiting for them would never end."""
    global _forked
    _forked = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_note_fork)


def digest(data: Buffer) -> bytes:
    """Return the 32-byte BLAKE3 digest of `data`."""
    threads = blake3.AUTO if len(data) >= _THREADED_BYTES and not _forked else 1
    return blake3(data, max_threads=threads).digest()


def _own_blocks(index: int, start: int, nbytes: int, shape: Sequence[int], largest: int) -> Iterator[Block]:
    rows = shape[0] if shape else 1
    row_bytes = max(1, nbytes // max(1, rows))
    step = largest // row_bytes * row_bytes if row_bytes <= largest else largest
    for offset in range(0, nbytes, step):
        yield Block(start + offset, start + min(nbytes, offset + step), index, index)


def cut_blocks(tensors: Sequence[tuple[int, Sequence[int]]], version: int) -> list[Block]:
    """Return the blocks of a data region from each tensor's (size in bytes, shape), in data order.

    Empty tensors belong to no block. The blocks cover the region without holes, in order.
    """
    blocks: list[Block] = []
    position = 0
    group_start, group_first, group_last = 0, -1, -1

    def close_group() -> None:
        nonlocal group_first
        if group_first >= 0:
            blocks.append(Block(group_start, position, group_first, group_last))
        group_first = -1

    for index, (nbytes, shape) in enumerate(tensors):
        if nbytes == 0:
            continue
        if nbytes >= OWN_BLOCK_BYTES:
            close_group()
            blocks.extend(_own_blocks(index, position, nbytes, shape, BLOCK_BYTES[version]))
        else:
            if group_first >= 0 and position + nbytes - group_start > GROUP_BYTES:
                close_group()
            if group_first < 0:
                group_start, group_first = position, index
            group_last = index
        position += nbytes
    close_group()
    return blocks


class BlockDigests:
    """Takes the digests of a data region's blocks while its bytes go by, in order and in pieces of any size.

    `given` are digests that are known already, by the index of their block.
    """

    def __init__(self, blocks: Sequence[Block], given: Mapping[int, bytes]) -> None:
        self.digests: list[bytes] = []
        self._blocks = blocks
        self._given = given
        self._position = 0
        self._hasher = blake3()

    def update(self, data: memoryview) -> None:
        """Take the next bytes."""
        while len(data):
            index = len(self.digests)
            end = self._blocks[index].end
            size = min(len(data), end - self._position)
            if index not in self._given:
                self._hasher.update(data[:size])
            self._position += size
            data = data[size:]
            if self._position == end:
                self.digests.append(self._given.get(index) or self._hasher.digest())
                self._hasher.reset()
