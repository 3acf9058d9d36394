"""Small runs that live: trained on, rolled back, pruned; and what a mirror of them must be."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

import holdfast
from holdfast import Checkpointer, every
from holdfast.catalog.history import History
from holdfast.policies import Rule
from holdfast.replication.looking import Source, look
from holdfast.replication.reconcile import Goal, Outcome, Reconciler
from holdfast.stores import MemoryStore, Store
from holdfast.testing import MockClock


def tiny(step: int) -> dict[str, object]:
    return {
        "frozen": {"base": np.arange(600.0)},
        "model": {"w": np.full((20, 10), step, dtype=np.float64), "b": np.full(3, step, dtype=np.float32)},
        "count": {"seen": step * 64},
    }


def save(store: Store, *steps: int, tag: str | None = None) -> None:
    for step in steps:
        holdfast.save(store, tiny(step), step=step, metrics={"loss": 1.0 / (1 + step % 3)}, tag=tag)


def train(
    store: Store, total: int, *, keep: Rule | None = None, then: Callable[[Checkpointer], None] | None = None
) -> None:
    """Train up to a step, saving each; the weights say which step they are of."""
    held = tiny(0)
    with Checkpointer(store, held, save=every(steps=1), keep=keep, writer="inline") as ckpt:
        for step in ckpt.steps(total):
            held["model"]["w"][:] = step + 1  # type: ignore[index]
            held["model"]["b"][:] = step + 1  # type: ignore[index]
            held["count"]["seen"] = (step + 1) * 64  # type: ignore[index]
            ckpt.log(loss=1.0 / (1 + step % 3))
        if then is not None:
            then(ckpt)


def roll_back(store: Store, step: int, total: int) -> None:
    """Restore an older step and train on from there: what was beyond is set aside."""
    held = tiny(0)
    with Checkpointer(store, held, save=every(steps=1), writer="inline") as ckpt:
        ckpt.restore(step)
        for at in ckpt.steps(total):
            held["model"]["w"][:] = -(at + 1)  # type: ignore[index]


def source_of(store: Store) -> Source:
    run = holdfast.Run(store)
    return look(run.history, run.id)


def reconcile(primary: Store, mirror: Store, goal: Goal | None = None) -> Outcome:
    return Reconciler(mirror, goal or Goal(), MockClock()).run(source_of(primary))


def listed(store: Store) -> dict[str, bytes]:
    """The manifests, tags, log and identity of a run, by key."""
    kinds = ("checkpoints/", "tags/", "log/", "run.json")
    return {o.key: store.read(o.key) for o in store.list("") if o.key.startswith(kinds)}


def assert_is_copy(mirror: Store, primary: Store) -> None:
    """The mirror lists what the primary lists, byte for byte, and all of it verifies."""
    assert listed(mirror) == listed(primary)
    assert_sound(mirror)


def assert_sound(store: Store) -> None:
    run = holdfast.Run(store)
    assert not run.broken
    assert not {step: found for step, found in run.verify().items() if found}
    assert not run.verify_beside()


def steps(store: Store) -> list[int]:
    return holdfast.Run(store).steps


def attempts(store: Store) -> dict[int, str]:
    return {r.step: r.attempt for r in holdfast.Run(store).records()}


def left_over(store: Store) -> set[str]:
    """The data files that no manifest, listed or set aside, needs."""
    history = History(store)
    known = history.known
    known.complete(store)
    return {key for key in store.names("data") if not known.needs(key)}


def copy_of(store: MemoryStore) -> MemoryStore:
    """A memory store with the same objects."""
    made = MemoryStore(store.url.removeprefix("memory://"))
    made._objects = dict(store._objects)
    return made
