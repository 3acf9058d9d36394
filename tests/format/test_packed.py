"""Packed files: what is decoded is what was there, always; any part alone; and what is forged is refused."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import pytest
import zstandard
from blake3 import blake3
from hypothesis import given, settings
from hypothesis import strategies as st

from holdfast.catalog.unpacking import Unpacking, open_packed
from holdfast.core.dtypes import DTYPES
from holdfast.core.errors import DigestMismatch, IntegrityError, InvalidFormat, PolicyError, Truncated
from holdfast.format.datafile import DataHeader, StoredTensor, decode_header, encode_header, lay_out
from holdfast.format.digest import cut_blocks, digest
from holdfast.format.packed import (
    CHUNK_BYTES,
    Chunk,
    Kind,
    Pack,
    PackedTail,
    cut_chunks,
    declared_tail_bytes,
    decode_tail,
    encode_tail,
)
from holdfast.format.packing import Packing
from holdfast.format.planes import merge, split
from holdfast.stores import MemoryStore, Stream

KEY = "data/000000000001-abc/model.safetensors.zst"
ALL = sorted(DTYPES)


def header_of(tensors: Sequence[tuple[str, str, tuple[int, ...]]], data: bytes) -> DataHeader:
    laid = lay_out([StoredTensor(name, dtype, shape, None, 0, 0) for name, dtype, shape in tensors])
    blocks = cut_blocks([(t.nbytes, t.shape) for t in laid], 2)
    return decode_header(encode_header(laid, [digest(data[b.start : b.end]) for b in blocks]), "f")


def size_of(tensors: Sequence[tuple[str, str, tuple[int, ...]]]) -> int:
    return sum(int(np.prod(shape, dtype=np.int64)) * DTYPES[dtype].itemsize for _, dtype, shape in tensors)


def pack(header: DataHeader, data: bytes, how: Pack, piece_bytes: int = 1 << 30) -> bytes:
    """Pack through the very stream a copy makes of it."""
    packing = Packing(header, how)
    pieces = (memoryview(data)[i : i + piece_bytes] for i in range(0, len(data), piece_bytes))
    store = MemoryStore()
    store.write_streams([Stream(KEY, 0, packing.body(pieces), bytes)])
    made = store.read(KEY)
    assert len(made) == packing.packed_bytes <= packing.most_bytes
    return made


def opened(packed: bytes) -> Unpacking:
    store = MemoryStore()
    store.write(KEY, [packed])
    found = open_packed(store, KEY)
    assert found is not None
    return found


def plain(header: DataHeader, data: bytes) -> bytes:
    return encode_header(header.tensors, header.digests) + data


def read(file: Unpacking, start: int, end: int) -> bytes:
    target = bytearray(end - start)
    file.read_into(start, memoryview(target))
    return bytes(target)


def tail_of(packed: bytes) -> PackedTail:
    return decode_tail(packed[len(packed) - declared_tail_bytes(packed, KEY) :], KEY)


def weights(many: int, seed: int = 0) -> np.ndarray:
    """Floats like those of a trained model: many scales, noise in the mantissas."""
    rng = np.random.default_rng(seed)
    return (rng.standard_normal(many) * np.exp(rng.standard_normal(many) - 4)).astype("<f4")


FILLS: dict[str, Callable[[int, int], bytes]] = {
    "noise": lambda size, seed: np.random.default_rng(seed).bytes(size),
    "zeros": lambda size, seed: bytes(size),
    "ones": lambda size, seed: b"\xff" * size,
    "counted": lambda size, seed: np.arange(seed, seed + size // 4 + 1, dtype="<u4").tobytes()[:size],
    "weights": lambda size, seed: weights(size // 4 + 1, seed).tobytes()[:size],
    "bf16": lambda size, seed: (weights(size // 2 + 1, seed).view("<u4") >> 16).astype("<u2").tobytes()[:size],
}  # fmt: skip

shapes = st.lists(st.integers(0, 7), max_size=3).map(tuple) | st.integers(0, 90_000).map(lambda n: (n,))


@settings(max_examples=120)
@given(
    st.lists(st.tuples(st.sampled_from(ALL), shapes, st.sampled_from(sorted(FILLS))), max_size=8),
    st.sampled_from([1, 3, 19]),
    st.integers(1, 3),
    st.sampled_from([1, 1000, 65_537, 1 << 30]),
    st.data(),
)
def test_a_packed_file_decodes_to_the_plain_one(
    given_tensors: list[tuple[str, tuple[int, ...], str]],
    level: int,
    threads: int,
    piece_bytes: int,
    choose: st.DataObject,
) -> None:
    """Every element type, odd and empty shapes, pieces that cut anything anywhere, any part of it alone."""
    tensors = [(f"t{i}", dtype, shape) for i, (dtype, shape, _) in enumerate(given_tensors)]
    laid = lay_out([StoredTensor(name, dtype, shape, None, 0, 0) for name, dtype, shape in tensors])
    fill = {f"t{i}": fill for i, (_, _, fill) in enumerate(given_tensors)}
    data = b"".join(FILLS[fill[t.name]](t.nbytes, t.start % 97) for t in laid)
    header = header_of(tensors, data)
    if piece_bytes == 1 and len(data) > 20_000:
        piece_bytes = 777
    packed = pack(header, data, Pack(level, threads), piece_bytes)
    file = opened(packed)
    whole = plain(header, data)
    start = header.data_start
    assert file.tail.raw_header == whole[:start]
    assert read(file, start, len(whole)) == data
    if data:
        first = choose.draw(st.integers(start, len(whole)), label="first")
        end = choose.draw(st.integers(first, len(whole)), label="end")
        assert read(file, first, end) == whole[first:end]
    assert packed == pack(header, data, Pack(level, 1)), "the same bytes, however many threads and pieces"


@pytest.mark.parametrize("dtype", ALL)
def test_large_tensors_of_every_type_come_back(dtype: str) -> None:
    """Beyond a chunk and a digest block's worth of samples, with a tail that is no round number."""
    itemsize = DTYPES[dtype].itemsize
    shape = (3 * CHUNK_BYTES // itemsize // 7 + 5, 5)
    size = shape[0] * shape[1] * itemsize
    data = FILLS["weights"](size // 2, 1) + FILLS["zeros"](size // 4, 0)
    data += FILLS["noise"](size - len(data), 2)
    header = header_of([("x", dtype, shape)], data)
    file = opened(pack(header, data, Pack()))
    assert read(file, header.data_start, header.file_bytes) == data


@settings(max_examples=200)
@given(
    st.sampled_from([(1, False), (2, False), (2, True), (4, False), (4, True), (8, False), (8, True)]),
    st.data(),
)
def test_planes_come_together_again(kind: tuple[int, bool], choose: st.DataObject) -> None:
    width, turned = kind
    many = choose.draw(st.integers(1, 300))
    columns = [
        choose.draw(st.binary(min_size=many, max_size=many) | st.integers(0, 255).map(lambda b: bytes([b]) * many))
        for _ in range(width)
    ]  # fmt: skip
    data = np.array([list(c) for c in columns], "u1").T.tobytes()
    frames, pieces = split(memoryview(data), Kind(width, turned), 3)
    target = bytearray(len(data))
    merge(memoryview(b"".join(pieces)), Kind(width, turned), frames, memoryview(target))
    assert target == data


def test_exponents_are_packed_and_mantissas_left_alone() -> None:
    """The figures of the literature: about 1.2 for float32, 1.5 for bfloat16; and noise costs next to nothing."""
    size = 4 * CHUNK_BYTES
    cases = {
        "float32": ("weights", 1.15, 1.35),
        "bfloat16": ("bf16", 1.35, 1.8),
        "uint8": ("noise", 0.999, 1.0),
    }
    for dtype, (fill, least, most) in cases.items():
        data = FILLS[fill](size, 5)
        header = header_of([("x", dtype, (size // DTYPES[dtype].itemsize,))], data)
        packed = pack(header, data, Pack())
        ratio = size / (len(packed) - header.data_start)
        assert least < ratio < most, f"{dtype}: {ratio:.3f}"
    tail = tail_of(packed)
    assert all(c.frames == (0,) for c in tail.chunks)


def test_every_frame_is_one_that_any_zstd_reads() -> None:
    data = weights(CHUNK_BYTES // 2).tobytes()
    header = header_of([("x", "float32", (len(data) // 4,))], data)
    packed = pack(header, data, Pack())
    tail = tail_of(packed)
    for chunk, start in zip(tail.chunks, tail.stored_starts, strict=False):
        plane = chunk.size // 4
        assert chunk.frames[:3] == (0, 0, 0)
        frame = packed[start + 3 * plane : start + 3 * plane + chunk.frames[3]]
        assert len(zstandard.decompress(frame)) == plane


def test_a_part_is_read_without_reading_the_rest() -> None:
    """A ranged read asks the store for the chunks that hold it and for nothing else."""
    data = weights(4 * CHUNK_BYTES).tobytes()
    header = header_of([("x", "float32", (4096, 1024))], data)
    asked: list[int] = []

    class Watched(MemoryStore):
        def read_into(self, key: str, start: int, target: memoryview) -> None:
            asked.append(len(target))
            super().read_into(key, start, target)

    store = Watched()
    store.write(KEY, [pack(header, data, Pack())])
    file = open_packed(store, KEY)
    assert file is not None
    at = header.data_start + 9 * CHUNK_BYTES + 100
    assert read(file, at, at + 50) == data[at - header.data_start :][:50]
    assert asked == [file.tail.chunks[9].stored_bytes]


def test_the_pieces_must_be_what_the_header_says() -> None:
    header = header_of([("x", "float32", (1000,))], bytes(4000))
    for data in (bytes(3999), bytes(4001)):
        with pytest.raises(ValueError, match="data than the header says"):
            pack(header, data, Pack())


def test_settings_that_make_no_sense_are_refused() -> None:
    for wrong in ({"level": 0}, {"level": 23}, {"threads": 0}, {"threads": 65}):
        with pytest.raises(PolicyError):
            Pack(**wrong)


# ---- what must be refused -----------------------------------------------------------------------------------------


def sample() -> tuple[DataHeader, bytes, bytes]:
    data = weights(3000).tobytes() + bytes(64) + bytes(range(64))
    header = header_of([("w", "float32", (3000,)), ("n", "int64", (8,)), ("m", "uint8", (64,))], data)
    return header, data, pack(header, data, Pack())


def test_every_flipped_bit_is_noticed() -> None:
    """Also one that zstd would not mind: no byte of a packed file is there for nothing."""
    header, _, packed = sample()
    places = {*range(0, len(packed), 7), *range(len(packed) - 300, len(packed))}
    frame = tail_of(packed).chunks[0].frames[-1]
    places |= set(range(9000, 9000 + frame))  # the first chunk's exponents, all of them
    for at in sorted(places):
        changed = bytearray(packed)
        changed[at] ^= 1 << at % 8
        with pytest.raises(IntegrityError):
            read(opened(bytes(changed)), header.data_start, header.file_bytes)


def test_every_length_but_the_right_one_is_refused() -> None:
    header, _, packed = sample()
    for length in {*range(60), *range(60, len(packed), 211), len(packed) - 1}:
        with pytest.raises((Truncated, InvalidFormat)):
            read(opened(packed[:length]), header.data_start, header.file_bytes)
    for changed in (packed + b"\0", b"\0" + packed, packed[1:]):
        with pytest.raises((Truncated, InvalidFormat)):
            opened(changed)


def forged(chunks: Sequence[Chunk], stored: bytes, raw_header: bytes = b"h" * 8) -> bytes:
    return stored + encode_tail(raw_header, chunks)


def sealed(body: bytes) -> bytes:
    return body + blake3(body).digest()


def chunk(size: int, kind: Kind, frames: tuple[int, ...], stored: bytes) -> Chunk:
    return Chunk(size, kind, frames, blake3(stored).digest(16))


def hostile() -> Iterator[tuple[str, bytes]]:
    bomb = zstandard.compress(bytes(64 << 20))
    byte = Kind(1, False)
    for name, size, frame in (
        ("a frame of 64 MiB for a chunk of one", CHUNK_BYTES, bomb),
        ("a frame that holds less", 1000, zstandard.compress(bytes(999))),
        ("a frame that holds more", 1000, zstandard.compress(bytes(1001))),
        ("a frame that does not say what it holds", 1000,
         zstandard.ZstdCompressor(write_content_size=False).compress(bytes(1000))),
        ("two frames", 1000, zstandard.compress(bytes(500)) * 2),
        ("a frame and more", 1000, zstandard.compress(bytes(1000)) + b"more"),
        ("no frame", 1000, b"no frame at all"),
        ("half a frame", 1000, zstandard.compress(np.random.default_rng(0).bytes(1000).replace(b"\x07", b"\0") )[:600]),
        ("a window beyond a chunk", 1000, b"\x28\xb5\x2f\xfd" + struct.pack("<BBI", 0x80, 0x88, 1000) + b"\x01\0\0"),
    ):  # fmt: skip
        yield name, forged([chunk(size, byte, (len(frame),), frame)], frame)
    yield (
        "a skippable frame",
        forged(
            [chunk(100, byte, (20,), (skip := b"\x50\x2a\x4d\x18" + struct.pack("<I", 12) + bytes(12)))], skip
        ),
    )
    yield "a chunk beyond a MiB", forged([chunk(CHUNK_BYTES + 1, byte, (9,), b"")], bytes(9))
    yield "an empty chunk", forged([chunk(0, byte, (0,), b"")], b"")
    yield "a part of an element", forged([chunk(6, Kind(4, True), (0, 0, 0, 0), bytes(6))], bytes(6))
    yield "an element of three bytes", forged([chunk(6, Kind(3, False), (0, 0, 0), bytes(6))], bytes(6))
    frame = zstandard.compress(b"abc")
    yield "a frame larger than its plane", forged([chunk(3, byte, (len(frame),), frame)], frame)
    yield "a chunk beyond the end", forged([chunk(10, byte, (0,), bytes(10))], b"")
    whole = encode_tail(b"h" * 8, [chunk(10, byte, (0,), bytes(10))])[:-32]
    for name, at, value in (
        ("another magic", 32, b"HFPACK2\n"),
        ("a tail of exabytes", 16, struct.pack("<Q", 1 << 62)),
        ("a tail beyond 2 GiB", 16, struct.pack("<Q", (2 << 30) + 1)),
        ("a tail that is too short", 16, struct.pack("<Q", 40)),
        ("a plain file of exabytes", 8, struct.pack("<Q", 1 << 62)),
        ("a plain header of exabytes", 0, struct.pack("<Q", 1 << 62)),
        ("a plain header over the index", 0, struct.pack("<Q", 20)),
        ("exachunks", 24, struct.pack("<Q", 1 << 62)),
        ("a chunk more", 24, struct.pack("<Q", 2)),
        ("a chunk less", 24, struct.pack("<Q", 0)),
    ):
        body = bytearray(whole)
        body[len(whole) - 40 + at : len(whole) - 40 + at + 8] = value
        yield name, bytes(10) + sealed(bytes(body))
    yield "a chunk for every byte", forged([chunk(1, byte, (0,), b"x")] * 1000, b"x" * 1000)
    yield "something turned that has one byte", forged([chunk(10, Kind(1, True), (0,), bytes(10))], bytes(10))


@pytest.mark.parametrize(("name", "file"), list(hostile()), ids=lambda x: x if isinstance(x, str) else "")
def test_a_forged_file_is_refused(name: str, file: bytes) -> None:
    """Digests do not help here: whoever forged it has set them right."""
    with pytest.raises((InvalidFormat, Truncated)):
        found = opened(file)
        read(found, len(found.tail.raw_header), found.tail.plain_bytes)


def test_a_wrong_chunk_is_named_with_its_file() -> None:
    header, _, packed = sample()
    changed = bytearray(packed)
    changed[100] ^= 1
    with pytest.raises(DigestMismatch, match=r"model\.safetensors\.zst: bytes \d+ to \d+"):
        read(opened(bytes(changed)), header.data_start, header.file_bytes)


def test_chunks_lie_within_digest_blocks() -> None:
    """So a block can be decoded and verified without its neighbours."""
    tensors = [
        ("a", "float32", (5_000_000,)),
        ("b", "int32", (3,)),
        ("c", "float32", (7,)),
        ("d", "uint8", (9,)),
    ]
    data = bytes(size_of(tensors))
    header = header_of(tensors, data)
    cuts = list(cut_chunks(header))
    ends = np.cumsum([size for size, _ in cuts]).tolist()
    assert ends[-1] == len(data)
    assert {b.end for b in header.blocks} <= set(ends)
