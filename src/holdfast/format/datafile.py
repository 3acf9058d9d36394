"""Data files: plain safetensors, with our digests and layouts in the header's `__metadata__`.

A data file has exactly one byte form: the header that `encode_header` makes for its tensors. A header that differs in
any way (order, spacing, a duplicate key) is refused. Other programs read the file as ordinary safetensors.

Version 2 is written where version 1 does not do: for tensors that have more than one block, and for parts of tensors.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import msgspec

from holdfast.core.dtypes import CARRIERS, DTYPES
from holdfast.core.errors import InvalidFormat, Truncated, UnsupportedVersion
from holdfast.core.names import check_path
from holdfast.format.boxes import MAX_EXTENT, Box, Rows, Run, fits, is_bounded, runs
from holdfast.format.digest import BLOCK_BYTES, DIGEST_BYTES, Block, cut_blocks

__all__ = [
    "DataHeader",
    "OpenHeader",
    "StoredTensor",
    "decode_header",
    "encode_header",
    "header_size",
    "lay_out",
    "open_header",
]

ALIGNMENT = 4096
PREFIX_BYTES = 8
MAX_HEADER_BYTES = 1 << 30
METADATA = "__metadata__"
_METADATA_END = b'"},"'  # the end of its last string, its own, and the beginning of a tensor's name
MAGICS = {"holdfast/1": 1, "holdfast/2": 2}


class StoredTensor(msgspec.Struct, frozen=True, gc=False):
    """A tensor in a data file: canonical `dtype`, `shape`, `stride` in elements (None: C order), and the bytes
    `start` to `end` of the data region. `box` is (offsets, global shape) when it is a part of a larger tensor; where
    it is not one stretch of rows but several, `rows` has the (first, end) of each in the whole."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    stride: tuple[int, ...] | None
    start: int
    end: int
    box: Box | None = None
    rows: Rows | None = None

    @property
    def nbytes(self) -> int:
        return self.end - self.start

    @property
    def whole_shape(self) -> tuple[int, ...]:
        """The shape of the tensor that this is all of, or a part of."""
        return self.shape if self.box is None else self.box[1]

    def runs(self) -> Iterator[Run]:
        """Yield where its bytes lie in the whole, as runs in rising order."""
        return runs(self.shape, self.box, self.rows, _ITEM_BYTES[self.dtype])


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


class _Member(msgspec.Struct, forbid_unknown_fields=True, gc=False):
    """A tensor in the header."""

    dtype: str
    shape: tuple[int, ...]
    data_offsets: tuple[int, int]


class _Metadata(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True):
    """The first member of the header, `__metadata__`: safetensors allows strings only."""

    format: str
    holdfast: str
    digests: str
    layouts: str = ""


class _Front(msgspec.Struct, rename={"metadata": METADATA}):
    metadata: _Metadata


class _Extra(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True):
    dtype: str | None = None
    stride: list[int] | None = None
    box: Box | None = None
    rows: list[tuple[int, int]] | None = None


_decoder = msgspec.json.Decoder(dict[str, _Member])
_front_decoder = msgspec.json.Decoder(_Front)
_ITEM_BYTES = {name: d.itemsize for name, d in DTYPES.items()}
_NATIVE = frozenset(name for name, d in DTYPES.items() if d.native)


def lay_out(tensors: Sequence[StoredTensor]) -> list[StoredTensor]:
    """Return the tensors in data order (widest element first, then as given) with their offsets set.

    So every tensor starts at a multiple of its element's size, which vector instructions rely on.
    """
    out: list[StoredTensor] = []
    position = 0
    for t in sorted(tensors, key=lambda t: -_ITEM_BYTES[t.dtype]):
        end = position + math.prod(t.shape) * _ITEM_BYTES[t.dtype]
        out.append(StoredTensor(t.name, t.dtype, t.shape, t.stride, position, end, t.box, t.rows))
        position = end
    return out


@dataclass(frozen=True, slots=True)
class OpenHeader:
    """A header without its digests. Their number and so the header's `size` in bytes are known before they are."""

    blocks: tuple[Block, ...]
    size: int
    _magic: str
    _layouts: str
    _members: bytes

    def close(self, digests: Sequence[bytes]) -> bytes:
        """Return the length prefix and header, given the digest of each block."""
        raw = _body(digests, self._magic, self._layouts, self._members)
        size = header_size(len(raw))
        return (size - PREFIX_BYTES).to_bytes(PREFIX_BYTES, "little") + raw.ljust(size - PREFIX_BYTES)


def open_header(tensors: Sequence[StoredTensor]) -> OpenHeader:
    """Return the header of a file that will hold `tensors` (already laid out), padded to 4 KiB, but for the digests.

    Raises:
        InvalidFormat: a tensor has the name that safetensors reserves, or spans more than any reader can hold.
    """
    members: dict[str, _Member] = {}
    bounded: set[tuple[str, tuple[int, ...]]] = set()
    for t in tensors:
        kind = (t.dtype, t.shape)
        if t.stride is not None or kind not in bounded:
            if not is_bounded(t.shape, t.stride, _ITEM_BYTES[t.dtype]):
                raise InvalidFormat(
                    f"tensor {t.name!r} of shape {t.shape} and stride {t.stride} spans more than the format holds"
                )
            bounded.add(kind)
        members[t.name] = _member(t)
    if METADATA in members:
        raise InvalidFormat(f"the tensor name {METADATA!r} is reserved by safetensors; rename the tensor")
    magic = "holdfast/2" if any(map(_needs_version_2, tensors)) else "holdfast/1"
    blocks = _blocks(tensors, MAGICS[magic])
    layouts = _layouts(tensors)
    encoded = msgspec.json.encode(members)
    size = header_size(len(_body([bytes(DIGEST_BYTES)] * len(blocks), magic, layouts, encoded)))
    return OpenHeader(blocks, size, magic, layouts, encoded)


def _needs_version_2(t: StoredTensor) -> bool:
    return t.box is not None or t.end - t.start > BLOCK_BYTES[2]


def _blocks(tensors: Sequence[StoredTensor], version: int) -> tuple[Block, ...]:
    return tuple(cut_blocks([(t.end - t.start, t.shape) for t in tensors], version))


def _member(t: StoredTensor) -> _Member:
    d = DTYPES[t.dtype]
    shape = t.shape if d.carrier_per_element == 1 else (*t.shape, d.carrier_per_element)
    return _Member(d.carrier, shape, (t.start, t.end))


def _layouts(tensors: Sequence[StoredTensor]) -> str:
    """Return the JSON text of what safetensors has no place for; empty where it says all."""
    extras = {
        t.name: _extra(t)
        for t in tensors
        if t.stride is not None or t.box is not None or t.dtype not in _NATIVE
    }
    return msgspec.json.encode(extras).decode() if extras else ""


def _extra(t: StoredTensor) -> _Extra:
    return _Extra(
        dtype=None if t.dtype in _NATIVE else t.dtype,
        stride=None if t.stride is None else list(t.stride),
        box=t.box,
        rows=None if t.rows is None else list(t.rows),
    )


def _body(digests: Sequence[bytes], magic: str, layouts: str, members: bytes) -> bytes:
    """Return the JSON of a header: the metadata, then the members of the object `members`."""
    text = base64.b64encode(b"".join(digests)).decode()
    head = msgspec.json.encode(_Front(_Metadata("pt", magic, text, layouts)))
    return head[:-1] + b"," + members[1:] if len(members) > len(b"{}") else head


def encode_header(tensors: Sequence[StoredTensor], digests: Sequence[bytes]) -> bytes:
    """Return the length prefix and header of a file that holds `tensors` (already laid out), padded to 4 KiB.

    Raises:
        InvalidFormat: a tensor has the name that safetensors reserves, or spans more than any reader can hold.
    """
    return open_header(tensors).close(digests)


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
        UnsupportedVersion: a newer holdfast wrote it.
    """
    size = declared_size(raw, name)
    if len(raw) != size:
        raise Truncated(f"{name}: its header has {len(raw)} bytes; expected {size}")
    try:
        front, members = _cut(raw)
        metadata = _front_decoder.decode(front).metadata
        body = _decoder.decode(members)
        extras = msgspec.json.decode(metadata.layouts or "{}", type=dict[str, _Extra])
        blob = base64.b64decode(metadata.digests, validate=True)
    except (ValueError, RecursionError) as e:
        raise InvalidFormat(f"{name}: its header is not a holdfast safetensors header: {e}") from e
    version = _version(metadata.holdfast, extras, name)
    tensors = _tensors(body, extras, name)
    _check_contiguous(tensors, name)
    if (
        tensors and tensors[-1].end > len(blob) // DIGEST_BYTES * BLOCK_BYTES[version]
    ):  # before exabytes are cut up
        raise InvalidFormat(f"{name}: {tensors[-1].end} bytes of data have more blocks than it holds digests")
    blocks = _blocks(tensors, version)
    digests = tuple(blob[i : i + DIGEST_BYTES] for i in range(0, len(blob), DIGEST_BYTES))
    if len(blob) != DIGEST_BYTES * len(blocks):
        raise InvalidFormat(f"{name}: holds {len(digests)} digests for {len(blocks)} blocks")
    # Every member was checked, so the text that they and the layouts make is the one `open_header` makes.
    layouts = _layouts(tensors) if extras else ""
    one_form = OpenHeader(blocks, size, metadata.holdfast, layouts, msgspec.json.encode(body))
    if METADATA in body or one_form.close(digests) != raw:
        raise InvalidFormat(
            f"{name}: its header is not in the one form the format allows (order, spacing or a duplicate key)"
        )
    return DataHeader(tensors, blocks, digests, size)


def _version(magic: str, extras: Mapping[str, _Extra], file: str) -> int:
    """Return the version that a header says it has; the first one knows no parts of tensors."""
    if magic not in MAGICS:
        if magic.startswith("holdfast/") and magic[9:].isdecimal():
            raise UnsupportedVersion(
                f"{file}: has version {magic[9:29]}; this holdfast reads data files of the versions 1 and 2. "
                "Install a newer holdfast (pip install --upgrade holdfast) to read it"
            )
        raise InvalidFormat(f"{file}: says it is {magic[:40]!r}; expected 'holdfast/1' or 'holdfast/2'")
    version = MAGICS[magic]
    if version == 1 and any(e.box is not None or e.rows is not None for e in extras.values()):
        raise InvalidFormat(f"{file}: holds parts of tensors, which version 1 does not know")
    return version


def _cut(raw: bytes) -> tuple[bytes, bytes]:
    """Return the text of a header as two objects, its metadata and its tensors.

    Where the metadata ends is found by its last characters, which no text inside it has but at the end of a string.
    A wrong cut is no harm: what comes of it does not make the header again.
    """
    at = raw.find(_METADATA_END, PREFIX_BYTES)
    if at < 0:
        return raw[PREFIX_BYTES:], b"{}"
    return raw[PREFIX_BYTES : at + 2] + b"}", b"{" + raw[at + 3 :]


def _tensors(
    body: Mapping[str, _Member], extras: Mapping[str, _Extra], file: str
) -> tuple[StoredTensor, ...]:
    """Return the tensors of a header. Those that are alike are checked once."""
    out: list[StoredTensor] = []
    alike: dict[tuple[str, tuple[int, ...], Box | None], StoredTensor] = {}
    for name, m in body.items():
        dtype, shape = m.dtype, m.shape
        start, end = m.data_offsets
        extra = extras.get(name)
        simple = extra is None or _only_box(extra)
        kind = (dtype, shape, None if extra is None else extra.box)
        first = alike.get(kind) if simple else None
        if first is None or first.end - first.start != end - start:
            t = _stored(name, (dtype, shape, start, end), extra, file)
            if simple:
                alike[kind] = t
        else:
            t = StoredTensor(check_path(name), first.dtype, first.shape, None, start, end, first.box)
        out.append(t)
    return tuple(out)


def _only_box(extra: _Extra) -> bool:
    return extra.dtype is None and extra.stride is None and extra.rows is None


def _stored(
    name: str, entry: tuple[str, tuple[int, ...], int, int], extra: _Extra | None, file: str
) -> StoredTensor:
    carrier, shape, start, end = entry
    check_path(name)
    if carrier not in CARRIERS:
        raise InvalidFormat(f"{file}: tensor {name!r} has the unknown dtype {carrier[:40]!r}")
    dtype = extra.dtype if extra is not None and extra.dtype is not None else CARRIERS[carrier]
    if dtype not in DTYPES or DTYPES[dtype].carrier != carrier:
        raise InvalidFormat(f"{file}: tensor {name!r} says it is {dtype[:40]!r} but is carried as {carrier}")
    d = DTYPES[dtype]
    if d.carrier_per_element > 1:
        if not shape or shape[-1] != d.carrier_per_element:
            raise InvalidFormat(f"{file}: tensor {name!r} of {dtype} has the carrier shape {shape!s:.80}")
        shape = shape[:-1]
    stride = tuple(extra.stride) if extra is not None and extra.stride is not None else None
    if not is_bounded(shape, stride, d.itemsize):
        raise InvalidFormat(
            f"{file}: tensor {name!r} has the impossible shape {shape!s:.80} or stride {stride!s:.80}"
        )
    if math.prod(shape) * d.itemsize != end - start:
        raise InvalidFormat(
            f"{file}: tensor {name!r} of shape {shape} and type {dtype} does not fill bytes {start} to {end}"
        )
    box, rows = _place(name, shape, extra, file)
    return StoredTensor(name, dtype, shape, stride, start, end, box, rows)


def _place(
    name: str, shape: tuple[int, ...], extra: _Extra | None, file: str
) -> tuple[Box | None, Rows | None]:
    """Return which part of a tensor this is."""
    if extra is None or (extra.box is None and extra.rows is None):
        return None, None
    box = extra.box if extra.box is not None else ((), ())
    rows = tuple(extra.rows) if extra.rows is not None else None
    if extra.box is None or not fits(shape, box, rows, MAX_EXTENT):
        raise InvalidFormat(
            f"{file}: tensor {name!r} of shape {shape} at {box[0]!s:.80}, rows {rows!s:.80}, "
            f"does not lie inside {box[1]!s:.80}"
        )
    return box, rows


def _check_contiguous(tensors: Sequence[StoredTensor], file: str) -> None:
    position = 0
    for t in tensors:
        if t.start != position:
            raise InvalidFormat(
                f"{file}: tensor {t.name!r} starts at byte {t.start}; expected {position} (no holes, no overlap)"
            )
        position = t.end
