"""Tensors that are stored nowhere, for they follow from another one: made again from it, and verified."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from holdfast.catalog.content import DataFile
from holdfast.catalog.pieces import Found, Piece, find
from holdfast.core.buffers import Buffer
from holdfast.core.dtypes import DTYPES
from holdfast.core.errors import DigestMismatch, InvalidFormat
from holdfast.core.names import name_in_file
from holdfast.format.digest import digest
from holdfast.format.manifest import DERIVED_FROM, Derived, FileEntry, Manifest
from holdfast.format.rounding import rounded

__all__ = ["DerivedTensor"]


@dataclass(frozen=True, slots=True)
class DerivedTensor:
    """A tensor that follows from a stored one, whose bytes lie in `pieces`, in their order."""

    name: str
    entry: Derived
    pieces: tuple[Piece, ...]

    @classmethod
    def of(
        cls, manifest: Manifest, name: str, entry: Derived, open_file: Callable[[FileEntry], DataFile]
    ) -> DerivedTensor:
        """Return a tensor of a checkpoint whose source is found in its files.

        Raises:
            MissingObject: the source is in no file.
            InvalidFormat: it is not what such a tensor can follow from.
        """
        part = manifest.part_of(entry.source)
        files = map(open_file, manifest.parts[part].files)
        return cls._from(name, entry, find(files, name_in_file(part, entry.source), entry.source))

    @classmethod
    def _from(cls, name: str, entry: Derived, found: Found) -> DerivedTensor:
        source = found.tensor
        if (source.dtype, source.whole_shape) != (DERIVED_FROM, entry.shape):
            raise InvalidFormat(
                f"{name}: follows from {entry.source}, which is {source.dtype} of {source.whole_shape!s:.80}; "
                f"expected {DERIVED_FROM} of {entry.shape!s:.80}"
            )
        return cls(name, entry, found.pieces)

    @property
    def source_bytes(self) -> int:
        """The size of the source."""
        return math.prod(self.entry.shape) * DTYPES[DERIVED_FROM].itemsize

    def make(self, source: Buffer) -> memoryview:
        """Return the tensor's bytes, given those of its source. Raises DigestMismatch when they are not those that were
        saved."""
        made = rounded(source)
        if digest(made).hex() != self.entry.digest:
            raise DigestMismatch(
                f"{self.name}: what {self.entry.source} rounds to does not match its digest, so it is not the tensor "
                "that was saved"
            )
        return made

    def read(self) -> memoryview:
        """Return the tensor's bytes, from its source as it is stored, every byte verified. Raises IntegrityError."""
        return self.make(b"".join(self._source()))

    def _source(self) -> Iterator[memoryview]:
        for piece in self.pieces:
            end = piece.start + piece.size
            for index in piece.file.blocks_of(piece.start, end):
                block = piece.file.header.blocks[index]
                data = piece.file.read_block(index)
                yield data[max(piece.start - block.start, 0) : min(end, block.end) - block.start]
