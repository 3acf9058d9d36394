"""The tensors of a checkpoint block by block: verified bytes, at most one block, of at most 64 MiB, at a time."""

from __future__ import annotations

from collections.abc import Iterator

from holdfast.catalog.content import DataFile
from holdfast.format.digest import cut_blocks
from holdfast.restoring.reader import Reader

__all__ = ["Blocks", "Print", "abreast"]

NEWEST = 2  # of the versions of data files: how a tensor is cut today

Print = tuple[tuple[bytes, int, int], ...]


class Blocks:
    """Streams tensors of one checkpoint; read them in data order, as small ones share blocks."""

    def __init__(self, reader: Reader) -> None:
        self._reader = reader
        self._held: tuple[str, int, memoryview] | None = None

    def pieces(self, name: str) -> Iterator[memoryview]:
        """Yield a tensor's bytes in order, whole elements at a time, verified; each is valid until the next.

        Raises:
            KeyError: there is no such tensor.
            IntegrityError: bytes are not what was committed.
        """
        derived = self._reader.derived(name)
        if derived is not None:
            data, spec = derived.read(), self._reader.spec(name)
            for block in cut_blocks([(spec.nbytes, spec.shape)], NEWEST):
                yield data[block.start : block.end]
            return
        for file, index, start, end in self._covering(name):
            piece = self._block(file, index)[start:end]
            yield piece
            piece.release()  # or the reader's last piece keeps its block while the next is read

    def fingerprint(self, name: str) -> Print:
        """Return what tells a tensor's bytes from others without reading them.

        That is the digest of each block that holds them, and which of its bytes they are. Two tensors of one
        size with equal fingerprints are equal; with unequal ones they may still be equal.
        """
        derived = self._reader.derived(name)
        if derived is not None:
            return ((bytes.fromhex(derived.entry.digest), 0, self._reader.spec(name).nbytes),)
        return tuple((file.header.digests[i], start, end) for file, i, start, end in self._covering(name))

    def _covering(self, name: str) -> Iterator[tuple[DataFile, int, int, int]]:
        """Yield the blocks that hold a tensor's bytes, in the order of these, and from where to where in them."""
        for piece in self._reader.pieces(name):
            for index in piece.file.blocks_of(piece.start, piece.start + piece.size):
                block = piece.file.header.blocks[index]
                start, end = max(piece.start, block.start), min(piece.start + piece.size, block.end)
                yield piece.file, index, start - block.start, end - block.start

    def order(self, name: str) -> tuple[str, int]:
        """Return a key that sorts tensors as they lie in the files."""
        return next(((p.file.entry.key, p.start) for p in self._reader.pieces(name)), ("", 0))

    def _block(self, file: DataFile, index: int) -> memoryview:
        if self._held is None or self._held[:2] != (file.entry.key, index):
            self._held = None  # let the block before go first
            self._held = (file.entry.key, index, file.read_block(index))
        return self._held[2]


def abreast(
    one: Iterator[memoryview], other: Iterator[memoryview]
) -> Iterator[tuple[memoryview, memoryview]]:
    """Yield the bytes of two tensors of one size side by side, whole elements at a time; each is valid until the next.

    Other ranks, or another version of data files, cut a tensor at other places.
    """
    a, b, i, j = next(one, None), next(other, None), 0, 0
    while a is not None and b is not None:
        size = min(len(a) - i, len(b) - j)
        with a[i : i + size] as left, b[j : j + size] as right:
            yield left, right
        i, j = i + size, j + size
        if i == len(a):
            a, i = next(one, None), 0
        if j == len(b):
            b, j = next(other, None), 0
