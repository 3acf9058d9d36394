"""Pack a data file while its bytes go by, in memory for a few chunks, with several threads."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future

from blake3 import blake3

from holdfast.core.buffers import Buffer
from holdfast.core.workers import Workers
from holdfast.format.datafile import DataHeader, encode_header
from holdfast.format.packed import (
    CHUNK_DIGEST_BYTES,
    Chunk,
    Kind,
    Pack,
    cut_chunks,
    encode_tail,
    tail_bytes,
)
from holdfast.format.planes import split

__all__ = ["Packing"]

_Done = tuple[Chunk, list[Buffer]]


class Packing:
    """One file on its way, to the key that `catalog.keys.packed_key` gives. `most_bytes` is what it may come to."""

    def __init__(self, header: DataHeader, pack: Pack) -> None:
        self._raw_header = encode_header(header.tensors, header.digests)
        self._cuts = list(cut_chunks(header))
        self._pack = pack
        self._chunks: list[Chunk] = []
        self._tail_bytes = tail_bytes(len(self._raw_header), [kind.width for _, kind in self._cuts])
        self.most_bytes = sum(size for size, _ in self._cuts) + self._tail_bytes

    def body(self, pieces: Iterable[memoryview]) -> Generator[Buffer, None, None]:
        """Yield the packed file, given the plain file's data region in pieces of any size, verified already.

        A piece must stay as it is: chunks of it may be at work while the next one is asked for.

        Raises:
            ValueError: the pieces are not as long together as the header says.
        """
        chunks = _cut(pieces, self._cuts)
        packed = self._threaded(chunks) if self._pack.threads > 1 else (self._one(c, k) for c, k in chunks)
        for chunk, planes in packed:
            self._chunks.append(chunk)
            yield from planes
        yield encode_tail(self._raw_header, self._chunks)

    @property
    def packed_bytes(self) -> int:
        """The size of the packed file, once the whole body was taken."""
        return self._tail_bytes + sum(c.stored_bytes for c in self._chunks)

    def _one(self, data: memoryview, kind: Kind) -> _Done:
        frames, planes = split(data, kind, self._pack.level)
        hasher = blake3()
        for plane in planes:
            hasher.update(plane)
        return Chunk(len(data), kind, frames, hasher.digest(CHUNK_DIGEST_BYTES)), planes

    def _threaded(self, chunks: Iterable[tuple[memoryview, Kind]]) -> Iterator[_Done]:
        """Pack a few chunks ahead of the one that is asked for."""
        pool = Workers(self._pack.threads, "holdfast-pack")
        ahead: deque[Future[_Done]] = deque()
        try:
            for data, kind in chunks:
                ahead.append(pool.submit(self._one, data, kind))
                if len(ahead) > 2 * self._pack.threads:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        finally:  # also when the store gives up
            pool.close(cancel=True)


def _cut(pieces: Iterable[memoryview], cuts: Iterable[tuple[int, Kind]]) -> Iterator[tuple[memoryview, Kind]]:
    """Yield the chunks that some pieces hold; one that lies in a single piece is not copied."""
    rest = iter(pieces)
    piece = memoryview(b"")
    for size, kind in cuts:
        while not len(piece):
            piece = _next(rest)
        if len(piece) >= size:
            yield piece[:size], kind
            piece = piece[size:]
            continue
        whole = bytearray(size)
        done = 0
        while done < size:
            while not len(piece):
                piece = _next(rest)
            taken = min(size - done, len(piece))
            whole[done : done + taken] = piece[:taken]
            piece, done = piece[taken:], done + taken
        yield memoryview(whole), kind
    if len(piece) or any(len(p) for p in rest):
        raise ValueError("there is more data than the header says")


def _next(pieces: Iterator[memoryview]) -> memoryview:
    found = next(pieces, None)
    if found is None:
        raise ValueError("there is less data than the header says")
    return found
