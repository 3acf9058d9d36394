"""Tensors on their way into memory that is laid out already: cut into lots, and made ready once for many copies."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from holdfast.state.adapter import DeviceCopy, Engine, Joined
from holdfast.state.registry import dispatch
from holdfast.state.tensors import TensorSource

__all__ = ["Lot", "Stretch", "Transfer"]

LOT_BYTES = 32 << 20
WORTH_JOINING = 4


@dataclass(frozen=True, slots=True)
class Stretch:
    """One piece of memory, `offset` bytes into the whole, and the bounds of the tensors in it, in order and without
    gaps."""

    memory: memoryview
    offset: int
    bounds: Sequence[tuple[int, int]]


@dataclass(frozen=True, slots=True)
class Lot:
    """Neighbours in memory that are copied together: the sources `start` to `stop`, which take the bytes `start_byte`
    to `end` of the whole; all volatile, or none.

    They are moved in one go (`joined`), or one by one to `targets`, which lie at the addresses `places`.
    """

    start: int
    stop: int
    start_byte: int
    end: int
    volatile: bool
    engine: Engine
    joined: Joined | None
    targets: list[object]
    places: list[int] | None


class Transfer:
    """The way of these tensors into this memory. `lots` stand in the order of the memory.

    `lasting` says of each source whether every later copy is of the same alias.
    """

    def __init__(
        self, sources: Sequence[TensorSource], lasting: Sequence[bool], stretches: Iterable[Stretch]
    ) -> None:
        known = dispatch()
        self.lots: list[Lot] = []
        first = 0
        for stretch in stretches:
            here = sources[first : first + len(stretch.bounds)]
            last = lasting[first : first + len(here)]
            for start, stop, engine, join in _cut(here, last, known.engine_of):
                bounds = stretch.bounds[start:stop]
                lot = here[start:stop]
                joined, targets, places = None, [], None
                if join:
                    joined = engine.join([s.value for s in lot], stretch.memory[bounds[0][0] : bounds[-1][1]])
                else:
                    targets = engine.targets([s.spec for s in lot], [stretch.memory[a:b] for a, b in bounds])
                    places = engine.addresses(targets)
                a, b = stretch.offset + bounds[0][0], stretch.offset + bounds[-1][1]
                numbers = first + start, first + stop
                self.lots.append(Lot(*numbers, a, b, lot[0].volatile, engine, joined, targets, places))
            first += len(here)

    def copy(self, sources: Sequence[TensorSource], lots: Iterable[Lot] | None = None) -> None:
        """Copy the elements of `lots` (None: of all), as they are now, and return when they are there.

        `sources` are those of the beginning, or others of the same specs, with the same aliases where they last.
        Draws no random number.
        """
        for copy in self.start(sources, lots):
            copy.wait()

    def start(self, sources: Sequence[TensorSource], lots: Iterable[Lot] | None = None) -> list[DeviceCopy]:
        """As `copy`, but return what devices copy by themselves and may not be there yet."""
        begun: list[DeviceCopy | None] = []
        single: dict[Engine, tuple[list[object], list[object]]] = {}
        for lot in self.lots if lots is None else lots:
            here = sources[lot.start : lot.stop]
            if lot.joined is not None:
                begun.append(lot.joined.copy(here))
            else:
                some, targets = single.setdefault(lot.engine, ([], []))
                some += [source.value for source in here]
                targets += lot.targets
        begun += [engine.copy_out(some, targets) for engine, (some, targets) in single.items()]
        return [copy for copy in begun if copy is not None]


def _cut(
    sources: Sequence[TensorSource], lasting: Sequence[bool], engine_of: Callable[[object], Engine]
) -> Iterator[tuple[int, int, Engine, bool]]:
    """Yield (start, stop, engine, whether to join) for neighbours that have what matters in common."""

    def common(item: tuple[TensorSource, bool]) -> tuple[Engine, Hashable, bool]:
        source, lasts = item
        engine = engine_of(source.value)
        return engine, engine.joins(source.value, source.spec, lasting=lasts), source.volatile

    stop = 0
    for (engine, kind, _), group in itertools.groupby(zip(sources, lasting, strict=True), common):
        start, nbytes = stop, 0
        for source, _ in group:
            stop += 1
            nbytes += source.spec.nbytes
            if nbytes >= LOT_BYTES:
                yield start, stop, engine, kind is not None and stop - start >= WORTH_JOINING
                start, nbytes = stop, 0
        if start < stop:
            yield start, stop, engine, kind is not None and stop - start >= WORTH_JOINING
