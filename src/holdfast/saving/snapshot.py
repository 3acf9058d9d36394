"""Snapshot: a copy of the state in host memory, taken at a safe point, laid out exactly as the files will be.

Three steps: a plan, memory for it, the copy. The copy is made at once, or behind the next forward and backward pass.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from holdfast.core.collector import collector_held
from holdfast.core.memory import address, page_aligned
from holdfast.saving.arena import Arena
from holdfast.saving.image import Image, PartImage
from holdfast.saving.overlap import Overlap, Piece
from holdfast.saving.plan import Layout, Plan, Planner, plan_once
from holdfast.saving.progress import Progress
from holdfast.state.adapter import Engine
from holdfast.state.capture import CaptureReport
from holdfast.state.tensors import TensorSource
from holdfast.state.transfer import Lot, Stretch, Transfer

__all__ = ["Snapshot", "Snapshotter", "place", "take_snapshot", "way"]

MEMORIES = 2  # for how many pieces of memory, used in turn, the copy is kept ready
WORTH_BYTES = 1 << 20  # less than this is copied at once


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
        with collector_held(), self._failing():
            self._transfer.copy(self._sources)
            self._sources.clear()  # who waits for the image holds no tensor of the step
            self.progress.advance(
                self.progress.total
            )  # not before: a writer at work would slow the copy down

    def copy_behind(self, *, check: bool = False) -> Overlap | None:
        """Copy at once what a forward or backward pass may change, and start to copy the rest behind them; return what
        does that, or None when everything was copied at once. `check`: compare with what was there at the start."""
        pieces: list[Piece] = []
        values: list[object] = []
        at_once: list[Lot] = []
        engine: Engine | None = None
        with collector_held(), self._failing():
            for lot in self._transfer.lots:
                of_lot = self._steady(lot)
                if of_lot:
                    engine = lot.engine
                    pieces += of_lot
                    values += [s.value for s in self._sources[lot.start : lot.stop]]
                else:
                    at_once.append(lot)
            self._transfer.copy(self._sources, at_once)
            self._sources.clear()
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
    """Takes snapshots of one state, again and again."""

    def __init__(
        self, state: Mapping[str, object], *, rng: bool = True, planner: Planner | None = None
    ) -> None:
        self._planner = planner or Planner(state, rng=rng)
        self._layout: Layout | None = None  # that the transfers are of
        self._transfers: dict[tuple[int, ...], Transfer] = {}

    def plan(self, *, gradients: bool = False, ahead: bool = False) -> Plan:
        """Find out what there is to copy; see `Planner.plan`."""
        return self._planner.plan(gradients=gradients, ahead=ahead)

    def prewarm(self, plan: Plan, arena: Arena) -> None:
        """Have memory ready in an arena, in the background, for what was planned."""
        sizes = plan.layout.sizes
        if not arena.fits(sizes):
            self._transfers.clear()  # they hold on to the memory that the arena gives up
            arena.prewarm(sizes)

    def prepare(self, plan: Plan, arena: Arena) -> Snapshot:
        """Give what was planned its place in the arena; `Snapshot.copy` is still to come."""
        with collector_held():
            if plan.layout is not self._layout or not arena.fits(plan.layout.sizes):
                self._transfers.clear()  # they hold on to the memory that the arena gives up
            self._layout = plan.layout
            pieces = arena.reserve(plan.layout.sizes)
            return place(plan, arena, pieces, self._way(plan, pieces))

    def _way(self, plan: Plan, pieces: list[memoryview]) -> Transfer:
        if not self._planner.lasts(plan):
            return way(plan, pieces)
        memory = tuple(address(piece) if len(piece) else 0 for piece in pieces)
        known = self._transfers.pop(memory, None) or way(plan, pieces)
        self._transfers = dict([*self._transfers.items(), (memory, known)][-MEMORIES:])
        return known


def take_snapshot(
    state: Mapping[str, object], arena: Arena, *, gradients: bool = False, rng: bool = True
) -> Snapshot:
    """Copy a state into the arena once. Raises what `Planner.plan` does."""
    plan = plan_once(state, gradients=gradients, rng=rng)
    pieces = arena.reserve(plan.layout.sizes)
    found = place(plan, arena, pieces, way(plan, pieces))
    found.copy()
    return found


def way(plan: Plan, pieces: Sequence[memoryview]) -> Transfer:
    """Return the way of the tensors of a plan into these pieces of memory, one for each part."""
    stretches: list[Stretch] = []
    offset = 0
    for piece, tensors in zip(pieces, plan.layout.tensors.values(), strict=True):
        stretches.append(Stretch(piece, offset, [(t.start, t.end) for t in tensors]))
        offset += page_aligned(len(piece))
    return Transfer(plan.sources, plan.layout.lasting, stretches)


def place(plan: Plan, arena: Arena, pieces: Sequence[memoryview], transfer: Transfer) -> Snapshot:
    """Return the snapshot of a plan that has its place in these pieces of the arena."""
    parts: dict[str, PartImage] = {}
    offset = end = 0
    layout = plan.layout
    for (part, tensors), piece in zip(layout.tensors.items(), pieces, strict=True):
        parts[part] = PartImage(
            plan.trees[part], plan.kinds[part], layout.aliases[part], tensors, piece, offset
        )
        end = offset + len(piece)
        offset = page_aligned(end)
    progress = Progress(end)
    return Snapshot(
        Image(parts, progress, arena.memory, plan.agreement), plan.report, progress, plan.sources, transfer
    )
