"""A process that dies, without a process: what it held in memory counts no more."""

from __future__ import annotations

from holdfast.catalog import lease
from holdfast.loop import open_runs

__all__ = ["forget_this_process"]


def forget_this_process() -> None:
    """Go on as the next process would after this one died: the leases it holds are of nobody who lives, and nothing of
    it is finished at exit. For tests whose crash is the exception `Crash`."""
    for held in list(lease._leases):
        held.forget()
    open_runs._open.clear()
