"""Snapshot: a copy of the state in host memory, taken at a safe point, laid out exactly as the files will be."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import msgspec

from holdfast.core.errors import StateError
from holdfast.core.memory import page_aligned
from holdfast.core.names import check_path
from holdfast.format.datafile import METADATA, StoredTensor, lay_out
from holdfast.format.values import encode_value
from holdfast.saving.arena import Arena
from holdfast.saving.image import Image, PartImage
from holdfast.state.capture import Captured, CaptureReport, capture, copy_tensors
from holdfast.state.registry import family
from holdfast.state.rng import capture_rng
from holdfast.state.tensors import TensorSource, TensorSpec

__all__ = ["RNG_PART", "Snapshot", "expected_sizes", "take_snapshot"]

RNG_PART = "rng"


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A whole state in host memory, and what was found on the way; valid until its arena is used again."""

    image: Image
    report: CaptureReport


def expected_sizes(state: Mapping[str, object]) -> list[int]:
    """Return how many bytes each part of a snapshot of `state` takes, the random generators left out."""
    captured = capture(state)
    sizes = dict.fromkeys(captured.tree, 0)
    for source in captured.tensors:
        sizes[source.spec.name.partition("/")[0]] += source.spec.nbytes
    return list(sizes.values())


def take_snapshot(
    state: Mapping[str, object], arena: Arena, *, gradients: bool = False, rng: bool = True
) -> Snapshot:
    """Copy the state into the arena. Draws no random number and changes nothing.

    The state of every random generator is captured unasked, as the part "rng".

    Raises:
        UnsupportedValue: something cannot be stored without running code at load; nothing was written.
        StateError: a key of the state is reserved.
    """
    if rng and RNG_PART in state:
        raise StateError(
            f"state key {RNG_PART!r} is reserved: holdfast captures every random generator by itself; rename yours"
        )
    whole = {**state, RNG_PART: capture_rng()} if rng else state
    with _garbage_collection_paused():
        return _copy(whole, arena, gradients=gradients)


@contextlib.contextmanager
def _garbage_collection_paused() -> Iterator[None]:
    """Keep the collector from walking the whole program again and again while many small objects are made."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _copy(state: Mapping[str, object], arena: Arena, *, gradients: bool) -> Snapshot:
    captured = capture(state, gradients=gradients)
    sources = _by_part(captured)
    laid = {
        part: lay_out([_stored(name, s.spec) for name, s in found.items()]) for part, found in sources.items()
    }
    pieces = arena.reserve([t[-1].end if t else 0 for t in laid.values()])
    parts: dict[str, PartImage] = {}
    offset = 0
    ordered: list[TensorSource] = []
    targets: list[memoryview] = []
    for (part, tensors), piece in zip(laid.items(), pieces, strict=True):
        ordered += [sources[part][t.name] for t in tensors]
        targets += [piece[t.start : t.end] for t in tensors]
        aliases = {a: b for a, b in captured.aliases.items() if a.partition("/")[0] == part}
        # Encoding is the copy: nothing of the live state is shared with the snapshot afterwards.
        tree = msgspec.Raw(msgspec.json.encode(encode_value(captured.tree[part], part)))
        parts[part] = PartImage(tree, family(state[part]), aliases, tensors, piece, offset)
        offset += page_aligned(len(piece))
    copy_tensors(ordered, targets)
    return Snapshot(Image(parts, memory=arena.memory), captured.report)


def _by_part(captured: Captured) -> dict[str, dict[str, TensorSource]]:
    found: dict[str, dict[str, TensorSource]] = {check_path(part): {} for part in captured.tree}
    for source in captured.tensors:
        path = check_path(source.spec.name)
        part, _, name = path.partition("/")  # the keys of a state hold no slash
        if name == METADATA:
            raise StateError(f"{path}: data files reserve the name {METADATA!r}; rename that key")
        found[part][name or part] = source
    return found


def _stored(name: str, spec: TensorSpec) -> StoredTensor:
    return StoredTensor(name, spec.dtype, spec.shape, spec.stride, 0, 0)
