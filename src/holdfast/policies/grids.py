"""Rules of points along the run: every interval, listed steps, steps with growing gaps.

As a trigger such a rule fires when training crosses one of its points, as retention it keeps the first
checkpoint at or after each point. Both compare two neighbouring positions, so clocks that jump and steps off
the grid lose nothing.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from holdfast.core.errors import PolicyError
from holdfast.core.records import CheckpointRecord, Moment
from holdfast.policies.arguments import amount, only_one, whole
from holdfast.policies.intervals import LENGTHS, Interval, Unit, crosses, reading_of, recorded
from holdfast.policies.rules import Kept, Rule, identity

__all__ = ["At", "Every", "Grid", "LogSpaced", "at", "every", "log_spaced"]


@dataclass(frozen=True, slots=True, repr=False)
class Grid(Rule):
    """A rule of points on one counter of the clock."""

    triggers: ClassVar[bool] = True
    retains: ClassVar[bool] = True

    @property
    def unit(self) -> Unit:
        """The counter that the points lie on."""
        return "step"

    def crossed(self, previous: float, now: float) -> str | None:
        """Return which point lies after `previous` and at or before `now`, in words, or None."""
        raise NotImplementedError

    def crosses(self, previous: float, now: float) -> bool:
        """Return whether a point lies after `previous` and at or before `now`."""
        return self.crossed(previous, now) is not None

    def fires(self, moment: Moment) -> str | None:
        return self.crossed(reading_of(moment.previous, self.unit), reading_of(moment.now, self.unit))

    def keeps(self, records: Sequence[CheckpointRecord], now: float) -> Kept:
        kept: Kept = {}
        # Wall time has no zero that belongs to the run: its first checkpoint is the first of its interval.
        furthest: float | None = None if self.unit == "active_seconds" else 0
        unit, reasons = self.unit, (repr(self),)
        for record in records:
            here = recorded(record, unit)
            if furthest is None or self.crosses(furthest, here):
                kept[identity(record)] = reasons
            furthest = here if furthest is None else max(furthest, here)
        return kept


@dataclass(frozen=True, slots=True, repr=False)
class Every(Grid):
    """Points at `offset`, `offset + interval`, `offset + 2 * interval` and so on; made by `every()`."""

    interval: Interval
    offset: float = 0

    @property
    def unit(self) -> Unit:
        return self.interval.unit

    @property
    def per(self) -> Interval | None:
        return self.interval if self.offset == 0 else None

    def crossed(self, previous: float, now: float) -> str | None:
        return f"every {self.interval}" if self.crosses(previous, now) else None

    def crosses(self, previous: float, now: float) -> bool:
        shift = self.offset * LENGTHS[self.interval.name][1]
        return crosses(previous, now, self.interval.length, shift)

    def __repr__(self) -> str:
        offset = f", offset={self.offset!r}" if self.offset else ""
        return f"every({self.interval.name}={self.interval.count!r}{offset})"


@dataclass(frozen=True, slots=True, repr=False)
class At(Grid):
    """Listed steps; made by `at()`."""

    steps: tuple[int, ...]

    def crossed(self, previous: float, now: float) -> str | None:
        index = bisect_right(self.steps, now) - 1
        return f"at step {self.steps[index]}" if index >= 0 and self.steps[index] > previous else None

    def __repr__(self) -> str:
        return f"at({list(self.steps)!r})"


@dataclass(frozen=True, slots=True, repr=False)
class LogSpaced(Grid):
    """Steps 1, base, base squared and so on, rounded up; made by `log_spaced()`."""

    base: float
    until_step: int | None = None

    def crossed(self, previous: float, now: float) -> str | None:
        if now < 1 or now <= previous:
            return None
        power = max(0, math.floor(math.log(max(previous, 1), self.base)) - 1)
        found = 0
        while (point := math.ceil(self.base**power)) <= now:
            if point > previous and (self.until_step is None or point <= self.until_step):
                found = point
            power += 1
        return f"log-spaced step {found}" if found else None

    def __repr__(self) -> str:
        until = "" if self.until_step is None else f", until={self.until_step}"
        return f"log_spaced(base={self.base!r}{until})"


def every(
    *,
    steps: int | None = None,
    epochs: int | None = None,
    samples: int | None = None,
    tokens: float | None = None,
    seconds: float | None = None,
    minutes: float | None = None,
    hours: float | None = None,
    offset: float = 0,
) -> Every:
    """Save, or keep a checkpoint, once per interval.

    Takes exactly one unit; step 0 does not count. `offset`, in the same unit and below the interval, shifts
    the grid. As a trigger, time is active training time, which goes on counting over resumes; as retention it
    is the wall time of the checkpoints, on a grid in UTC. Raises PolicyError for an interval that is not
    above zero, and for a part of a step, epoch, sample or token.
    """
    given: dict[str, float | None] = {"steps": steps, "epochs": epochs, "samples": samples, "tokens": tokens}
    name, count = only_one("every", given | {"seconds": seconds, "minutes": minutes, "hours": hours})
    if name in given:
        count, offset = whole(name, count), whole("offset", offset, minimum=0)
    else:
        amount(name, count)
        amount("offset", offset, zero=True)
    if offset >= count:
        raise PolicyError(
            f"offset={offset!r} must be below the interval, {name}={count!r}; to start later use .after()"
        )
    return Every(Interval(name, count), offset)


def at(steps: Iterable[int]) -> At:
    """Save at the listed steps, or keep the first checkpoint at or after each of them.

    Raises PolicyError for an empty list and for steps below 1; to save before the first step use
    `on("start")`.
    """
    if isinstance(steps, (int, float, str)):
        raise PolicyError(f"at({steps!r}) takes a list of steps; write at([{steps!r}])")
    listed = tuple(sorted({whole("a step of at()", step) for step in steps}))
    if not listed:
        raise PolicyError("at([]) names no step; expected at least one")
    return At(listed)


def log_spaced(base: float = 2, until: int | None = None) -> LogSpaced:
    """Save, or keep a checkpoint, at steps 1, `base`, `base`², … up to and including `until`.

    This is the grid of studies of training dynamics: dense at the start, where a model changes most. Raises
    PolicyError unless `base` is at least 1.01.
    """
    if amount("base", base) < 1.01:
        raise PolicyError(f"base={base!r} must be at least 1.01, so that the points move apart")
    return LogSpaced(base, None if until is None else whole("until", until))
