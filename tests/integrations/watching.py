"""What a training of `trainer.py` without any scheduler gives."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

import holdfast
from patience import TIMEOUT

TRAINER = Path(__file__).with_name("trainer.py")
STEPS = 40


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", **more}


def steps_of(log: Path) -> int:
    """Return how many steps a log has so far."""
    return log.read_text().count("\n") if log.exists() else 0


def python(world: int = 1) -> list[str]:
    """Return how to start a script, in one process or under torchrun."""
    options = ["--standalone", f"--nproc-per-node={world}", f"--shutdown-timeout={TIMEOUT:.0f}"]
    return [sys.executable, *(["-m", "torch.distributed.run", *options] if world > 1 else [])]


def training(directory: Path, name: str, *, world: int = 1, pace: float = 0.0) -> list[str]:
    """Return the command of a training whose run and logs have this name in the directory."""
    run, log = directory / name, directory / f"{name}-log"
    return [*python(world), str(TRAINER), str(run), str(log), str(STEPS), str(pace)]


@cache
def undisturbed(world: int = 1) -> tuple[list[str], list[bytes]]:
    """Train in one life; return what `left` says of it."""
    with tempfile.TemporaryDirectory() as directory:
        command = training(Path(directory), "calm", world=world)
        subprocess.run(command, env=environment(), timeout=TIMEOUT, check=True)
        return left(Path(directory), "calm", world)


def left(directory: Path, name: str, world: int = 1) -> tuple[list[str], list[bytes]]:
    """Return each rank's log, and the bytes of every tensor at the end."""
    return [(directory / f"{name}-log-{r}").read_text() for r in range(world)], tensors_of(directory / name)


def tensors_of(run: Path) -> list[bytes]:
    """Return the bytes of every tensor of the newest checkpoint, the generators' included."""
    newest = holdfast.Run(str(run)).latest
    assert newest.step == STEPS
    return [newest[name].read().tobytes() for name in newest.tensors]
