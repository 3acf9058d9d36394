"""What is done to a run while things go wrong: each operation with what stood before it and what may stand after it.

States are small and differ in every tensor but one, so that a checkpoint refers to an older one's data too.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

import holdfast
from holdfast import Checkpointer, Run, best, every, last
from holdfast.stores import Store
from holdfast.testing import invariants
from holdfast.testing.invariants import Broken

State = dict[str, Any]


def state(step: int) -> State:
    """A state with a part that never changes, two that do, and plain values."""
    return {
        "frozen": {"base": np.arange(700, dtype=np.float64)},
        "model": {
            "w": np.full((40, 25), step, dtype=np.float64),
            "b": np.full(3, step, dtype=np.float32),
        },
        "momentum": {"w": np.full(70, -step, dtype=np.float32)},
        "counters": {"seen": step * 64, "lr": 0.1 / step},
    }


def set_state(held: State, step: int) -> None:
    """Make a live state that of a step, in place."""
    wanted = state(step)
    for part in ("model", "momentum"):
        for name, value in wanted[part].items():
            held[part][name][:] = value
    held["counters"].update(wanted["counters"])


def truth(*steps: int) -> dict[int, State]:
    return {step: state(step) for step in steps}


def two_checkpoints(store: Store) -> None:
    for step in (1, 2):
        holdfast.save(store, state(step), step=step, metrics={"loss": 1.0 / step})


@dataclass(frozen=True)
class Operation:
    """An operation: what it does, the states that it or what was before may leave, and those that it must leave."""

    name: str
    act: Callable[[Store], object]
    acknowledged: Mapping[int, State]
    truth: Mapping[int, State]
    prepare: Callable[[Store], object] = two_checkpoints
    after: Callable[[list[int]], None] = lambda steps: None  # what else must hold of the steps that are left
    commits: int | None = None  # the step that a success has committed
    calls: str = ""  # which calls are met; by default those that change something
    uploads: bool = False  # whether it writes data files
    temporary: int = 1  # files that a killed one may leave half-made, for an hour
    promises: Callable[[Store, Mapping[int, State], Mapping[int, State]], list[int]] = invariants.promises
    settled: Callable[[Store], None] = lambda store: (
        None
    )  # what must hold once it has succeeded, after whatever fault


def save(store: Store) -> None:
    holdfast.save(store, state(3), step=3, metrics={"loss": 0.3}, tag="third")


def large(step: int) -> State:
    return {"w": np.full(200_003, step, dtype=np.float64), "seen": step}


def save_large(store: Store) -> None:
    """Large enough to be written past the page cache."""
    holdfast.save(store, large(3), step=3)


def table(step: int) -> State:
    """Three blocks, of which two differ from those of the step before."""
    rows = np.zeros((3, 4 << 20), dtype=np.uint8)
    rows[step % 3] = step
    return {"m": {"rows": rows}, "seen": step}


def save_rows(store: Store) -> None:
    """A table of which some blocks stay in the older file."""
    holdfast.save(store, table(3), step=3)


def train(store: Store, writer: Any) -> None:
    """A loop that saves each step, keeps the best and the last, and waits now and then."""
    held = state(2)
    rule = every(steps=1) | best("loss", mode="min")
    with Checkpointer(store, held, save=rule, keep=last(1), writer=writer) as ckpt:
        for step in ckpt.steps(4):
            set_state(held, step + 1)
            ckpt.log(loss=1.0 / (step + 1))
            ckpt.wait()


def went_on(steps: list[int]) -> None:
    if not steps or max(steps) < 2:
        raise Broken("I1", f"training went back to {steps}")


def prune(store: Store) -> None:
    Run(store).prune(last(1) | best("loss", mode="max"))


def prune_now(store: Store) -> None:
    Run(store).prune(last(1) | best("loss", mode="max"), grace=0)


def in_the_trash(store: Store) -> None:
    """Four checkpoints, of which two are deleted, and what a writer left that died."""
    four_checkpoints(store)
    Run(store).tag("wanted", 2)
    Run(store).remove([1, 2], force=True)
    store.write("data/000000000009-dead0000/model.safetensors", [b"x" * 100])
    store.delete(["tidy.json"])


def undo(store: Store) -> None:
    run = Run(store)
    for deleted in run.trash():
        run.undelete(deleted.step)


def collect(store: Store) -> None:
    Run(store).collect(grace=0)


def collect_what_is_due(store: Store) -> None:
    Run(store).collect()


def four_checkpoints(store: Store) -> None:
    two_checkpoints(store)
    for step in (3, 4):
        holdfast.save(store, state(step), step=step, metrics={"loss": 1.0 / step})


def tag(store: Store) -> None:
    run = Run(store)
    run.tag("kept", 2)
    run.tag("moved", 1)
    run.tag("moved", 2)
    run.observe(2, "score", 0.5)
    run.untag("moved")


def remove(store: Store) -> None:
    run = Run(store)
    run.remove([step for step in run.steps if step == 1])


def import_(store: Store) -> None:
    """Take in what torch.save and safetensors wrote, as a user does: read it their way, save it ours."""
    import torch  # here, for the processes that are started without need of it

    wanted = state(3)
    with tempfile.TemporaryDirectory() as elsewhere:
        path = Path(elsewhere, "model")
        torch.save({k: torch.from_numpy(v.copy()) for k, v in wanted["model"].items()}, path)
        model = {k: v.numpy() for k, v in torch.load(path, weights_only=True).items()}
        safetensors.numpy.save_file(wanted["momentum"], path)
        momentum = safetensors.numpy.load_file(path)
    parts = {**wanted, "model": model, "momentum": momentum}
    holdfast.save(store, parts, step=3, self_contained=True, tag="imported")


def restore(store: Store) -> None:
    """Into live objects; they are as they were, or as they were saved."""
    held, before = state(7), state(7)
    try:
        holdfast.load(store, into=held)
    except holdfast.HoldfastError:
        if str(held) != str(before):
            raise Broken("I4", "a restore failed and changed what is live") from None
        raise
    if str(held) not in (str(state(2)), str(state(1))):
        raise Broken("I4", "a restore gave other values than were saved")


OPERATIONS = [
    Operation("save", save, truth(1, 2), truth(1, 2, 3), commits=3, uploads=True),
    Operation(
        "async save (thread)",
        lambda s: train(s, "thread"),
        {},
        truth(1, 2, 3, 4),
        after=went_on,
        uploads=True,
    ),
    Operation(
        "async save (inline)",
        lambda s: train(s, "inline"),
        {},
        truth(1, 2, 3, 4),
        after=went_on,
        uploads=True,
    ),
    Operation("prune", prune, truth(1, 4), truth(1, 2, 3, 4), prepare=four_checkpoints),
    Operation("prune at once", prune_now, truth(1, 4), truth(1, 2, 3, 4), prepare=four_checkpoints),
    Operation("remove", remove, truth(2), truth(1, 2)),
    Operation("undo", undo, truth(3, 4), truth(1, 2, 3, 4), prepare=in_the_trash),
    Operation("collect", collect, truth(3, 4), truth(3, 4), prepare=in_the_trash),
    Operation("collect what is due", collect_what_is_due, truth(3, 4), truth(3, 4), prepare=in_the_trash),
    Operation("tag", tag, truth(1, 2), truth(1, 2)),
    Operation("import", import_, truth(1, 2), truth(1, 2, 3), commits=3, uploads=True),
    Operation("restore", restore, truth(1, 2), truth(1, 2), calls="*"),
]
LARGE = Operation(
    "save", save_large, {2: large(2)}, {2: large(2), 3: large(3)},
    prepare=lambda s: holdfast.save(s, large(2), step=2), commits=3,
)  # fmt: skip
ROWS = Operation(
    "save", save_rows, {2: table(2)}, {2: table(2), 3: table(3)},
    prepare=lambda s: holdfast.save(s, table(2), step=2), commits=3,
)  # fmt: skip
