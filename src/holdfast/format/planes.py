"""Byte planes: all first bytes of a chunk's elements, then all second bytes, and so on, each plane stored as it fits.

The exponents of trained floats take few values and compress to about a third, while mantissas are noise: so a plane is
compressed only where a sample of it shows that it pays. Floats are turned left by one bit before, which moves the sign
from the exponent to the mantissa. Sources: ZipNN, https://arxiv.org/abs/2411.05239; zstd's frame format, RFC 8878.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import zstandard

from holdfast.core.buffers import Buffer
from holdfast.core.errors import InvalidFormat
from holdfast.format.packed import CHUNK_BYTES, Kind

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["merge", "split"]

WORTH = 0.95  # a plane that keeps more of its size than this is left raw
SPOTS = 4
SPOT_ELEMENTS = 4096


def split(data: memoryview, kind: Kind, level: int) -> tuple[tuple[int, ...], list[Buffer]]:
    """Return a chunk's planes as they are to be stored, and the size of each byte's frame, 0 for a raw one.

    Where no plane compresses the chunk stays as it is, neither cut nor turned.
    `level` is zstd's for elements that are no floats.
    """
    width = kind.width
    elements = np.frombuffer(data, f"<u{width}")
    if kind.turned:
        turned = elements << 1
        turned |= elements >> (8 * width - 1)
        elements = turned
    # What has one byte an element may be small floats or anything else: the sample decides.
    ways = (None,) if kind.turned else (level,) if width > 1 else (level, None)
    found: dict[int, bytes] = {}
    columns = elements.view("u1").reshape(-1, width)
    sample = _sample(columns)
    for k in range(width):
        tried = np.ascontiguousarray(sample[:, k]).data
        least, _, way = min((len(_compressor(way).compress(tried)), i, way) for i, way in enumerate(ways))
        if least < WORTH * len(tried):
            frame = _compressor(way).compress(np.ascontiguousarray(columns[:, k]).data)
            if len(frame) < WORTH * len(columns):
                found[k] = frame
    lengths = tuple(len(found.get(k, b"")) for k in range(width))
    if not found:
        return lengths, [data]
    pieces: list[Buffer] = []
    for k, size in _groups(lengths):
        if k in found:
            pieces.append(found[k])
        else:
            plane = elements.view(f"<u{size}").reshape(-1, width // size)[:, k // size]
            pieces.append(np.ascontiguousarray(plane).data.cast("B"))
    return lengths, pieces


def merge(stored: memoryview, kind: Kind, frames: Sequence[int], target: memoryview) -> None:
    """Fill `target`, a whole chunk, from its planes as they are stored.

    Raises:
        InvalidFormat: a frame is not one that holds exactly its plane; nothing beyond a plane's size is ever allocated.
    """
    if not any(frames):
        target[:] = stored
        return
    width = kind.width
    many = len(target) // width
    elements = np.frombuffer(target, f"<u{width}")
    position = 0
    for k, size in _groups(frames):
        end = position + (frames[k] or many * size)
        piece = stored[position:end]
        plane = np.frombuffer(_decompress(piece, many) if frames[k] else piece, f"<u{size}")
        elements.view(f"<u{size}").reshape(-1, width // size)[:, k // size] = plane
        position = end
    if kind.turned:
        lowest = elements << (8 * width - 1)
        elements >>= 1
        elements |= lowest


def _groups(frames: Sequence[int]) -> list[tuple[int, int]]:
    """Return (first byte, number of bytes) of each piece: a frame holds one byte of each element; raw bytes that lie
    together stay together, in the largest aligned power of two."""
    out: list[tuple[int, int]] = []
    k, width = 0, len(frames)
    while k < width:
        size = 1
        while k % (2 * size) == 0 and k + 2 * size <= width and not any(frames[k : k + 2 * size]):
            size *= 2
        out.append((k, size))
        k += size
    return out


def _sample(columns: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return some elements from several spots of a chunk."""
    many = len(columns)
    if many <= 2 * SPOTS * SPOT_ELEMENTS:
        return columns
    starts = [i * (many - SPOT_ELEMENTS) // (SPOTS - 1) for i in range(SPOTS)]
    return np.concatenate([columns[start : start + SPOT_ELEMENTS] for start in starts])


_local = threading.local()  # a zstd context serves one thread at a time


def _compressor(level: int | None) -> zstandard.ZstdCompressor:
    """Return this thread's compressor: zstd's own `level`, or None for what has frequencies but no repetitions.

    There the search for matches only does harm: with a tiny hash table nearly all that is found are symbol
    frequencies, which is 15 % smaller and three times as fast as level 1. A target length other than 0 would switch
    the coding of literals off.
    """
    made: dict[int | None, zstandard.ZstdCompressor] = _local.__dict__.setdefault("compressors", {})
    if level not in made:
        if level is None:
            parameters = zstandard.ZstdCompressionParameters(
                strategy=zstandard.STRATEGY_FAST,
                window_log=CHUNK_BYTES.bit_length() - 1,
                hash_log=6,
                chain_log=6,
                search_log=1,
                min_match=7,
                target_length=0,
            )
            made[level] = zstandard.ZstdCompressor(compression_params=parameters)
        else:
            made[level] = zstandard.ZstdCompressor(level=level)
    return made[level]


def _decompress(frame: memoryview, size: int) -> bytes:
    """Return what a frame holds, which must be `size` bytes, as its own header must say first."""
    decompressor: zstandard.ZstdDecompressor | None = getattr(_local, "decompressor", None)
    if decompressor is None:
        decompressor = _local.decompressor = zstandard.ZstdDecompressor(max_window_size=CHUNK_BYTES)
    try:
        says: Any = zstandard.get_frame_parameters(frame)
        if says.content_size != size or says.dict_id or says.window_size > CHUNK_BYTES:
            raise InvalidFormat(
                f"a frame says that it holds {says.content_size} bytes in a window of {says.window_size}; "
                f"expected {size} in at most {CHUNK_BYTES}"
            )
        data = decompressor.decompress(frame, max_output_size=size, allow_extra_data=False)
    except zstandard.ZstdError as e:
        raise InvalidFormat(f"a zstd frame cannot be decompressed: {e}") from e
    if len(data) != size:
        raise InvalidFormat(f"a zstd frame holds {len(data)} bytes; expected {size}")
    return data
