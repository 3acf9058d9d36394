"""Time that only moves when it is told to."""

from __future__ import annotations

__all__ = ["MockClock"]


class MockClock:
    """A `TimeSource` under the test's control; `sleep` moves it."""

    def __init__(self, now: float = 1_700_000_000.0) -> None:
        self.time = now

    def now(self) -> float:
        return self.time

    def monotonic(self) -> float:
        return self.time

    def sleep(self, seconds: float) -> None:
        self.time += seconds

    def advance(self, seconds: float) -> None:
        """Move time on."""
        self.time += seconds
