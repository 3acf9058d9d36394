"""The tensors of a checkpoint block by block: verified bytes, at most one block of 64 MiB at a time."""

from __future__ import annotations

from collections.abc import Iterator

from holdfast.catalog.content import DataFile
from holdfast.restoring.reader import Reader

__all__ = ["Blocks", "Print"]

Print = tuple[tuple[bytes, int], ...]


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
        file, tensor = self._reader.locate(name)
        for index in file.blocks_of(tensor.start, tensor.end):
            block = file.header.blocks[index]
            start, end = max(tensor.start, block.start), min(tensor.end, block.end)
            piece = self._block(file, index)[start - block.start : end - block.start]
            yield piece
            piece.release()  # or the reader's last piece keeps its block while the next is read

    def fingerprint(self, name: str) -> Print:
        """Return what tells a tensor's bytes from others without reading them.

        That is the digest of each block that holds them, and where in it they begin. Two tensors of one
        size with equal fingerprints are equal; with unequal ones they may still be equal.
        """
        file, tensor = self._reader.locate(name)
        covering = file.blocks_of(tensor.start, tensor.end)
        header = file.header
        return tuple((header.digests[i], max(0, tensor.start - header.blocks[i].start)) for i in covering)

    def order(self, name: str) -> tuple[str, int]:
        """Return a key that sorts tensors as they lie in the files."""
        file, tensor = self._reader.locate(name)
        return file.entry.key, tensor.start

    def _block(self, file: DataFile, index: int) -> memoryview:
        if self._held is None or self._held[:2] != (file.entry.key, index):
            self._held = None  # let the block before go first
            self._held = (file.entry.key, index, file.read_block(index))
        return self._held[2]
