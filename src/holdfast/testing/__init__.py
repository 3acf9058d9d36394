"""Public tools for testing what stands on holdfast: a disk that dies on command, a clock that does as it is told."""

from holdfast.testing.clock import MockClock
from holdfast.testing.disk import FaultyDisk, KillingDisk

__all__ = ["FaultyDisk", "KillingDisk", "MockClock"]
