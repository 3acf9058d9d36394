"""Data files: header round trip, the one allowed form, and what plain safetensors makes of them."""

from __future__ import annotations

import base64
import json
import math
import unicodedata
from collections.abc import Sequence

import ml_dtypes
import numpy as np
import pytest
import safetensors
from hypothesis import given, settings
from hypothesis import strategies as st

from holdfast.core.dtypes import CARRIERS, DTYPES
from holdfast.core.errors import InvalidFormat, Truncated, UnsupportedVersion
from holdfast.format.datafile import (
    ALIGNMENT,
    StoredTensor,
    decode_header,
    encode_header,
    lay_out,
    open_header,
)
from holdfast.format.digest import cut_blocks, digest

NO_NUMPY = {"float8_e8m0fnu", "float4_e2m1fn_x2", "complex32", "complex128"}  # carried under another code


def stored(
    name: str, dtype: str, shape: Sequence[int], stride: tuple[int, ...] | None = None, box: object = None
) -> StoredTensor:
    return StoredTensor(name, dtype, tuple(shape), stride, 0, 0, box)  # type: ignore[arg-type]


def digests_for(tensors: Sequence[StoredTensor], data: bytes) -> list[bytes]:
    return [digest(data[b.start : b.end]) for b in cut_blocks([(t.nbytes, t.shape) for t in tensors], 2)]


def file_of(tensors: Sequence[StoredTensor], data: bytes) -> bytes:
    return encode_header(tensors, digests_for(tensors, data)) + data


names = st.text(
    st.characters(exclude_categories=("Cc", "Cs")) | st.sampled_from('/"\\é漢\N{GRINNING FACE}'),
    min_size=1,
    max_size=8,
).filter(lambda s: unicodedata.is_normalized("NFC", s) and s != "__metadata__")


@st.composite
def tensors(draw: st.DrawFn) -> StoredTensor:
    shape = tuple(draw(st.lists(st.integers(0, 5), max_size=4)))
    stride = draw(st.none() | st.tuples(*[st.integers(0, 2**40) for _ in shape]))
    offsets = draw(st.none() | st.tuples(*[st.integers(0, 9) for _ in shape]))
    box = (
        offsets
        if offsets is None
        else (offsets, tuple(o + n + 1 for o, n in zip(offsets, shape, strict=True)))
    )
    return stored(draw(names), draw(st.sampled_from(sorted(DTYPES))), shape, stride, box)


@settings(max_examples=300)
@given(st.lists(tensors(), max_size=8, unique_by=lambda t: t.name))
def test_a_header_says_what_was_written(given_tensors: list[StoredTensor]) -> None:
    laid = lay_out(given_tensors)
    data = bytes(sum(t.nbytes for t in laid))
    raw = encode_header(laid, digests_for(laid, data))
    header = decode_header(raw, "f")
    assert list(header.tensors) == laid
    assert header.data_start == len(raw)
    assert len(raw) % ALIGNMENT == 0
    assert header.file_bytes == len(raw) + len(data)
    assert list(header.blocks) == cut_blocks([(t.nbytes, t.shape) for t in laid], 2)
    assert list(header.digests) == digests_for(laid, data)
    assert {t.name for t in laid} == {t.name for t in given_tensors}


@settings(max_examples=100)
@given(st.lists(tensors(), max_size=8, unique_by=lambda t: t.name))
def test_the_size_of_a_header_is_known_before_its_digests(given_tensors: list[StoredTensor]) -> None:
    laid = lay_out(given_tensors)
    data = bytes(sum(t.nbytes for t in laid))
    header = open_header(laid)
    closed = header.close(digests_for(laid, data))
    assert header.size == len(closed)
    assert closed == encode_header(laid, digests_for(laid, data))
    assert list(header.blocks) == cut_blocks([(t.nbytes, t.shape) for t in laid], 2)


@pytest.mark.parametrize("size", [8, ALIGNMENT, 3 * ALIGNMENT])
def test_zeros_where_the_header_belongs_are_no_header(size: int) -> None:
    """What a crash leaves of a file whose header was to come last."""
    with pytest.raises(InvalidFormat):
        decode_header(bytes(size), "f")


def test_wide_types_come_first_so_that_every_tensor_is_aligned() -> None:
    laid = lay_out([stored(name, name, (3,)) for name in DTYPES])
    for t in laid:
        d = DTYPES[t.dtype]
        assert t.start % (d.itemsize // d.carrier_per_element) == 0
    assert [t.end for t in laid[:-1]] == [t.start for t in laid[1:]]
    alike = lay_out([stored(n, "float32", (2,)) for n in ("z", "a", "m")])
    assert [t.name for t in alike] == ["z", "a", "m"], (
        "tensors of one width keep the order they were given in"
    )


def test_the_name_that_safetensors_reserves_is_refused_when_writing() -> None:
    with pytest.raises(InvalidFormat, match="reserved"):
        encode_header(lay_out([stored("__metadata__", "uint8", (1,))]), [bytes(32)])


SAMPLE = lay_out(
    [
        stored("b", "float32", (2, 3)), stored("a", "bfloat16", (4,), (2,)),
        stored("c", "complex128", (2,), None, ((1,), (5,))),
    ]
)  # fmt: skip
RAW = encode_header(SAMPLE, digests_for(SAMPLE, bytes(64)))


def repacked(body: bytes) -> bytes:
    size = -(-(8 + len(body)) // ALIGNMENT) * ALIGNMENT
    return (size - 8).to_bytes(8, "little") + body.ljust(size - 8)


BODY = RAW[8:].rstrip()
CHANGES = {
    "metadata in a tensor": BODY.replace(b'"data_offsets":[0', b'"format":"pt","data_offsets":[0', 1),
    "metadata behind a tensor": BODY[:-2] + b',"digests":""}}',
    "a tensor's field in the metadata": BODY.replace(b'"format":"pt"', b'"dtype":"F32","format":"pt"', 1),
    "a tensor without its shape": BODY.replace(b'"shape":[2,3],', b"", 1),
    "metadata alone in place of a tensor": BODY[:-1] + b',"z":{"format":"pt"}}',
    "no digests": BODY.replace(b'"digests"', b'"layouts"', 1),
    "spaces": json.dumps(json.loads(BODY)).encode(),
    "order of tensors": json.dumps(dict(reversed(json.loads(BODY).items())), separators=(",", ":")).encode(),
    "order of fields": BODY.replace(b'"dtype":"F32","shape":[2,3]', b'"shape":[2,3],"dtype":"F32"'),
    "escaped letter": BODY.replace(b'"b":', b'"\\u0062":'),
    "leading space": b" " + BODY,
    "tab as padding": BODY + b"\t",
    "number form": BODY.replace(b"[2,3]", b"[2,3.0]"),
    "duplicate tensor": BODY[:-1] + b',"b":{"dtype":"F32","shape":[2,3],"data_offsets":[32,56]}}',
    "duplicate metadata": BODY[:-1] + b',"__metadata__":{"format":"pt"}}',
    "unknown metadata": BODY.replace(b'"format":"pt"', b'"format":"pt","note":"x"'),
    "other magic": BODY.replace(b"holdfast/2", b"holdfest/2"),
    "parts in a version that knows none": BODY.replace(b"holdfast/2", b"holdfast/1"),
    "unknown layout field": BODY.replace(b'\\"stride\\":', b'\\"strides\\":'),
    "layout of no tensor": BODY.replace(b'"{\\"c\\":', b'"{\\"x\\":{\\"stride\\":[1]},\\"c\\":'),
    "layout that says nothing": BODY.replace(b'"{\\"c\\":', b'"{\\"b\\":{},\\"c\\":'),
    "no metadata": BODY.replace(b"__metadata__", b"__metadatb__"),
    "trailing data": BODY + b"{}",
    "byte order mark": b"\xef\xbb\xbf" + BODY,
    "empty": b"",
    "not an object": b"[]",
}


@pytest.mark.parametrize("change", CHANGES)
def test_any_other_form_of_a_header_is_refused(change: str) -> None:
    assert decode_header(repacked(BODY), "f").tensors == tuple(SAMPLE)
    assert CHANGES[change] != BODY
    with pytest.raises(InvalidFormat):
        decode_header(repacked(CHANGES[change]), "f")


IMPOSSIBLE = {
    "negative dimension": ((-2, -3), None), "too many dimensions": ((1,) * 65, None), "empty but endless": ((0, 2**62, 2), None),
    "stride beyond memory": ((1,), (2**61,)), "negative stride": ((2,), (-1,)), "stride of another rank": ((2,), (1, 1)),
}  # fmt: skip


@pytest.mark.parametrize("what", IMPOSSIBLE)
def test_shapes_that_no_reader_can_hold_are_never_written(what: str) -> None:
    shape, stride = IMPOSSIBLE[what]
    with pytest.raises(InvalidFormat, match="spans more"):
        encode_header(lay_out([stored("a", "float32", shape, stride)]), [bytes(32)])


def test_more_padding_than_needed_is_refused() -> None:
    longer = (len(RAW) + ALIGNMENT - 8).to_bytes(8, "little") + RAW[8:] + b" " * ALIGNMENT
    with pytest.raises(InvalidFormat, match="one form"):
        decode_header(longer, "f")


def test_every_truncation_of_a_header_is_refused() -> None:
    for size in range(len(RAW)):
        with pytest.raises(Truncated):
            decode_header(RAW[:size], "f")
    with pytest.raises(Truncated):
        decode_header(RAW + b" ", "f")


def test_no_flipped_bit_of_a_header_reads_as_the_same_header() -> None:
    """The manifest's digest catches all of them; the grammar alone must not take two forms for one."""
    original = decode_header(RAW, "f")
    for position in range(len(BODY) + 40):
        for bit in range(8):
            changed = bytearray(RAW)
            changed[position] ^= 1 << bit
            try:
                found = decode_header(bytes(changed), "f")
            except (InvalidFormat, Truncated, UnsupportedVersion):
                continue
            assert found != original


@pytest.mark.parametrize("count", [0, 1, 3])
def test_the_number_of_digests_must_be_that_of_the_blocks(count: int) -> None:
    with pytest.raises(InvalidFormat, match="digests"):
        decode_header(encode_header(SAMPLE, [bytes(31)] if count == 1 else [bytes(32)] * count), "f")


def array_of(dtype: str, seed: int) -> np.ndarray:
    raw = np.random.default_rng(seed).integers(0, 256, 6 * DTYPES[dtype].itemsize, np.uint8)
    if dtype == "bool":
        return (raw & 1).astype(bool).reshape(2, 3)
    own = getattr(ml_dtypes, dtype, None)
    return raw.view(np.dtype(own if own is not None else dtype)).reshape(2, 3)


def read_by_safetensors(raw: bytes) -> dict[str, tuple[str, list[int], bytes]]:
    found = dict(safetensors.deserialize(raw))
    return {n: (v["dtype"], list(v["shape"]), bytes(v["data"])) for n, v in found.items()}


def test_safetensors_reads_every_dtype(tmp_path: object) -> None:
    native = [d for d in DTYPES if DTYPES[d].native]
    assert sorted(CARRIERS.values()) == sorted(native), "each code stands for exactly one type"
    arrays = {d: array_of(d, i) for i, d in enumerate(native)}
    laid = lay_out([stored(d, d, a.shape) for d, a in arrays.items()])
    raw = file_of(laid, b"".join(arrays[t.name].tobytes() for t in laid))
    for name, (code, shape, data) in read_by_safetensors(raw).items():
        assert CARRIERS[code] == name
        assert shape == [2, 3]
        assert data == arrays[name].tobytes()


@pytest.mark.parametrize("dtype", sorted(NO_NUMPY))
def test_safetensors_reads_files_with_types_it_does_not_know(dtype: str) -> None:
    d = DTYPES[dtype]
    laid = lay_out(
        [stored("odd", dtype, (2, 3)), stored("plain", "int16", (2,)), stored("scalar", dtype, ())]
    )
    data = bytes(range(sum(t.nbytes for t in laid)))
    found = read_by_safetensors(file_of(laid, data))
    odd = next(t for t in laid if t.name == "odd")
    carrier_shape = [2, 3] + [d.carrier_per_element] * (d.carrier_per_element > 1)
    assert found["odd"] == (d.carrier, carrier_shape, data[odd.start : odd.end])
    assert found["plain"][0] == "I16"


def test_safetensors_gives_back_identical_numpy_arrays(tmp_path) -> None:
    from safetensors.numpy import load_file

    arrays = {
        d: array_of(d, i)
        for i, d in enumerate(DTYPES)
        if DTYPES[d].native and not d.startswith(("float8", "bf"))
    }
    arrays["empty"], arrays["scalar"] = np.zeros((0, 4), np.float64), np.array(1.5)
    laid = lay_out([stored(n, str(a.dtype), a.shape) for n, a in arrays.items()])
    (tmp_path / "f.safetensors").write_bytes(file_of(laid, b"".join(arrays[t.name].tobytes() for t in laid)))
    found = load_file(tmp_path / "f.safetensors")
    assert found.keys() == arrays.keys()
    for name, a in arrays.items():
        assert (found[name].dtype, found[name].shape, found[name].tobytes()) == (
            a.dtype,
            a.shape,
            a.tobytes(),
        )


def test_the_bytes_of_a_small_file_are_fixed() -> None:
    laid = lay_out([stored("w", "int16", (2,), (3,))])
    raw = file_of(laid, b"\x01\x00\x02\x00")
    checksum = base64.b64encode(digest(b"\x01\x00\x02\x00")).decode()
    body = (
        f'{{"__metadata__":{{"format":"pt","holdfast":"holdfast/1","digests":"{checksum}","layouts":"{{\\"w\\":{{\\"stride\\":[3]}}}}"}},'
        '"w":{"dtype":"I16","shape":[2],"data_offsets":[0,4]}}'
    )
    assert raw == (4088).to_bytes(8, "little") + body.encode().ljust(4088) + b"\x01\x00\x02\x00"
    assert math.prod(laid[0].shape) == 2


def test_a_newer_version_is_refused_with_what_to_do() -> None:
    with pytest.raises(UnsupportedVersion, match=r"f: has version 3; .*pip install --upgrade holdfast"):
        decode_header(repacked(BODY.replace(b"holdfast/2", b"holdfast/3")), "f")


def test_the_version_is_the_first_that_does() -> None:
    def version(t: StoredTensor) -> bytes:
        return open_header(lay_out([t])).close([bytes(32)] * 9)[:80].split(b'"holdfast":"')[1][:10]

    assert version(stored("a", "uint8", [4 << 20])) == b"holdfast/1"
    assert version(stored("a", "uint8", [2, (2 << 20) + 1])) == b"holdfast/2"
    assert version(stored("a", "uint8", [2, 3], None, ((1, 0), (4, 3)))) == b"holdfast/2"


ROWS = StoredTensor("a", "float32", (5, 2), None, 0, 40, ((1, 0), (9, 2)), ((1, 3), (4, 5), (7, 9)))
OTHER_ROWS = {
    "one stretch": "[[1,6]]",
    "none": "[]",
    "not in order": "[[4,5],[1,3],[7,9]]",
    "overlapping": "[[1,4],[3,4],[8,9]]",
    "touching": "[[1,3],[3,4],[7,9]]",
    "empty stretch": "[[1,3],[4,4],[6,9]]",
    "backwards": "[[1,3],[6,4],[5,9]]",
    "too few": "[[1,3],[4,5],[7,8]]",
    "too many": "[[1,3],[4,6],[7,9]]",
    "beyond the whole": "[[1,3],[4,5],[8,10]]",
    "not where the box begins": "[[0,2],[4,5],[7,9]]",
    "negative": "[[-1,1],[4,5],[7,9]]",
}


def test_several_stretches_of_rows_are_one_tensor_of_a_file() -> None:
    raw = encode_header([ROWS], [bytes(32)])
    assert decode_header(raw, "f").tensors == (ROWS,)
    assert safetensors.deserialize(raw + bytes(40))[0][1]["shape"] == [5, 2]


@pytest.mark.parametrize("rows", OTHER_ROWS.values(), ids=OTHER_ROWS)
def test_other_stretches_of_rows_are_refused(rows: str) -> None:
    body = encode_header([ROWS], [bytes(32)])[8:].rstrip()
    changed = body.replace(b"[[1,3],[4,5],[7,9]]", rows.encode())
    assert changed != body
    with pytest.raises(InvalidFormat, match="does not lie inside"):
        decode_header(repacked(changed), "f")


def test_rows_without_a_box_are_refused() -> None:
    body = encode_header([ROWS], [bytes(32)])[8:].rstrip()
    changed = body.replace(rb"\"box\":[[1,0],[9,2]],", b"")
    assert changed != body
    with pytest.raises(InvalidFormat, match="does not lie inside"):
        decode_header(repacked(changed), "f")
