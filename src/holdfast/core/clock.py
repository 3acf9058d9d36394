"""The run's clock: how far training has come, as a vector of counters, and where wall time comes from."""

from __future__ import annotations

import time
from dataclasses import dataclass
from numbers import Integral
from typing import Protocol

from holdfast.core.errors import PolicyError

__all__ = ["UNITS", "Clock", "SystemTime", "TimeSource", "check_count"]

UNITS = ("step", "epoch", "samples", "tokens", "active_seconds")


@dataclass(frozen=True, slots=True)
class Clock:
    """How far a run has come: counts of finished steps, epochs, samples and tokens, and seconds spent training.

    Every field only grows. `active_seconds` adds up over resumes, so time away from training does not count.
    """

    step: int = 0
    epoch: int = 0
    samples: int = 0
    tokens: int = 0
    active_seconds: float = 0.0


def check_count(name: str, value: object) -> int:
    """Return `value` as an int if it is a count: an integer, of numpy too, that is not negative. Raises PolicyError."""
    if isinstance(value, bool) or not isinstance(value, Integral) or value < 0:
        raise PolicyError(f"{name}={value!r} must be a whole number that is not negative")
    return int(value)


class TimeSource(Protocol):
    """Where wall time, monotonic time and sleep come from; tests pass their own."""

    def now(self) -> float:
        """Return seconds since the Unix epoch."""
        ...

    def monotonic(self) -> float:
        """Return seconds from an arbitrary origin that never go back."""
        ...

    def sleep(self, seconds: float) -> None:
        """Block for `seconds`."""
        ...


class SystemTime:
    """The machine's own clocks."""

    def now(self) -> float:
        return time.time()

    def monotonic(self) -> float:
        return time.monotonic()

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)
