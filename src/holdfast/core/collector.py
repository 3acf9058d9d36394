"""Python's cycle collector, held off while many objects are made that all stay."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator

__all__ = ["collector_held"]


@contextlib.contextmanager
def collector_held() -> Iterator[None]:
    """Let no collection run inside: each would look at every object of the program, for nothing."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
