"""Runs in several places, and what may happen to a file."""

from __future__ import annotations

import pathlib

import numpy as np

import holdfast
from holdfast.format.manifest import FileEntry, decode_manifest
from holdfast.format.packed import Pack
from holdfast.replication.copying import Copied, copy_beside, copy_checkpoint
from holdfast.stores import LocalStore, Store

ROWS = 1_100_000  # of 8 bytes: a tensor of 8.8 MB


def state(step: int) -> dict[str, object]:
    """A state with a part that never changes, one of several megabytes, small tensors and plain values."""
    rng = np.random.default_rng(step)
    return {
        "frozen": {"base": np.arange(20_001, dtype=np.float64)},
        "model": {
            "w": rng.standard_normal(ROWS // 100),
            "odd": np.full(70_001, step, np.uint8),
            **{f"b{i}": np.full(3, step + i, np.float32) for i in range(20)},
        },
        "counters": {"seen": step * 64, "lr": 0.1 / step},
    }


def make_run(store: Store | pathlib.Path, steps: int = 3) -> None:
    for step in range(1, steps + 1):
        holdfast.save(store, state(step), step=step, metrics={"loss": 1.0 / step}, tag=f"at-{step}")


def manifests(store: Store) -> list[str]:
    return store.names("checkpoints")


def files(store: Store) -> list[FileEntry]:
    """Every data file of a run that a manifest refers to, each once."""
    found = [decode_manifest(store.read(key), key) for key in manifests(store)]
    return list({f.key: f for m in found for part in m.parts.values() for f in part.files}.values())


def copy_all(source: Store, target: Store, pack: Pack | None = None) -> Copied:
    copied = Copied()
    for key in manifests(source):
        copied += copy_checkpoint(source, target, key, pack=pack)
    return copied + copy_beside(source, target)


def contents(store: Store) -> dict[str, bytes]:
    """What a run consists of, by key; not who writes it, and not what is only a cache."""
    outside = ("lease/", "index.json", "tidy.json", "proofs.json")
    return {o.key: store.read(o.key) for o in store.list("") if not o.key.startswith(outside)}


def everything(root: pathlib.Path) -> dict[str, bytes]:
    """Every file below a directory, hidden ones included."""
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


def flip(store: Store, key: str, position: int) -> None:
    raw = bytearray(store.read(key))
    raw[position] ^= 1
    store.replace(key, bytes(raw))


def check_steps(store: Store, steps: list[int]) -> None:
    """The run has exactly these steps, every byte verifies, and the values are right."""
    run = holdfast.Run(store)
    assert run.steps == steps
    assert not any(run.verify().values())
    for step in steps:
        found = holdfast.load(store, step=step, as_="numpy")
        for part, expected in state(step).items():
            for key, value in expected.items():  # type: ignore[attr-defined]
                assert np.array_equal(found[part][key], value), (step, part, key)  # type: ignore[index]


def local(path: pathlib.Path) -> LocalStore:
    return LocalStore(path)
