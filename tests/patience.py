"""Wait for what others do, with an end."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

TIMEOUT = 120.0


def until(true: Callable[[], bool], what: str) -> None:
    """Return once it is true; fail when that takes too long."""
    end = time.monotonic() + TIMEOUT
    while not true():
        assert time.monotonic() < end, f"waited {TIMEOUT:g} s for {what}"
        time.sleep(0.02)


def until_gone(pid: int) -> None:
    """Return once a process has ended, waited for by its parent or not."""

    def gone() -> bool:
        try:
            return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
        except (FileNotFoundError, ProcessLookupError):
            return True

    until(gone, f"process {pid} to end")
