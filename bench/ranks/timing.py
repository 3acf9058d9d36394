"""The clock of several ranks: they begin at once, and their processor time is counted with that of their helpers."""

from __future__ import annotations

import contextlib
import os
import pathlib
import resource
from collections.abc import Iterator

import torch.distributed as dist

from bench.timing import Figures
from bench.worker import descendants

TICK = os.sysconf("SC_CLK_TCK")


class Together:
    """What all ranks do at once, one thing after the other."""

    def __init__(self) -> None:
        self._spent = 0.0

    @contextlib.contextmanager
    def quiet(self) -> Iterator[None]:
        """Let all ranks begin at once, with nothing that is still to be written, and return when all are through."""
        dist.barrier()
        if dist.get_rank() == 0:
            os.sync()
        dist.barrier()
        before = processor_seconds()
        yield
        self._spent = processor_seconds() - before
        dist.barrier()

    def processor(self) -> Figures:
        """Return the processor time that rank 0 spent in the last thing that was done; other ranks return nothing."""
        return {"processor": self._spent} if dist.get_rank() == 0 else {}


def processor_seconds() -> float:
    """Return the processor time, user and system, of this process and its living descendants so far."""
    mine = resource.getrusage(resource.RUSAGE_SELF)
    others = 0.0
    for pid in descendants(os.getpid())[1:]:
        with contextlib.suppress(OSError):
            fields = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            others += (int(fields[11]) + int(fields[12])) / TICK
    return mine.ru_utime + mine.ru_stime + others
