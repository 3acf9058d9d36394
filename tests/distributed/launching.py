"""Start the ranks of a run, as torchrun does or one by one, and take what they leave."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from servers.processes import free_port

WORKER = Path(__file__).with_name("worker.py")
LONE = Path(__file__).with_name("lone_worker.py")
TIMEOUT = 150


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", **more}


def launch(program: Path, world: int, *arguments: str, seconds: float, **more: str) -> None:
    """Run a program on all ranks under torchrun; none may fail."""
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}", str(program),
        *arguments,
    ]  # fmt: skip
    done = subprocess.run(
        command, env=environment(**more), timeout=seconds, check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-8000:]


def torchrun(world: int, order: dict[str, object]) -> int:
    """Run all ranks under torchrun; return its exit code."""
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}",
        str(WORKER), json.dumps(order),
    ]  # fmt: skip
    return subprocess.run(command, env=environment(), timeout=TIMEOUT, check=False).returncode


def each(world: int, order: dict[str, object], worker: Path = WORKER) -> list[tuple[int, str]]:
    """Run every rank as a process of its own, which nobody ends for the others; return exit codes and errors."""
    port = free_port()
    ranks = [
        subprocess.Popen(
            [sys.executable, str(worker), json.dumps(order)],
            env=environment(
                RANK=str(r), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
            ),
            stderr=subprocess.PIPE,
            text=True,
        )
        for r in range(world)
    ]
    try:
        return [(r.wait(), errors) for r in ranks for _, errors in [r.communicate(timeout=TIMEOUT)]]
    finally:
        for r in ranks:
            r.kill()


def results(out: Path, name: str, world: int) -> list[dict[str, Any]]:
    return [json.loads((out / f"{name}-{r}.json").read_text()) for r in range(world)]
