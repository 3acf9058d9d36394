"""Intervals on the run's clock, and whether a stretch of training crosses one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

from holdfast.core.clock import Clock
from holdfast.core.records import CheckpointRecord

__all__ = ["LENGTHS", "Interval", "Unit", "crosses", "reading_of", "recorded"]

Unit: TypeAlias = Literal["step", "epoch", "samples", "tokens", "active_seconds"]

LENGTHS: dict[str, tuple[Unit, int]] = {
    "steps": ("step", 1),
    "epochs": ("epoch", 1),
    "samples": ("samples", 1),
    "tokens": ("tokens", 1),
    "seconds": ("active_seconds", 1),
    "minutes": ("active_seconds", 60),
    "hours": ("active_seconds", 3600),
}


def reading_of(clock: Clock, unit: Unit) -> float:
    """Return one counter of the clock."""
    value: float = getattr(clock, unit)
    return value


def recorded(record: CheckpointRecord, unit: Unit) -> float:
    """Return where a checkpoint stands: its step, its wall time for time, else its clock's counter."""
    if unit == "step":
        return record.step
    return record.time if unit == "active_seconds" else reading_of(record.clock, unit)


def crosses(previous: float, now: float, length: float, offset: float = 0) -> bool:
    """Return whether a point of the grid `offset + i * length` lies after `previous` and at or before `now`.

    A crossing test does not miss points when a clock jumps, as `now % length == 0` does.
    """
    return (now - offset) // length > (previous - offset) // length


@dataclass(frozen=True, slots=True)
class Interval:
    """A length on the clock as it was written: `count` times `name`, a key of `LENGTHS`."""

    name: str
    count: float

    @property
    def unit(self) -> Unit:
        """The counter that this interval is measured on."""
        return LENGTHS[self.name][0]

    @property
    def length(self) -> float:
        """The interval in that counter's own unit: whole numbers, or seconds."""
        return self.count * LENGTHS[self.name][1]

    def __str__(self) -> str:
        return f"{self.count:.15g} {self.name}" if self.count != 1 else self.name.removesuffix("s")
