"""One flipped bit anywhere in a checkpoint is reported by name and refused: every bit of manifest and headers, sampled
bits of the data."""

from __future__ import annotations

import random

import numpy as np
import pytest

import holdfast
from holdfast import Run
from holdfast.core.errors import HoldfastError, IntegrityError
from holdfast.stores import MemoryStore


@pytest.fixture
def store() -> MemoryStore:
    made = MemoryStore("flips")
    holdfast.save(made, _state(1), step=1)
    holdfast.save(made, _state(2), step=2, metrics={"loss": 0.5})
    return made


def _state(step: int) -> dict[str, object]:
    rng = np.random.default_rng(step)
    return {
        "model": {"w": rng.normal(size=(300, 100)), "b": np.full(7, step, np.float16)},
        "plain": {"lr": 0.1, "step": step},
    }


def _objects(store: MemoryStore, step: int) -> list[str]:
    return [o.key for kind in ("checkpoints", "data") for o in store.list(kind) if f"{step:012d}" in o.key]


def _named(store: MemoryStore, step: int) -> list[str]:
    """What `verify` says about a step, as keys; restore must refuse it too."""
    with pytest.raises(HoldfastError):
        holdfast.load(store, step=step)
    return [problem.key for problem in Run(store).verify([step])[step]]


def _header_bytes(store: MemoryStore, key: str) -> int:
    raw = store.read(key)
    return 8 + int.from_bytes(raw[:8], "little") if key.endswith(".safetensors") else len(raw)


@pytest.mark.parametrize("bit", range(8))
@pytest.mark.parametrize("kind", ["checkpoints/", "data/"])
def test_every_bit_of_manifests_and_headers(store: MemoryStore, kind: str, bit: int) -> None:
    for key in [k for k in _objects(store, 2) if k.startswith(kind)]:
        whole = store.read(key)
        for position in range(_header_bytes(store, key)):
            changed = bytearray(whole)
            changed[position] ^= 1 << bit
            store.replace(key, bytes(changed))
            found = {problem.key for problem in Run(store).verify([2])[2]}
            assert found == {key}, f"bit {bit} of byte {position} of {key}: verify named {found}"
            if position % 53 == 0:
                with pytest.raises(HoldfastError):
                    holdfast.load(store, step=2)
        store.replace(key, whole)
    assert not Run(store).verify([2])[2]


def test_sampled_bits_of_the_data(store: MemoryStore) -> None:
    rng = random.Random(0)
    for key in [k for k in _objects(store, 2) if k.startswith("data/")]:
        whole = store.read(key)
        start = _header_bytes(store, key)
        for position in {start, len(whole) - 1, *(rng.randrange(start, len(whole)) for _ in range(200))}:
            changed = bytearray(whole)
            changed[position] ^= 1 << rng.randrange(8)
            store.replace(key, bytes(changed))
            assert _named(store, 2) == [key]
            message = Run(store).verify([2])[2][0].message
            assert "'w'" in message or "'b'" in message  # which tensor, not only which file
        store.replace(key, whole)


def test_restore_falls_back_and_says_so(store: MemoryStore, caplog: pytest.LogCaptureFixture) -> None:
    key = next(k for k in _objects(store, 2) if k.startswith("data/"))
    raw = bytearray(store.read(key))
    raw[-1] ^= 1
    store.replace(key, bytes(raw))
    live = _state(5)
    report = holdfast.load(store, into=live)
    assert live["plain"] == {"lr": 0.1, "step": 1}
    assert any("passed over step 2" in note for note in report.notes)
    assert "falling back" in caplog.text
    with pytest.raises(IntegrityError):
        holdfast.load(store, into=live, step=2)
