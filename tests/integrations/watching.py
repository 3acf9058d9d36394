"""Wait for what processes do, with an end; and what a training of `trainer.py` without any scheduler gives."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import holdfast

TRAINER = Path(__file__).with_name("trainer.py")
TIMEOUT = 120.0
STEPS = 40


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", **more}


def until(true: Callable[[], bool], what: str) -> None:
    """Return once it is true; fail when that takes too long."""
    end = time.monotonic() + TIMEOUT
    while not true():
        assert time.monotonic() < end, f"waited {TIMEOUT:g} s for {what}"
        time.sleep(0.02)


def steps_of(log: Path) -> int:
    """Return how many steps a log has so far."""
    return log.read_text().count("\n") if log.exists() else 0


def undisturbed(directory: Path) -> tuple[str, list[bytes]]:
    """Train in one life; return the log and the bytes of every tensor at the end."""
    run, log = directory / "calm", directory / "calm-log"
    command = [sys.executable, str(TRAINER), str(run), str(log), str(STEPS)]
    subprocess.run(command, env=environment(), timeout=TIMEOUT, check=True)
    return (directory / "calm-log-0").read_text(), tensors_of(run)


def tensors_of(run: Path) -> list[bytes]:
    """Return the bytes of every tensor of the newest checkpoint, the generators' included."""
    newest = holdfast.Run(str(run)).latest
    assert newest.step == STEPS
    return [newest[name].read().tobytes() for name in newest.tensors]
