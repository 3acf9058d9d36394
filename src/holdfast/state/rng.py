"""The random state of this process: python, numpy's global generator, torch on CPU and devices in use."""

from __future__ import annotations

import contextlib
import hashlib
import random
from collections.abc import Iterator, Mapping
from typing import Any, cast

import numpy as np

from holdfast.core.errors import StateError
from holdfast.state.adapters.generators import python_state, set_python_state
from holdfast.state.registry import torch_rng

__all__ = ["capture_rng", "preserved_rng", "restore_rng"]


def capture_rng() -> dict[str, object]:
    """Return the state of every global generator as a plain tree with numpy arrays; draws nothing.

    Keys: "python", "numpy", and with torch imported "torch" and "cuda" (device index as text -> state) for
        the devices this process has initialised. Creates no device context.
    """
    tree: dict[str, object] = {
        "python": python_state(random.getstate()),
        "numpy": _copied(np.random.get_state(legacy=False)),
    }
    of_torch = torch_rng()
    if of_torch is not None:
        tree.update(of_torch.capture_torch_rng())
    return tree


def restore_rng(tree: object) -> list[str]:
    """Set the global generators from what `capture_rng` returned; call it last, after all that may draw.

    Returns notes about what could not be carried over: a generator of another kind, a device that this
    process does not have, torch not imported.

    Raises:
        StateError: a state is malformed; the generators before it (python, numpy, torch, cuda) are already
            set.
    """
    if not isinstance(tree, Mapping):
        raise StateError(f"random state: expected a mapping of generators, found a {type(tree).__name__}")
    notes: list[str] = []
    for name, setter in (("python", _set_python), ("numpy", _set_numpy)):
        if name in tree:
            try:
                setter(cast("Mapping[str, object]", tree[name]))
            except (ValueError, TypeError, KeyError) as e:
                raise StateError(f"random state of {name}: malformed ({e}); restore without it") from e
        else:
            notes.append(f"random state of {name}: not in the checkpoint, left as it is")
    of_torch = torch_rng()
    if of_torch is not None:
        notes += of_torch.restore_torch_rng(tree)
    elif "torch" in tree:
        notes.append("random state of torch: stored, but torch is not imported; import it before restoring")
    return notes


def fold_into_rng(number: int) -> None:
    """Seed every global generator anew, from what it is and a number: equal generators give others for each number."""
    material = random.getrandbits(256).to_bytes(32, "little") + number.to_bytes(8, "little")
    seeds = np.frombuffer(hashlib.blake2b(material, digest_size=24).digest(), np.uint64)
    random.seed(int(seeds[0]))
    np.random.seed(int(seeds[1]) % 2**32)
    of_torch = torch_rng()
    if of_torch is not None:
        of_torch.seed_torch_rng(int(seeds[2]) % 2**63)


@contextlib.contextmanager
def preserved_rng() -> Iterator[None]:
    """Leave every global generator as it was on entry, whatever is drawn inside; about 0.1 ms."""
    before = capture_rng()
    try:
        yield
    finally:
        restore_rng(before)


def _set_python(stored: Mapping[str, object]) -> None:
    rng = random.Random()
    set_python_state(rng, stored)
    random.setstate(rng.getstate())


def _set_numpy(stored: Mapping[str, object]) -> None:
    np.random.set_state(cast("dict[str, Any]", dict(stored)))


def _copied(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _copied(v) for k, v in value.items()}
    return value.copy() if isinstance(value, np.ndarray) else value
