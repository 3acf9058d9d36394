"""Data files: plain safetensors, with our digests and layouts in the header's `__metadata__`.

A data file has exactly one byte form: the header that `encode_header` makes for its tensors. A header that differs in
any way (order, spacing, a duplicate key) is refused. Other programs read the file as ordinary safetensors.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import msgspec

from holdfast.core.dtypes import CARRIERS, DTYPES
from holdfast.core.errors import InvalidFormat, Truncated
from holdfast.core.names import check_path
from holdfast.format.digest import BLOCK_BYTES, DIGEST_BYTES, Block, cut_blocks

__all__ = ["DataHeader", "StoredTensor", "decode_header", "encode_header", "header_size", "lay_out"]

ALIGNMENT = 4096
PREFIX_BYTES = 8
MAX_HEADER_BYTES = 1 << 30
MAX_DIMENSIONS = 64  # of torch and of numpy
MAX_EXTENT = 2**62  # in bytes, of what a shape or a stride spans, so that no reader overflows
METADATA = "__metadata__"
MAGIC = "holdfast/1"


class StoredTensor(msgspec.Struct, frozen=True, gc=False):
    """A tensor in a data file: canonical `dtype`, `shape`, `stride` in elements (None: C order), and the bytes
    `start` to `end` of the data region. `box` is (offsets, global shape) when it is a part of a larger tensor."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    stride: tuple[int, ...] | None
    start: int
    end: int
    box: tuple[tuple[int, ...], tuple[int, ...]] | None = None

    @property
    def nbytes(self) -> int:
        return self.end - self.start


@dataclass(frozen=True, slots=True)
class DataHeader:
    """A decoded header: tensors in data order, the digest blocks, their digests, and where the data starts."""

    tensors: tuple[StoredTensor, ...]
    blocks: tuple[Block, ...]
    digests: tuple[bytes, ...]
    data_start: int

    @property
    def file_bytes(self) -> int:
        return self.data_start + (self.tensors[-1].end if self.tensors else 0)


class _Entry(msgspec.Struct, forbid_unknown_fields=True):
    dtype: str
    shape: list[int]
    data_offsets: tuple[int, int]


class _Extra(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True):
    dtype: str | None = None
    stride: list[int] | None = None
    box: tuple[list[int], list[int]] | None = None


def lay_out(tensors: Sequence[StoredTensor]) -> list[StoredTensor]:
    """Return the tensors in data order (widest element first, then as given) with their offsets set.

    So every tensor starts at a multiple of its element's size, which vector instructions rely on.
    """
    order = sorted(range(len(tensors)), key=lambda i: -DTYPES[tensors[i].dtype].itemsize)
    out: list[StoredTensor] = []
    position = 0
    for i in order:
        t = tensors[i]
        size = math.prod(t.shape) * DTYPES[t.dtype].itemsize
        out.append(StoredTensor(t.name, t.dtype, t.shape, t.stride, position, position + size, t.box))
        position += size
    return out


def _entry(t: StoredTensor) -> _Entry:
    d = DTYPES[t.dtype]
    shape = list(t.shape) + ([d.carrier_per_element] if d.carrier_per_element > 1 else [])
    return _Entry(d.carrier, shape, (t.start, t.end))


def _extra(t: StoredTensor) -> _Extra | None:
    native = DTYPES[t.dtype].native
    if native and t.stride is None and t.box is None:
        return None
    return _Extra(
        dtype=None if native else t.dtype,
        stride=None if t.stride is None else list(t.stride),
        box=None if t.box is None else (list(t.box[0]), list(t.box[1])),
    )


def encode_header(tensors: Sequence[StoredTensor], digests: Sequence[bytes]) -> bytes:
    """Return the length prefix and header of a file that holds `tensors` (already laid out), padded to 4 KiB.

    Raises:
        InvalidFormat: a tensor has the name that safetensors reserves, or spans more than any reader can hold.
    """
    metadata = {"format": "pt", "holdfast": MAGIC, "digests": base64.b64encode(b"".join(digests)).decode()}
    extras = {t.name: extra for t in tensors if (extra := _extra(t)) is not None}
    if extras:
        metadata["layouts"] = msgspec.json.encode(extras).decode()
    body: dict[str, object] = {METADATA: metadata}
    for t in tensors:
        if t.name == METADATA:
            raise InvalidFormat(f"the tensor name {METADATA!r} is reserved by safetensors; rename the tensor")
        if not _is_bounded(t.shape, t.stride, DTYPES[t.dtype].itemsize):
            raise InvalidFormat(
                f"tensor {t.name!r} of shape {t.shape} and stride {t.stride} spans more than the format holds"
            )
        body[t.name] = _entry(t)
    raw = msgspec.json.encode(body)
    size = header_size(len(raw))
    return (size - PREFIX_BYTES).to_bytes(PREFIX_BYTES, "little") + raw.ljust(size - PREFIX_BYTES)


def header_size(json_bytes: int) -> int:
    """Return the padded size in bytes of prefix and header for a JSON text of `json_bytes`."""
    return -(-(PREFIX_BYTES + json_bytes) // ALIGNMENT) * ALIGNMENT


def declared_size(prefix: bytes, name: str) -> int:
    """Return how many bytes prefix and header take together, from the file's first eight bytes."""
    if len(prefix) < PREFIX_BYTES:
        raise Truncated(f"{name}: is {len(prefix)} bytes long; expected at least a header")
    size = PREFIX_BYTES + int.from_bytes(prefix[:PREFIX_BYTES], "little")
    if size > MAX_HEADER_BYTES or size % ALIGNMENT:
        raise InvalidFormat(
            f"{name}: declares a header of {size} bytes; expected a multiple of {ALIGNMENT} up to 1 GiB"
        )
    return size


def decode_header(raw: bytes, name: str) -> DataHeader:
    """Return what a header says, checked against every rule of the format; `name` is the file for the messages.

    Raises:
        InvalidFormat, Truncated: the header is not one that `encode_header` makes.
    """
    size = declared_size(raw, name)
    if len(raw) != size:
        raise Truncated(f"{name}: its header has {len(raw)} bytes; expected {size}")
    try:
        body = msgspec.json.decode(raw[PREFIX_BYTES:], type=dict[str, msgspec.Raw])
        metadata = msgspec.json.decode(body.pop(METADATA), type=dict[str, str])
        extras = msgspec.json.decode(metadata.get("layouts", "{}"), type=dict[str, _Extra])
        entries = {k: msgspec.json.decode(v, type=_Entry) for k, v in body.items()}
        blob = base64.b64decode(metadata["digests"], validate=True)
    except (KeyError, ValueError, RecursionError) as e:
        raise InvalidFormat(f"{name}: its header is not a holdfast safetensors header: {e}") from e
    tensors = tuple(_stored(k, entry, extras.get(k), name) for k, entry in entries.items())
    _check_contiguous(tensors, name)
    if (
        tensors and tensors[-1].end > len(blob) // DIGEST_BYTES * BLOCK_BYTES
    ):  # before a claim of exabytes is cut up
        raise InvalidFormat(f"{name}: {tensors[-1].end} bytes of data have more blocks than it holds digests")
    blocks = tuple(cut_blocks([(t.nbytes, t.shape) for t in tensors]))
    digests = tuple(blob[i : i + DIGEST_BYTES] for i in range(0, len(blob), DIGEST_BYTES))
    if len(blob) != DIGEST_BYTES * len(blocks):
        raise InvalidFormat(f"{name}: holds {len(digests)} digests for {len(blocks)} blocks")
    if encode_header(tensors, digests) != raw:
        raise InvalidFormat(
            f"{name}: its header is not in the one form the format allows (order, spacing or a duplicate key)"
        )
    return DataHeader(tensors, blocks, digests, size)


def _stored(name: str, entry: _Entry, extra: _Extra | None, file: str) -> StoredTensor:
    check_path(name)
    if entry.dtype not in CARRIERS:
        raise InvalidFormat(f"{file}: tensor {name!r} has the unknown dtype {entry.dtype[:40]!r}")
    dtype = extra.dtype if extra is not None and extra.dtype is not None else CARRIERS[entry.dtype]
    if dtype not in DTYPES or DTYPES[dtype].carrier != entry.dtype:
        raise InvalidFormat(
            f"{file}: tensor {name!r} says it is {dtype[:40]!r} but is carried as {entry.dtype}"
        )
    d = DTYPES[dtype]
    shape = tuple(entry.shape)
    if d.carrier_per_element > 1:
        if not shape or shape[-1] != d.carrier_per_element:
            raise InvalidFormat(f"{file}: tensor {name!r} of {dtype} has the carrier shape {shape!s:.80}")
        shape = shape[:-1]
    start, end = entry.data_offsets
    stride = tuple(extra.stride) if extra is not None and extra.stride is not None else None
    if not _is_bounded(shape, stride, d.itemsize):
        raise InvalidFormat(
            f"{file}: tensor {name!r} has the impossible shape {shape!s:.80} or stride {stride!s:.80}"
        )
    if math.prod(shape) * d.itemsize != end - start:
        raise InvalidFormat(
            f"{file}: tensor {name!r} of shape {shape} and type {dtype} does not fill bytes {start} to {end}"
        )
    return StoredTensor(name, dtype, shape, stride, start, end, _box(name, shape, extra, file))


def _is_bounded(shape: tuple[int, ...], stride: tuple[int, ...] | None, itemsize: int) -> bool:
    """Return whether no reader's arithmetic overflows; empty dimensions count as 1, as they do in numpy."""
    if len(shape) > MAX_DIMENSIONS or min(shape, default=0) < 0:
        return False
    if math.prod(max(n, 1) for n in shape) * itemsize > MAX_EXTENT:
        return False
    return stride is None or (
        len(stride) == len(shape) and all(0 <= s * itemsize <= MAX_EXTENT for s in stride)
    )


def _box(
    name: str, shape: tuple[int, ...], extra: _Extra | None, file: str
) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    if extra is None or extra.box is None:
        return None
    offsets, whole = tuple(extra.box[0]), tuple(extra.box[1])
    inside = len(offsets) == len(whole) == len(shape) and all(
        o >= 0 and o + n <= w <= MAX_EXTENT for o, n, w in zip(offsets, shape, whole, strict=True)
    )
    if not inside:
        raise InvalidFormat(
            f"{file}: tensor {name!r} of shape {shape} at {offsets!s:.80} does not lie inside {whole!s:.80}"
        )
    return offsets, whole


def _check_contiguous(tensors: Sequence[StoredTensor], file: str) -> None:
    position = 0
    for t in tensors:
        if t.start != position:
            raise InvalidFormat(
                f"{file}: tensor {t.name!r} starts at byte {t.start}; expected {position} (no holes, no overlap)"
            )
        position = t.end


def by_name(header: DataHeader) -> Mapping[str, StoredTensor]:
    """Return the header's tensors by name."""
    return {t.name: t for t in header.tensors}
