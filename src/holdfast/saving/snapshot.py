"""Snapshot: a copy of the state in host memory, taken at a safe point, laid out exactly as the files will be.

Three steps: a plan (what goes where), memory for it, the copy. A plan is made once and then only brought up to date, as
long as the state keeps its structure and its tensors their memory. The copy is made at once, or behind the next forward
and backward pass.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import msgspec

from holdfast.core.errors import StateError, UnsupportedValue
from holdfast.core.memory import page_aligned
from holdfast.core.names import check_path
from holdfast.format.datafile import METADATA, StoredTensor, lay_out
from holdfast.format.values import encode_value
from holdfast.saving.arena import Arena
from holdfast.saving.image import Image, PartImage
from holdfast.saving.overlap import Overlap, Piece
from holdfast.saving.progress import Progress
from holdfast.state.adapter import Engine
from holdfast.state.capture import CaptureReport, capture
from holdfast.state.recapture import Recapture
from holdfast.state.registry import family
from holdfast.state.rng import capture_rng
from holdfast.state.tensors import TensorSource
from holdfast.state.transfer import Lot, Stretch, Transfer

__all__ = ["RNG_PART", "Snapshot", "Snapshotter", "take_snapshot"]

RNG_PART = "rng"
MEMORIES = 2  # for how many pieces of memory, used in turn, the copy is kept ready
WORTH_BYTES = 1 << 20  # less than this is copied at once


@dataclass(frozen=True, slots=True)
class Layout:
    """Where the tensors of each part stand in its file, and the tied names. `order` puts captured tensors so.

    `lasting` says of each tensor, in that order, whether all snapshots of this layout copy the same alias.
    """

    tensors: dict[str, list[StoredTensor]]
    aliases: dict[str, dict[str, str]]
    order: list[int]
    lasting: list[bool]

    @property
    def sizes(self) -> list[int]:
        """Bytes of each part's tensors."""
        return [tensors[-1].end if tensors else 0 for tensors in self.tensors.values()]


@dataclass(frozen=True, slots=True)
class Plan:
    """What a snapshot will hold: the encoded values of the parts, and the live tensors in the order of the layout."""

    layout: Layout
    trees: dict[str, msgspec.Raw]
    sources: list[TensorSource]
    report: CaptureReport


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A whole state that has its place in host memory, and what was found on the way; valid until its arena is used
    again. Its image tells how far the copy has come."""

    image: Image
    report: CaptureReport
    progress: Progress
    _sources: list[TensorSource]
    _transfer: Transfer

    def copy(self) -> None:
        """Copy the state as it is now."""
        with _garbage_collection_paused(), self._failing():
            self._transfer.copy(self._sources)
            self.progress.advance(
                self.progress.total
            )  # not before: a writer at work would slow the copy down

    def copy_behind(self, *, check: bool = False) -> Overlap | None:
        """Copy at once what a forward or backward pass may change, and start to copy the rest behind them; return what
        does that, or None when everything was copied at once. `check`: compare with what was there at the start."""
        pieces: list[Piece] = []
        values: list[object] = []
        engine: Engine | None = None
        with _garbage_collection_paused(), self._failing():
            for lot in self._transfer.lots:
                of_lot = self._steady(lot)
                if of_lot:
                    engine = lot.engine
                    pieces += of_lot
                    values += [s.value for s in self._sources[lot.start : lot.stop]]
                else:
                    self._transfer.copy(self._sources, [lot])
            if engine is None:
                self.progress.advance(self.progress.total)
                return None
            return Overlap(pieces, values, engine.versions, self.progress, check=check)

    def _steady(self, lot: Lot) -> list[Piece]:
        """Return the pieces of a lot that may be copied later, as they lie in memory."""
        if lot.volatile or lot.joined is not None or lot.end - lot.start_byte < WORTH_BYTES:
            return []
        sources = self._sources[lot.start : lot.stop]
        here = lot.engine.addresses([s.value for s in sources])
        there = lot.engine.addresses(lot.targets)
        if here is None or there is None:
            return []
        pieces: list[Piece] = []
        at = lot.start_byte
        for source, a, b in zip(sources, here, there, strict=True):
            pieces.append(Piece(source.spec.name, a, b, source.spec.nbytes, at))
            at += source.spec.nbytes
        return pieces

    @contextlib.contextmanager
    def _failing(self) -> Iterator[None]:
        """Tell those who wait for the image of what breaks its copy."""
        try:
            yield
        except BaseException as e:
            self.progress.fail(e)
            raise


class Snapshotter:
    """Takes snapshots of one state, again and again.

    `rng`: the state of every random generator is captured unasked, as the part "rng".
    """

    def __init__(self, state: Mapping[str, object], *, rng: bool = True) -> None:
        self._state = state
        self._rng = rng
        self._known: Recapture | None = None
        self._layout: Layout | None = None
        self._transfers: dict[tuple[int, ...], Transfer] = {}

    def prewarm(self, arena: Arena) -> None:
        """Have memory ready in an arena, in the background, for the state as it is."""
        with _garbage_collection_paused():
            sizes = self._plan(self._whole()).layout.sizes
        if not arena.fits(sizes):
            self._transfers.clear()  # they hold on to the memory that the arena gives up
            arena.prewarm(sizes)

    def prepare(self, arena: Arena, *, gradients: bool = False) -> Snapshot:
        """Find out what there is and give it its place in the arena; `Snapshot.copy` is still to come. Draws no random
        number and changes nothing.

        `gradients` adds the .grad of module parameters; such a snapshot costs a full capture.

        Raises:
            UnsupportedValue: something cannot be stored without running code at load; nothing was written.
            StateError: a key of the state is reserved.
        """
        with _garbage_collection_paused():
            state = self._whole()
            plan = plan_from_start(state, gradients=True) if gradients else self._plan(state)
            if not arena.fits(plan.layout.sizes):
                self._transfers.clear()  # they hold on to the memory that the arena gives up
            pieces = arena.reserve(plan.layout.sizes)
            return _snapshot(state, plan, arena, pieces, self._way(plan, pieces))

    def _whole(self) -> dict[str, object]:
        return with_generators(self._state) if self._rng else dict(self._state)

    def _plan(self, state: dict[str, object]) -> Plan:
        known, layout = self._known, self._layout
        sources = known.renew(state) if known is not None else None
        if known is None or layout is None or sources is None:
            self._known = self._layout = None
            self._transfers.clear()
            try:
                known = Recapture(state, anew=(RNG_PART,) if self._rng else ())
            except UnsupportedValue:
                return plan_from_start(state)  # which says what is wrong, if anything is
            sources = known.first()
            layout = _laid_out(state, sources, known.aliases, known.lasting)
            self._known, self._layout = known, layout
        ordered = [sources[i] for i in layout.order]
        return Plan(layout, dict(known.trees), ordered, known.report)

    def _way(self, plan: Plan, pieces: list[memoryview]) -> Transfer:
        if plan.layout is not self._layout:
            return _transfer(plan, pieces)
        memory = tuple(map(_address, pieces))
        way = self._transfers.pop(memory, None) or _transfer(plan, pieces)
        self._transfers = dict([*self._transfers.items(), (memory, way)][-MEMORIES:])
        return way


def take_snapshot(
    state: Mapping[str, object], arena: Arena, *, gradients: bool = False, rng: bool = True
) -> Snapshot:
    """Copy the state into the arena once; see `Snapshotter.take`."""
    with _garbage_collection_paused():
        whole = with_generators(state) if rng else dict(state)
        plan = plan_from_start(whole, gradients=gradients)
        pieces = arena.reserve(plan.layout.sizes)
        found = _snapshot(whole, plan, arena, pieces, _transfer(plan, pieces))
    found.copy()
    return found


def with_generators(state: Mapping[str, object]) -> dict[str, object]:
    """Return the state with the random generators as a further part. Raises StateError if it has such a part."""
    if RNG_PART in state:
        raise StateError(
            f"state key {RNG_PART!r} is reserved: holdfast captures every random generator by itself; rename yours"
        )
    return {**state, RNG_PART: capture_rng()}


def plan_from_start(state: Mapping[str, object], *, gradients: bool = False) -> Plan:
    """Return the plan of a state of which nothing is known."""
    captured = capture(state, gradients=gradients)
    once = [True] * len(captured.tensors)
    layout = _laid_out(state, captured.tensors, captured.aliases, once)
    # Encoding is the copy: nothing of the live state is shared with the snapshot afterwards.
    trees = {
        part: msgspec.Raw(msgspec.json.encode(encode_value(v, part))) for part, v in captured.tree.items()
    }
    ordered = [captured.tensors[i] for i in layout.order]
    return Plan(layout, trees, ordered, captured.report)


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


def _laid_out(
    parts: Iterable[str],
    sources: Sequence[TensorSource],
    aliases: Mapping[str, str],
    lasting: Sequence[bool],
) -> Layout:
    of_part: dict[str, list[StoredTensor]] = {check_path(part): [] for part in parts}
    numbers: dict[str, dict[str, int]] = {part: {} for part in of_part}
    for number, source in enumerate(sources):
        spec = source.spec
        part, _, name = check_path(spec.name).partition("/")  # the keys of a state hold no slash
        if name == METADATA:
            raise StateError(f"{spec.name}: data files reserve the name {METADATA!r}; rename that key")
        name = name or part
        of_part[part].append(StoredTensor(name, spec.dtype, spec.shape, spec.stride, 0, 0))
        numbers[part][name] = number
    tensors = {part: lay_out(found) for part, found in of_part.items()}
    tied: dict[str, dict[str, str]] = {part: {} for part in of_part}
    for alias, stored in aliases.items():
        tied[alias.partition("/")[0]][alias] = stored
    order = [numbers[part][t.name] for part, found in tensors.items() for t in found]
    return Layout(tensors, tied, order, [lasting[i] for i in order])


def _transfer(plan: Plan, pieces: Sequence[memoryview]) -> Transfer:
    stretches: list[Stretch] = []
    offset = 0
    for piece, tensors in zip(pieces, plan.layout.tensors.values(), strict=True):
        stretches.append(Stretch(piece, offset, [(t.start, t.end) for t in tensors]))
        offset += page_aligned(len(piece))
    return Transfer(plan.sources, plan.layout.lasting, stretches)


def _snapshot(
    state: Mapping[str, object], plan: Plan, arena: Arena, pieces: Sequence[memoryview], transfer: Transfer
) -> Snapshot:
    parts: dict[str, PartImage] = {}
    offset = end = 0
    layout = plan.layout
    for (part, tensors), piece in zip(layout.tensors.items(), pieces, strict=True):
        kind = family(state[part])
        parts[part] = PartImage(plan.trees[part], kind, layout.aliases[part], tensors, piece, offset)
        end = offset + len(piece)
        offset = page_aligned(end)
    progress = Progress(end)
    return Snapshot(Image(parts, progress, arena.memory), plan.report, progress, plan.sources, transfer)


def _address(piece: memoryview) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(piece)) if len(piece) else 0
