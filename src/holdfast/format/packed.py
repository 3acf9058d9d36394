"""Packed data files: a data file made smaller for the way to a mirror, from which any part can be read alone.

The chunks come first; behind them the tail holds the plain file's own header as it is and an index of the chunks, and a
digest seals it. So a file goes out in one stroke, whatever the store. Each chunk is at most 1 MiB of one digest block,
cut into its elements' bytes (`format.planes`): those that compress are standard zstd frames, the others lie as they
are. The packed file of some bytes is not the only one there can be; what counts is what it decodes to, and every digest
of the plain file is of that.
"""

from __future__ import annotations

import struct
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

from blake3 import blake3

from holdfast.core.dtypes import DTYPES
from holdfast.core.errors import DigestMismatch, InvalidFormat, PolicyError, Truncated
from holdfast.format.datafile import DataHeader
from holdfast.format.digest import DIGEST_BYTES

__all__ = [
    "CHUNK_BYTES",
    "CHUNK_DIGEST_BYTES",
    "END_BYTES",
    "Chunk",
    "Kind",
    "Pack",
    "PackedTail",
    "cut_chunks",
    "declared_tail_bytes",
    "decode_tail",
    "encode_tail",
    "tail_bytes",
]

MAGIC = b"HFPACK1\n"
CHUNK_BYTES = 1 << 20
CHUNK_DIGEST_BYTES = 16
MAX_TAIL_BYTES = 2 << 30
_END = struct.Struct(
    "<QQQQ8s"
)  # sizes of the plain header, the plain file, the tail; number of chunks; magic
_CHUNK = struct.Struct("<IBB")  # size of the chunk decoded, bytes of an element, whether it is turned
END_BYTES = _END.size + DIGEST_BYTES
_WIDTHS = (1, 2, 4, 8)
_FLOATS = ("F16", "BF16", "F32", "F64", "C64")


@dataclass(frozen=True, slots=True)
class Pack:
    """How files are packed: `level` is that of zstd for what is no float, `threads` how many work at once.

    Raises:
        PolicyError: the level is none of zstd's, or there are no threads.
    """

    level: int = 3
    threads: int = 2

    def __post_init__(self) -> None:
        if not 1 <= self.level <= 22:
            raise PolicyError(f"zstd has no level {self.level}; choose 1 to 22 (3 is its own default)")
        if not 1 <= self.threads <= 64:
            raise PolicyError(f"cannot pack with {self.threads} threads; choose 1 to 64")


@dataclass(frozen=True, slots=True)
class Kind:
    """What the elements of a chunk are like: `width` bytes each, `turned` left by one bit (floats: the sign joins the
    mantissa, so the highest byte is exponent alone)."""

    width: int
    turned: bool


@dataclass(frozen=True, slots=True)
class Chunk:
    """A chunk in the index: its size decoded, its kind, and for each byte of an element, the lowest first, the size of
    its plane's zstd frame, 0 where the plane is raw. `digest` is of the chunk as it is stored."""

    size: int
    kind: Kind
    frames: tuple[int, ...]
    digest: bytes

    @property
    def stored_bytes(self) -> int:
        plane = self.size // self.kind.width
        return sum(frame or plane for frame in self.frames)


class PackedTail:
    """A decoded tail: the plain file's header as bytes, and where each chunk lies in the plain and the packed file."""

    def __init__(self, raw_header: bytes, chunks: Sequence[Chunk]) -> None:
        self.raw_header = raw_header
        self.chunks = chunks
        self.size = tail_bytes(len(raw_header), [c.kind.width for c in chunks])
        self.plain_starts = list(accumulate((c.size for c in chunks), initial=len(raw_header)))
        self.stored_starts = list(accumulate((c.stored_bytes for c in chunks), initial=0))

    @property
    def plain_bytes(self) -> int:
        return self.plain_starts[-1]

    @property
    def packed_bytes(self) -> int:
        return self.stored_starts[-1] + self.size

    def chunks_of(self, start: int, end: int) -> range:
        """Return the indices of the chunks that cover bytes `start` to `end` of the plain file, behind its header."""
        if start >= end:
            return range(0)
        return range(bisect_right(self.plain_starts, start) - 1, bisect_right(self.plain_starts, end - 1))


def cut_chunks(header: DataHeader) -> Iterator[tuple[int, Kind]]:
    """Yield the size and kind of each chunk that a writer makes of a file, in order: runs of tensors of one kind in one
    digest block, at most 1 MiB each."""
    for block in header.blocks:
        runs: list[tuple[int, Kind]] = []
        for t in header.tensors[block.first : block.last + 1]:
            size = min(t.end, block.end) - max(t.start, block.start)
            kind = _KINDS[t.dtype]
            if runs and runs[-1][1] == kind:
                runs[-1] = (runs[-1][0] + size, kind)
            elif size:
                runs.append((size, kind))
        for size, kind in runs:
            for start in range(0, size, CHUNK_BYTES):
                yield min(size - start, CHUNK_BYTES), kind


def _kind(dtype: str) -> Kind:
    d = DTYPES[dtype]
    pairs = 2 if d.carrier == "C64" else d.carrier_per_element
    return Kind(d.itemsize // pairs, d.carrier in _FLOATS)


_KINDS = {name: _kind(name) for name in DTYPES}


def tail_bytes(header_bytes: int, widths: Sequence[int]) -> int:
    """Return the size of a tail, given that of the plain header and the width of each chunk's elements."""
    index = sum(_CHUNK.size + 4 * width + CHUNK_DIGEST_BYTES for width in widths)
    return header_bytes + index + END_BYTES


def encode_tail(raw_header: bytes, chunks: Sequence[Chunk]) -> bytes:
    """Return the tail of a packed file."""
    size = tail_bytes(len(raw_header), [c.kind.width for c in chunks])
    plain = len(raw_header) + sum(c.size for c in chunks)
    parts = [raw_header]
    for c in chunks:
        parts.append(_CHUNK.pack(c.size, c.kind.width, c.kind.turned))
        parts.append(struct.pack(f"<{c.kind.width}I", *c.frames))
        parts.append(c.digest)
    parts.append(_END.pack(len(raw_header), plain, size, len(chunks), MAGIC))
    body = b"".join(parts)
    return body + blake3(body).digest()


def declared_tail_bytes(end: bytes, name: str, expected: tuple[int, int] | None = None) -> int:
    """Return how long the tail is, from the file's last `END_BYTES` bytes.

    `expected` are the sizes of the plain file and of its header, where something else says what they are.

    Raises:
        InvalidFormat, Truncated: it is no packed file, of other sizes, or claims more than such a file can have.
    """
    if len(end) < END_BYTES:
        raise Truncated(f"{name}: is {len(end)} bytes long; expected at least {END_BYTES}")
    header_size, plain, size, many, magic = _END.unpack_from(end, len(end) - END_BYTES)
    if magic != MAGIC:
        raise InvalidFormat(f"{name}: does not end as a packed data file of version 1; it may be cut off")
    if expected is not None and expected != (plain, header_size):
        raise Truncated(
            f"{name}: holds {plain} bytes with a header of {header_size}; {expected[0]} with one of {expected[1]} "
            "were committed"
        )
    least = tail_bytes(header_size, ()) + many * (_CHUNK.size + 4 + CHUNK_DIGEST_BYTES)
    # A chunk ends where the header begins another tensor or a MiB is full: so what is parsed is bounded by both sizes.
    if not least <= size <= MAX_TAIL_BYTES or many > header_size + plain // CHUNK_BYTES:
        raise InvalidFormat(
            f"{name}: claims {many} chunks and a tail of {size} bytes; expected {least} bytes to 2 GiB, and no more "
            f"chunks than {header_size + plain // CHUNK_BYTES}"
        )
    return int(size)


def decode_tail(raw: bytes, name: str) -> PackedTail:
    """Return what a tail says, checked; `name` is the file for the messages.

    Raises:
        InvalidFormat, Truncated, DigestMismatch: it is not a tail that is whole and within the format's bounds.
    """
    size = declared_tail_bytes(raw, name)
    if len(raw) != size:
        raise Truncated(f"{name}: its tail has {len(raw)} bytes; expected {size}")
    if blake3(raw[:-DIGEST_BYTES]).digest() != raw[-DIGEST_BYTES:]:
        raise DigestMismatch(f"{name}: its tail does not match its digest, so at least one byte changed")
    position, plain, _, many, _ = _END.unpack_from(raw, size - END_BYTES)
    end = size - END_BYTES
    raw_header = raw[:position]
    chunks: list[Chunk] = []
    for _ in range(many):
        chunk, position = _decode_chunk(raw, position, end, name)
        chunks.append(chunk)
    tail = PackedTail(raw_header, chunks)
    if position != end or tail.plain_bytes != plain:
        raise InvalidFormat(
            f"{name}: its index ends at byte {position} of its tail and describes {tail.plain_bytes} bytes; "
            f"expected {end} and {plain}"
        )
    return tail


def _decode_chunk(raw: bytes, position: int, end: int, name: str) -> tuple[Chunk, int]:
    """Return the entry of the index at a position, and where the next one is."""
    if position + _CHUNK.size > end:
        raise InvalidFormat(f"{name}: its index has fewer chunks than it claims")
    size, width, turned = _CHUNK.unpack_from(raw, position)
    at = position + _CHUNK.size
    after = at + 4 * width + CHUNK_DIGEST_BYTES
    if width not in _WIDTHS or turned > (width > 1) or after > end:
        raise InvalidFormat(f"{name}: its index is malformed at byte {position}")
    if not 0 < size <= CHUNK_BYTES or size % width:
        raise InvalidFormat(f"{name}: has a chunk of {size} bytes; expected whole elements, at most 1 MiB")
    frames = struct.unpack_from(f"<{width}I", raw, at)
    if max(frames) >= size // width:  # before anything is decompressed: a frame is smaller than what it holds
        raise InvalidFormat(f"{name}: has a frame of {max(frames)} bytes for a plane of {size // width}")
    return Chunk(size, Kind(width, bool(turned)), frames, raw[after - CHUNK_DIGEST_BYTES : after]), after
