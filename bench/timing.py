"""What a clock begins with."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

from bench.devices import finish

Figures = dict[str, float]


@contextlib.contextmanager
def quiet(device: str) -> Iterator[None]:
    """Begin when the device has done what it was given and the disk has what anyone has written before."""
    finish(device)
    os.sync()
    yield
