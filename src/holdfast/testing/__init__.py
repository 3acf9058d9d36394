"""Public tools for testing what stands on holdfast, and holdfast itself.

Faults on command (`Fault`, `FaultPlan`, `FaultDisk`, `FaultStore`, `CrashStore`), power cuts (`PowerLossDisk`), a clock
that does as it is told (`MockClock`), and what every store must do (`StoreTests`, which needs pytest and is loaded when
it is first asked for). What must hold whatever goes wrong is in `holdfast.testing.invariants`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from holdfast.testing.clock import MockClock
from holdfast.testing.disk import FaultDisk, FaultyDisk
from holdfast.testing.faulty import CrashStore, FaultStore
from holdfast.testing.objects import ModelService, ModelStore
from holdfast.testing.plan import Crash, Fault, FaultPlan, every_call, kill_process
from holdfast.testing.power import PowerLossDisk, lay_out
from holdfast.testing.process import forget_this_process
from holdfast.testing.turns import Turns

if TYPE_CHECKING:
    from holdfast.testing.stores import StoreTests

__all__ = [
    "Crash",
    "CrashStore",
    "Fault",
    "FaultDisk",
    "FaultPlan",
    "FaultStore",
    "FaultyDisk",
    "MockClock",
    "ModelService",
    "ModelStore",
    "PowerLossDisk",
    "StoreTests",
    "Turns",
    "every_call",
    "forget_this_process",
    "kill_process",
    "lay_out",
]


def __getattr__(name: str) -> object:
    if name != "StoreTests":
        raise AttributeError(f"module 'holdfast.testing' has no attribute {name!r}")
    from holdfast.testing import stores

    return stores.StoreTests
