"""Where the bytes of a tensor lie: all of it in one file, or parts of it in several, of which the first listed has the
last word."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from holdfast.catalog.content import DataFile
from holdfast.core.dtypes import DTYPES
from holdfast.core.errors import InvalidFormat, MissingObject
from holdfast.format.boxes import Run, fill
from holdfast.format.datafile import StoredTensor

__all__ = ["Found", "Piece", "find"]


@dataclass(frozen=True, slots=True)
class Piece:
    """`size` bytes of a tensor, from byte `at` of it, that lie in `file` from byte `start` of the data region on."""

    file: DataFile
    at: int
    start: int
    size: int


@dataclass(frozen=True, slots=True)
class Found:
    """A tensor: what it is, by the first file that holds any of it, and all of its bytes in order."""

    tensor: StoredTensor
    pieces: tuple[Piece, ...]


def find(files: Iterable[DataFile], name: str, path: str) -> Found:
    """Return where the tensor called `name` in these files, in listed order, lies; `path` is its name for messages.

    Files are taken one by one, and only until all of the tensor is found.

    Raises:
        MissingObject: some of it is in no file.
        InvalidFormat: the files do not agree on what it is.
    """
    first: StoredTensor | None = None
    pieces: list[Piece] = []
    gaps: list[tuple[int, int]] = []
    for file in files:
        index = file.by_name.get(name)
        if index is None:
            continue
        t = file.header.tensors[index]
        if first is None:
            first, gaps = t, [(0, _whole_bytes(t))]
        elif (t.dtype, t.whole_shape) != (first.dtype, first.whole_shape):
            raise InvalidFormat(
                f"{file.key}: holds a part of {path} that is {t.dtype} of {t.whole_shape!s:.80}; the files listed "
                f"before it say {first.dtype} of {first.whole_shape!s:.80}"
            )
        used, gaps = fill(gaps, t.runs())
        pieces += [_piece(file, t, run) for run in used]
        if not gaps:
            pieces.sort(key=lambda piece: piece.at)
            return Found(first, tuple(pieces))
    if first is None:
        raise MissingObject(f"{path}: no data file of the checkpoint holds this tensor")
    missing = sum(end - start for start, end in gaps)
    raise MissingObject(
        f"{path}: no data file of the checkpoint holds {missing} of its {_whole_bytes(first)} bytes"
    )


def _piece(file: DataFile, t: StoredTensor, run: Run) -> Piece:
    return Piece(file, run.at, t.start + run.source, run.size)


def _whole_bytes(t: StoredTensor) -> int:
    return t.nbytes if t.box is None else math.prod(t.box[1]) * DTYPES[t.dtype].itemsize
