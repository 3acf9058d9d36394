"""Snapshot: a copy of the state in host memory, taken at a safe point, laid out exactly as the files will be.

Three steps: a plan, memory for it, the copy. The copy is made at once, or behind the next forward and backward pass.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from holdfast.core.collector import collector_held
from holdfast.core.memory import address, page_aligned
from holdfast.saving.arena import Arena
from holdfast.saving.image import Image, PartImage
from holdfast.saving.overlap import Flight, Overlap, Piece, Watched, digest_at
from holdfast.saving.plan import Layout, Plan, Planner, plan_once
from holdfast.saving.progress import Progress
from holdfast.state.adapter import DeviceCopy
from holdfast.state.capture import CaptureReport
from holdfast.state.registry import pinning
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
        with collector_held(), self._failing():
            behind = _Behind(self, check=check)
            at_once = [lot for lot in self._transfer.lots if not behind.takes(lot)]
            begun = self._transfer.start(self._sources, at_once)
            self._sources.clear()
            found = behind.begun(begun)
            if found is None:
                self.progress.advance(self.progress.total)
            return found

    @contextlib.contextmanager
    def _failing(self) -> Iterator[None]:
        """Tell those who wait for the image of what breaks its copy."""
        try:
            yield
        except BaseException as e:
            self.progress.fail(e)
            raise


class _Behind:
    """What of a snapshot is copied later, as it is gathered."""

    def __init__(self, of: Snapshot, *, check: bool) -> None:
        self._of = of
        self._check = check
        self._here, self._there = (Watched(_no_versions, _no_addresses) for _ in range(2))
        self._pieces: list[Piece] = []
        self._flights: list[Flight] = []

    def takes(self, lot: Lot) -> bool:
        """Take a lot that may be copied later and say so; what devices copy they begin with here."""
        targets = lot.places
        if lot.volatile or targets is None or lot.end - lot.start_byte < WORTH_BYTES:
            return False
        sources = self._of._sources[lot.start : lot.stop]
        values = [s.value for s in sources]
        sizes = [s.spec.nbytes for s in sources]
        # Compared are bytes that are copied twice: now, and later over that.
        expected = self._copied_now(lot, targets, sizes) if self._check else []
        flight = lot.engine.copy_beside(values, lot.targets)
        if flight is not None:
            self._flights.append(Flight(lot.start_byte, flight))
        else:
            found = lot.engine.addresses(values)
            if found is None:
                return False
            places = itertools.accumulate(sizes, initial=lot.start_byte)
            self._pieces += map(Piece, found, targets, sizes, places)
        watched = self._here if flight is None else self._there
        watched.versions, watched.addresses = lot.engine.versions, lot.engine.addresses
        watched.names += [s.spec.name for s in sources]
        watched.values += values
        watched.copies += zip(targets, sizes, strict=True)
        watched.expected += expected
        return True

    def begun(self, at_once: Sequence[DeviceCopy]) -> Overlap | None:
        """Return what does the rest, if there is any, given what devices were told to copy at once."""
        flights = [Flight(0, copy) for copy in at_once] + self._flights
        if not (flights or self._pieces):
            return None
        return Overlap(self._here, self._pieces, self._there, flights, self._of.progress)

    def _copied_now(self, lot: Lot, targets: Sequence[int], sizes: Sequence[int]) -> list[bytes]:
        self._of._transfer.copy(self._of._sources, [lot])
        return list(map(digest_at, targets, sizes))


def _no_versions(values: Sequence[object]) -> list[int]:
    return [0] * len(values)


def _no_addresses(values: Sequence[object]) -> list[int] | None:
    return []


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
        self._let_pin(plan, arena)
        if not arena.fits(sizes):
            self._transfers.clear()  # they hold on to the memory that the arena gives up
            arena.prewarm(sizes)

    def prepare(self, plan: Plan, arena: Arena) -> Snapshot:
        """Give what was planned its place in the arena; `Snapshot.copy` is still to come."""
        with collector_held():
            if plan.layout is not self._layout or not arena.fits(plan.layout.sizes):
                self._transfers.clear()  # they hold on to the memory that the arena gives up
                self._let_pin(plan, arena)
            self._layout = plan.layout
            pieces = arena.reserve(plan.layout.sizes)
            return place(plan, arena, pieces, self._way(plan, pieces))

    def _let_pin(self, plan: Plan, arena: Arena) -> None:
        """Tell the arena whether its memory is to be such as devices copy to by themselves."""
        arena.pinning = pinning([source.value for source in plan.sources])

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
