"""Triggers of the moment: an event, an idle writer, and the interval that a failure rate calls for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from holdfast.core.errors import PolicyError
from holdfast.core.records import Moment
from holdfast.core.units import exact_seconds, format_seconds, parse_seconds
from holdfast.policies.arguments import amount
from holdfast.policies.optimum import best_interval
from holdfast.policies.rules import Rule

__all__ = ["EVENTS", "Auto", "On", "WhenIdle", "auto", "on", "when_idle"]

EVENTS = ("start", "end", "epoch_end", "eval_end", "improved", "stop", "preempt", "exception")


@dataclass(frozen=True, slots=True, repr=False)
class On(Rule):
    """Fires on events; made by `on()`."""

    triggers: ClassVar[bool] = True
    instead: ClassVar[str] = "tagged(...) or where(...)"
    names: tuple[str, ...]

    def fires(self, moment: Moment) -> str | None:
        found = [name for name in self.names if name in moment.events]
        return f"on {' and '.join(found)}" if found else None

    def __repr__(self) -> str:
        return f"on({', '.join(map(repr, self.names))})"


@dataclass(frozen=True, slots=True, repr=False)
class WhenIdle(Rule):
    """Fires whenever no save is being written; made by `when_idle()`."""

    triggers: ClassVar[bool] = True
    instead: ClassVar[str] = "last(n), or every(...) for a history"
    min_gap_seconds: float = 0.0

    def fires(self, moment: Moment) -> str | None:
        if moment.save_in_flight or moment.now.step <= moment.last_save.step:
            return None
        gap = moment.now.active_seconds - moment.last_save.active_seconds
        return "no save in flight" if gap >= self.min_gap_seconds else None

    def __repr__(self) -> str:
        return f"when_idle(min_gap_seconds={self.min_gap_seconds!r})"


@dataclass(frozen=True, slots=True, repr=False)
class Auto(Rule):
    """Fires at the interval that measured cost and failure rate call for; made by `auto()`."""

    triggers: ClassVar[bool] = True
    instead: ClassVar[str] = "last(n), or every(...) for a history"
    max_overhead: float
    mtbf_seconds: float

    def fires(self, moment: Moment) -> str | None:
        if moment.save_in_flight or moment.now.step <= moment.last_save.step:
            return None
        if moment.save_seconds is None:
            return "first save, to measure its cost"
        interval = best_interval(moment.save_seconds, self.mtbf_seconds, self.max_overhead)
        if moment.now.active_seconds - moment.last_save.active_seconds < interval:
            return None
        return f"every {format_seconds(interval)}, as a save costs {format_seconds(moment.save_seconds)}"

    def __repr__(self) -> str:
        return f"auto(max_overhead={self.max_overhead!r}, mtbf={exact_seconds(self.mtbf_seconds)!r})"


def on(*events: str) -> On:
    """Save when any of the events happens.

    Events are "start" (before the first step), "end", "epoch_end", "eval_end" (a metric was logged that the
    save rule or early stopping speaks of), "improved" (the early-stop verdict), "stop", "preempt" and
    "exception". Raises PolicyError for any other name.
    """
    unknown = [event for event in events if event not in EVENTS]
    if unknown or not events:
        found = f"found {unknown[0]!r}" if unknown else "found none"
        raise PolicyError(f"on() takes one or more of {', '.join(map(repr, EVENTS))}; {found}")
    return On(tuple(dict.fromkeys(events)))


def when_idle(min_gap_seconds: float = 0) -> WhenIdle:
    """Save again as soon as the save before is written, with at least `min_gap_seconds` of training between.

    Raises PolicyError for a gap that is negative or not finite.
    """
    return WhenIdle(amount("min_gap_seconds", min_gap_seconds, zero=True))


def auto(max_overhead: float = 0.01, mtbf: str | float = "24h") -> Auto:
    """Save at the interval that loses the least time, from the measured cost of a save and the failure rate.

    `mtbf` is the mean time between failures of the whole job, in seconds or as text ("24h"); `max_overhead`
    is the largest fraction of training time that saving may take. Saves once early, to learn the cost (see
    `best_interval`). Raises PolicyError for a fraction outside 0 … 1 and for a duration that is not above
    zero.
    """
    if amount("max_overhead", max_overhead) > 1:
        raise PolicyError(f"max_overhead={max_overhead!r} must be a fraction of the training time, at most 1")
    return Auto(float(max_overhead), amount("mtbf", parse_seconds(mtbf)))
