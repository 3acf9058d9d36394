"""Small runs that are killed at every call: what is saved, and what must hold afterwards."""

from __future__ import annotations

import os
import pathlib
import shutil
import signal
import sys
from collections.abc import Callable

import numpy as np

import holdfast
from holdfast import Checkpointer, best, every, last
from holdfast.stores import Disk, LocalStore

Scenario = Callable[[LocalStore], None]


def state(step: int) -> dict[str, object]:
    """A state with a large part that never changes, two that do, small tensors and plain values."""
    return {
        "frozen": {"base": np.arange(150_001, dtype=np.float64)},
        "model": {"w": np.full((200, 100), step, dtype=np.float64), "b": np.full(3, step, dtype=np.float32)},
        "momentum": {"w": np.full(700, -step, dtype=np.float32)},
        "counters": {"seen": step * 64, "lr": 0.1 / step},
    }


def check_state(found: dict[str, object], step: int) -> None:
    for part, expected in state(step).items():
        for key, value in expected.items():
            got = found[part][key]
            assert got == value if not isinstance(value, np.ndarray) else got.tobytes() == value.tobytes(), (
                part,
                key,
            )


def prepare(root: pathlib.Path) -> None:
    """Make a run with the acknowledged checkpoints of steps 1 and 2."""
    for step in (1, 2):
        holdfast.save(root, state(step), step=step, metrics={"loss": 1.0 / step})


def save_step_3(store: LocalStore) -> None:
    holdfast.save(store, state(3), step=3, metrics={"loss": 0.3}, tag="third")


def train_and_prune(store: LocalStore) -> None:
    """A loop that saves each step and keeps the best and the last."""
    held = state(2)
    ckpt = Checkpointer(
        store, held, save=every(steps=1) | best("loss", mode="min"), keep=last(1), writer="inline"
    )
    for step in ckpt.steps(4):
        held["model"]["w"][:] = step + 1
        held["model"]["b"][:] = step + 1
        held["momentum"]["w"][:] = -(step + 1)
        held["counters"].update(seen=(step + 1) * 64, lr=0.1 / (step + 1))
        ckpt.log(loss=1.0 / (step + 1))
    ckpt.close()


def tag_and_remove(store: LocalStore) -> None:
    run = holdfast.Run(store)
    run.tag("kept", 2)
    run.observe(2, "score", 0.5)
    run.remove([step for step in run.steps if step == 1])


SCENARIOS: dict[str, Scenario] = {"save": save_step_3, "train": train_and_prune, "remove": tag_and_remove}


def check_run(root: pathlib.Path) -> list[int]:
    """Everything that is listed is whole and right."""
    run = holdfast.Run(root)
    assert not run.broken
    problems = {step: found for step, found in run.verify().items() if found}
    assert not problems, problems
    for step in run.steps:
        check_state(holdfast.load(root, step=step, as_="numpy"), step)
    return run.steps


def run_in_child(root: pathlib.Path, disk: Disk, scenario: Scenario) -> int:
    """Run a scenario in a forked process; return its wait status."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            scenario(LocalStore(root, disk))
            code = 0
        finally:
            sys.stdout.flush()
            os._exit(code)
    return os.waitpid(pid, 0)[1]


def killed(status: int) -> bool:
    return os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL


def fresh_copy(base: pathlib.Path, root: pathlib.Path) -> None:
    shutil.rmtree(root, ignore_errors=True)
    shutil.copytree(base, root)
