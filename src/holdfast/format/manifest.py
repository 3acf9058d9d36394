"""The manifest: the commit record of one checkpoint, as sealed JSON.

A manifest lists, for every top-level key of the state (a *part*), the tree of its non-tensor values and the data files
its tensors live in. A tensor is found in the first listed file that has its name: an unchanged tensor is not written
again, its older file is listed behind the new one.

Version 2 is written where version 1 does not do: for a checkpoint in which a tensor follows from another one.
"""

from __future__ import annotations

import json
import math
import re

import msgspec

from holdfast.core.clock import Clock
from holdfast.core.dtypes import DTYPES
from holdfast.core.errors import InvalidFormat, UnsupportedVersion
from holdfast.core.names import check_key, check_path
from holdfast.format.boxes import is_bounded
from holdfast.format.datafile import MAX_HEADER_BYTES
from holdfast.format.documents import Attempt, Count, Moment, Name, StepNumber, refuse_twins
from holdfast.format.sealed import seal, unseal
from holdfast.format.values import decode_value

__all__ = [
    "DERIVED_DTYPE",
    "DERIVED_FROM",
    "DERIVED_VERSION",
    "FORMAT_VERSION",
    "Derived",
    "FileEntry",
    "Manifest",
    "Part",
    "check_ties",
    "clock_from_doc",
    "clock_to_doc",
    "decode_manifest",
    "encode_manifest",
    "floats_from_doc",
    "floats_to_doc",
]

FORMAT_VERSION = 1
DERIVED_VERSION = 2  # of manifests that know derived tensors
DERIVED_FROM, DERIVED_DTYPE = "float32", "bfloat16"
_HEX_DIGEST = re.compile(r"[0-9a-f]{64}")

ClockDoc = tuple[Count, Count, Count, Count, float]


class FileEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A data file: its key in the run, its size, and the size and BLAKE3 digest (hex) of its header."""

    key: str
    size: int  # bounded by what the store holds
    header_size: int
    header_digest: str


class Derived(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """A bfloat16 tensor that is stored nowhere: the rounding of `source`, a stored float32 tensor of the same
    shape, by its full name. `digest` is the BLAKE3 (hex) of its bytes, `stride` as in a data file."""

    source: str
    shape: tuple[Count, ...]
    digest: str
    stride: tuple[Count, ...] | None = None


class Part(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """One top-level key of the state: its value tree (kept as JSON until asked for), what kind of object it was,
    its files (newest first), its tied names (alias to stored tensor, by full name), its tensors that follow from others
    (by full name)."""

    tree: msgspec.Raw = msgspec.Raw(b"null")
    kind: str = ""
    files: list[FileEntry] = []
    aliases: dict[str, str] = {}
    derived: dict[str, Derived] = {}

    def values(self, name: str) -> object:
        """Return the decoded value tree, with `TensorLeaf` where tensors are; `name` is the part's own.

        Raises:
            InvalidFormat: the tree is outside the grammar.
        """
        try:
            tree = msgspec.json.decode(self.tree)
            if not _is_as_written(tree, self.tree):
                json.loads(bytes(self.tree), object_pairs_hook=refuse_twins)
            return decode_value(tree, name)
        except (ValueError, RecursionError) as e:
            raise InvalidFormat(f"a value tree is malformed: {e}") from e


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """Everything a checkpoint is, but the tensors' bytes. Times are seconds since the Unix epoch."""

    format: int
    run: Name
    step: StepNumber
    attempt: Attempt
    generation: Count
    time: Moment
    clock: ClockDoc
    parts: dict[str, Part]
    metrics: dict[str, float | str] = {}
    reasons: list[str] = []
    parent: Attempt | None = None
    new_bytes: Count = 0
    exact: bool = True
    demoted: bool = False
    world_size: Count = 1
    environment: dict[str, str] = {}
    loop: dict[str, Count] = {}

    def part_of(self, path: str) -> str:
        """Return the part that a full tensor name belongs to.

        Raises:
            InvalidFormat: it belongs to none.
        """
        part = path
        while part not in self.parts:
            part, found, _ = part.rpartition("/")
            if not found:
                raise InvalidFormat(f"{path}: belongs to no part of step {self.step}")
        return part

    @property
    def derived(self) -> dict[str, Derived]:
        """All tensors that follow from others, by full name."""
        return {name: d for part in self.parts.values() for name, d in part.derived.items()}

    @property
    def file_sizes(self) -> dict[str, int]:
        """The sizes of all data files this checkpoint needs, by key."""
        return {f.key: f.size for part in self.parts.values() for f in part.files}

    @property
    def stored_bytes(self) -> int:
        """Bytes of all data files this checkpoint refers to."""
        return sum(self.file_sizes.values())

    @property
    def file_keys(self) -> frozenset[str]:
        """Keys of all data files this checkpoint needs."""
        return frozenset(self.file_sizes)


def _is_as_written(tree: object, raw: msgspec.Raw) -> bool:
    """Return whether encoding a tree gives its text again; then no key occurs twice in it. False proves nothing."""
    try:
        return msgspec.json.encode(tree) == bytes(raw)
    except OverflowError:  # a number beyond 64 bits, which we never write
        return False


class _Version(msgspec.Struct):
    format: int


def clock_to_doc(clock: Clock) -> ClockDoc:
    """Return the clock as the array the format keeps."""
    return (clock.step, clock.epoch, clock.samples, clock.tokens, clock.active_seconds)


def clock_from_doc(doc: ClockDoc) -> Clock:
    """Return the clock that an array stands for."""
    return Clock(*doc)


def floats_to_doc(values: dict[str, float]) -> dict[str, float | str]:
    """Return metrics as JSON can hold them: finite floats exactly, the others as "nan", "inf", "-inf"."""
    return {k: v if math.isfinite(v) else repr(v) for k, v in values.items()}


def floats_from_doc(doc: dict[str, float | str]) -> dict[str, float]:
    """Return the metrics that a JSON form stands for."""
    try:
        return {k: float(v) for k, v in doc.items()}
    except ValueError as e:
        raise InvalidFormat(f"a metric is not a number: {e}") from e


def encode_manifest(manifest: Manifest) -> bytes:
    """Return the sealed bytes of a manifest."""
    return seal(msgspec.json.encode(manifest))


def decode_manifest(raw: bytes, name: str) -> Manifest:
    """Return the manifest in `raw`, verified; `name` is its key for the messages.

    Raises:
        IntegrityError: it is cut off, changed, or outside the grammar.
        UnsupportedVersion: a newer holdfast wrote it.
    """
    body = unseal(raw, name)
    check_version(body, name, DERIVED_VERSION)
    try:
        _check_members(body)
        manifest = msgspec.json.decode(body, type=Manifest)
        for part_name, part in manifest.parts.items():
            check_path(part_name)
            for file in part.files:
                _check_file(file, name)
        check_ties(manifest)
        _check_derived(manifest)
    except (ValueError, RecursionError) as e:
        raise InvalidFormat(f"{name}: is not a manifest: {e}") from e
    return manifest


def _check_members(body: bytes) -> None:
    """Refuse keys that occur twice, down to the members of each part, by putting the pieces together again."""
    whole = msgspec.json.decode(body, type=dict[str, msgspec.Raw])
    parts = msgspec.json.decode(whole.get("parts", b"{}"), type=dict[str, msgspec.Raw])
    rebuilt = {key: msgspec.json.decode(part, type=dict[str, msgspec.Raw]) for key, part in parts.items()}
    if msgspec.json.encode({**whole, "parts": rebuilt} if "parts" in whole else whole) != body:
        raise ValueError("a key occurs twice, or it has spaces between its members")
    for members in rebuilt.values():
        derived = members.get("derived", msgspec.Raw(b"{}"))
        if msgspec.json.encode(msgspec.json.decode(derived, type=dict[str, Derived])) != bytes(derived):
            raise ValueError("what it says of derived tensors is not in the one form")


def check_version(body: bytes, name: str, newest: int = FORMAT_VERSION) -> None:
    """Raise UnsupportedVersion when a document's format number is not one from 1 to `newest`."""
    try:
        version = msgspec.json.decode(body, type=_Version).format
    except (ValueError, RecursionError) as e:
        raise InvalidFormat(f"{name}: has no format number: {e}") from e
    if not FORMAT_VERSION <= version <= newest:
        known = (
            f"version {newest}" if newest == FORMAT_VERSION else f"the versions {FORMAT_VERSION} to {newest}"
        )
        raise UnsupportedVersion(
            f"{name}: has format version {version}; this holdfast reads {known}. "
            "Install a newer holdfast (pip install --upgrade holdfast) to read it"
        )


def check_ties(manifest: Manifest) -> None:
    """Raise InvalidFormat for a tie that leads to another tie, or to itself: each must lead to a stored tensor."""
    tied = {alias for part in manifest.parts.values() for alias in part.aliases}
    for part in manifest.parts.values():
        for alias, target in part.aliases.items():
            if target in tied:
                raise InvalidFormat(f"{alias[:80]!r} is tied to {target[:80]!r}, which is tied itself")


def _check_derived(manifest: Manifest) -> None:
    """Refuse a tensor that follows from one that is tied or follows from another itself, or in a wrong version."""
    derived = manifest.derived
    if (manifest.format == DERIVED_VERSION) != bool(derived):
        raise ValueError(f"version {manifest.format} with {len(derived)} derived tensors")
    tied = {alias for part in manifest.parts.values() for alias in part.aliases}
    for part_name, part in manifest.parts.items():
        for name, d in part.derived.items():
            if manifest.part_of(check_path(name)) != part_name or name in tied:
                raise ValueError(f"{name[:80]!r} is derived in a part that is not its own, or tied")
            if check_path(d.source) in derived or d.source in tied or not manifest.part_of(d.source):
                raise ValueError(f"{name[:80]!r} follows from {d.source[:80]!r}, which is stored nowhere")
            bounded = is_bounded(d.shape, d.stride, DTYPES[DERIVED_FROM].itemsize)
            if not bounded or not _HEX_DIGEST.fullmatch(d.digest):
                raise ValueError(f"the entry for {name[:80]!r} is malformed")


def _check_file(file: FileEntry, name: str) -> None:
    check_key(file.key)
    if not file.key.startswith("data/"):
        raise InvalidFormat(f"{name}: refers to {file.key!r}, which is outside data/")
    sizes_fit = 0 < file.header_size <= min(file.size, MAX_HEADER_BYTES)
    if not sizes_fit or not _HEX_DIGEST.fullmatch(file.header_digest):
        raise InvalidFormat(f"{name}: its entry for {file.key} is malformed")
