"""A packed file whose first bytes are known last, made ready for a store that takes bytes from the front."""

from __future__ import annotations

import contextlib
import errno
import tempfile
from collections.abc import Iterable, Iterator
from typing import IO

from holdfast.core.buffers import Buffer
from holdfast.core.errors import OutOfSpace

__all__ = ["spooled"]

IN_MEMORY_BYTES = 32 << 20
PIECE_BYTES = 8 << 20


@contextlib.contextmanager
def spooled(pieces: Iterable[Buffer]) -> Iterator[Iterator[bytes]]:
    """Take all pieces, and yield an iterator that gives their bytes again.

    What is more than `IN_MEMORY_BYTES` lies in a temporary file meanwhile, which has no name.

    Raises:
        OutOfSpace: there is no room for it where temporary files go.
    """
    with tempfile.SpooledTemporaryFile(IN_MEMORY_BYTES) as file:
        try:
            for piece in pieces:
                file.write(piece)
        except OSError as e:
            if e.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise
            raise OutOfSpace(
                e.errno,
                f"{tempfile.gettempdir()} has no room for a packed file on its way; set TMPDIR to a larger place",
            ) from e
        file.seek(0)
        yield _again(file)


def _again(file: IO[bytes]) -> Iterator[bytes]:
    while piece := file.read(PIECE_BYTES):
        yield piece
