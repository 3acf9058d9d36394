"""Wait for what others do, with an end."""

from __future__ import annotations

import time
from collections.abc import Callable

TIMEOUT = 120.0


def until(true: Callable[[], bool], what: str) -> None:
    """Return once it is true; fail when that takes too long."""
    end = time.monotonic() + TIMEOUT
    while not true():
        assert time.monotonic() < end, f"waited {TIMEOUT:g} s for {what}"
        time.sleep(0.02)
