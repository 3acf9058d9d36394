"""Ranks as threads of one process, for what needs no process to die: each calls the same function."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from holdfast.distributed import lanes

TIMEOUT = 60


@dataclass
class End:
    """How a rank ended: what it returned or raised, and after how many seconds."""

    value: object = None
    error: BaseException | None = None
    seconds: float = 0.0


def side_by_side(world: int, body: Callable[[int], object]) -> list[End]:
    """Run `body(rank)` for all ranks at once; return how each ended."""
    lanes.StoreLane.meet_seconds = 0.05
    ends = [End() for _ in range(world)]

    def run(rank: int) -> None:
        began = time.monotonic()
        try:
            ends[rank].value = body(rank)
        except BaseException as e:  # noqa: BLE001 - judged by the test
            ends[rank].error = e
        ends[rank].seconds = time.monotonic() - began

    ranks = [threading.Thread(target=run, args=(r,), daemon=True) for r in range(world)]
    for r in ranks:
        r.start()
    for r in ranks:
        r.join(TIMEOUT)
        assert not r.is_alive(), "a rank hangs"
    return ends


def values(ends: list[End]) -> list[object]:
    """Return what all ranks returned; fail where one raised."""
    for rank, end in enumerate(ends):
        if end.error is not None:
            raise AssertionError(f"rank {rank}: {end.error!r}") from end.error
    return [end.value for end in ends]
