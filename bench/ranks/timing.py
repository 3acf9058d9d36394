"""The clock of several ranks: they begin at once, and their processor time is counted with that of their helpers."""

from __future__ import annotations

import contextlib
import os
import pathlib
import resource
from collections.abc import Iterator

import torch.distributed as dist

from bench.worker import descendants

TICK = os.sysconf("SC_CLK_TCK")


@contextlib.contextmanager
def together() -> Iterator[None]:
    """Let all ranks begin at once, with nothing that is still to be written, and return when all are through."""
    dist.barrier()
    if dist.get_rank() == 0:
        os.sync()
    dist.barrier()
    yield
    dist.barrier()


def processor_seconds() -> float:
    """Return the processor time, user and system, of this process and its living descendants so far."""
    mine = resource.getrusage(resource.RUSAGE_SELF)
    others = 0.0
    for pid in descendants(os.getpid())[1:]:
        with contextlib.suppress(OSError):
            fields = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            others += (int(fields[11]) + int(fields[12])) / TICK
    return mine.ru_utime + mine.ru_stime + others
