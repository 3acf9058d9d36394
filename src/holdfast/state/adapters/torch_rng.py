"""torch's global generators: the CPU's, and those of CUDA devices that this process already uses."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from holdfast.core.errors import StateError

__all__ = ["capture_torch_rng", "restore_torch_rng"]


def capture_torch_rng() -> dict[str, object]:
    """Return {"torch": uint8 array, "cuda": {index: uint8 array}}; "cuda" only where CUDA is initialised."""
    tree: dict[str, object] = {"torch": torch.get_rng_state().numpy().copy()}
    devices = _devices_in_use()
    if devices:
        tree["cuda"] = {str(i): torch.cuda.get_rng_state(i).numpy().copy() for i in devices}
    return tree


def restore_torch_rng(tree: Mapping[str, object]) -> list[str]:
    """Set the generators and return notes about what could not be set."""
    notes: list[str] = []
    if "torch" not in tree:
        notes.append("random state of torch: not in the checkpoint, left as it is")
    else:
        _set("torch", lambda s: torch.set_rng_state(s), tree["torch"])
    stored = tree.get("cuda")
    if isinstance(stored, Mapping):
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        for index, state in stored.items():
            if not str(index).isdigit() or int(str(index)) >= count:
                notes.append(f"random state of cuda:{index}: this process has no such device")
                continue
            _set(f"cuda:{index}", lambda s, i=int(str(index)): torch.cuda.set_rng_state(s, i), state)
    for index in _devices_in_use():
        if not isinstance(stored, Mapping) or str(index) not in stored:
            notes.append(f"random state of cuda:{index}: not in the checkpoint, left as it is")
    return notes


def seed_torch_rng(seed: int) -> None:
    """Seed the generators of the host and of the devices in use."""
    torch.default_generator.manual_seed(seed)
    for index in _devices_in_use():
        torch.cuda.default_generators[index].manual_seed(seed + 1 + index)


def _set(name: str, setter: object, state: object) -> None:
    try:
        setter(torch.from_numpy(np.array(state, np.uint8)))  # type: ignore[operator]
    except (RuntimeError, TypeError, ValueError) as e:
        raise StateError(f"random state of {name}: does not fit this version of torch ({e})") from e


def _devices_in_use() -> list[int]:
    if not (torch.cuda.is_available() and torch.cuda.is_initialized()):  # type: ignore[no-untyped-call]
        return []
    has_context = getattr(torch._C, "_cuda_hasPrimaryContext", None)
    if has_context is None:
        return [torch.cuda.current_device()]
    return [i for i in range(torch.cuda.device_count()) if has_context(i)]
