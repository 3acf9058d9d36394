"""Read a packed data file as if it were plain: any range of it, decoding only the chunks it lies in."""

from __future__ import annotations

from blake3 import blake3

from holdfast.core.errors import DigestMismatch, InvalidFormat, NotFound, Truncated
from holdfast.format.packed import (
    CHUNK_DIGEST_BYTES,
    PackedTail,
    declared_tail_bytes,
    decode_tail,
)
from holdfast.stores import Store

__all__ = ["Unpacking", "open_packed"]

FIRST_READ_BYTES = 64 << 10  # most tails are smaller, and so come with the first request
AT_ONCE_BYTES = 8 << 20  # of what is stored, read before it is decoded


class Unpacking:
    """A packed data file whose tail has been verified."""

    def __init__(self, store: Store, key: str, tail: PackedTail) -> None:
        self.store = store
        self.key = key
        self.tail = tail

    def read_into(self, position: int, target: memoryview) -> None:
        """Fill `target` with bytes of the plain file from `position` on, which must lie behind its header.

        Raises:
            NotFound, Truncated: the object is gone or cut off.
            DigestMismatch, InvalidFormat: a chunk is not what was stored.
        """
        tail, end = self.tail, position + len(target)
        wanted = tail.chunks_of(position, end)
        if len(target) and not len(tail.raw_header) <= position < end <= tail.plain_bytes:
            raise Truncated(f"{self.key}: holds {tail.plain_bytes} bytes; {position} to {end} were asked for")
        first = wanted.start
        while first < wanted.stop:
            start, after = tail.stored_starts[first], first + 1
            while after < wanted.stop and tail.stored_starts[after + 1] - start <= AT_ONCE_BYTES:
                after += 1
            stored = memoryview(bytearray(tail.stored_starts[after] - start))
            self.store.read_into(self.key, start, stored)
            for index in range(first, after):
                self._place(index, stored[tail.stored_starts[index] - start :], position, target)
            first = after

    def _place(self, index: int, stored: memoryview, position: int, target: memoryview) -> None:
        """Decode a chunk, whose bytes `stored` begins with, to where it belongs in what is read from `position` on."""
        from holdfast.format.planes import merge

        chunk, begins = self.tail.chunks[index], self.tail.plain_starts[index]
        stored = stored[: chunk.stored_bytes]
        if blake3(stored).digest(CHUNK_DIGEST_BYTES) != chunk.digest:
            at = self.tail.stored_starts[index]
            raise DigestMismatch(
                f"{self.key}: bytes {at} to {at + len(stored)} do not match their digest, so at least one byte changed"
            )
        skipped = max(0, position - begins)
        at = max(0, begins - position)
        size = min(chunk.size - skipped, len(target) - at)
        whole = size == chunk.size
        memory = target[at : at + size] if whole else memoryview(bytearray(chunk.size))
        try:
            merge(stored, chunk.kind, chunk.frames, memory)
        except InvalidFormat as e:
            raise InvalidFormat(f"{self.key}: chunk {index}: {e}") from e
        if not whole:
            target[at : at + size] = memory[skipped : skipped + size]


def open_packed(store: Store, key: str, expected: tuple[int, int] | None = None) -> Unpacking | None:
    """Return a packed data file with its tail read and verified, None where there is none.

    `expected` are the sizes of the plain file and its header that a manifest tells.

    Raises:
        Truncated, DigestMismatch, InvalidFormat: it is not what a writer stored.
    """
    try:
        size = store.info(key).size
        raw = store.read(key, max(0, size - FIRST_READ_BYTES), size)
        needed = declared_tail_bytes(raw, key, expected)
        if needed > size:
            raise Truncated(f"{key}: has {size} bytes; its tail alone claims {needed}")
        raw = raw[len(raw) - needed :] if needed <= len(raw) else store.read(key, size - needed, size)
    except NotFound:
        return None
    tail = decode_tail(raw, key)
    if tail.packed_bytes != size:
        raise Truncated(f"{key}: has {size} bytes; its index describes {tail.packed_bytes}")
    return Unpacking(store, key, tail)
