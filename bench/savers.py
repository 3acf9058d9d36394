"""Ways to save and load a state, each through its public interface; each counts as done when durable."""

from __future__ import annotations

import pathlib
import shutil
import time
import warnings
from typing import Protocol

import safetensors.torch
import torch
import torch.distributed.checkpoint as dcp

import holdfast
from bench.limits import drop_caches, sync_tree

State = dict[str, dict[str, torch.Tensor]]


class Saver(Protocol):
    """One way to save. `save` returns (seconds the training thread was held, seconds until durable)."""

    name: str

    def save(self, state: State) -> tuple[float, float]: ...
    def load(self, state: State) -> float: ...
    def stored_bytes(self) -> int: ...
    def close(self) -> None: ...


class Holdfast:
    name = "holdfast"

    def __init__(self, scratch: pathlib.Path, state: State) -> None:
        self.path = scratch / "holdfast"
        self.ckpt = holdfast.Checkpointer(self.path, state, keep=holdfast.last(1))

    def save(self, state: State) -> tuple[float, float]:
        started = time.perf_counter()
        self.ckpt.save()
        held = time.perf_counter() - started
        self.ckpt.wait()
        return held, time.perf_counter() - started

    def load(self, state: State) -> float:
        drop_caches(self.path / "data")
        started = time.perf_counter()
        holdfast.load(self.path, into=state)
        return time.perf_counter() - started

    def stored_bytes(self) -> int:
        return _size(self.path / "data") + _size(self.path / "checkpoints")

    def close(self) -> None:
        self.ckpt.close()


class _Written:
    """A saver that writes `path` when it is told to; whoever measures makes it durable and drops the caches."""

    name = ""
    path: pathlib.Path

    def write(self, state: State) -> None:
        raise NotImplementedError

    def read(self, state: State) -> None:
        raise NotImplementedError

    def save(self, state: State) -> tuple[float, float]:
        started = time.perf_counter()
        self.write(state)
        held = time.perf_counter() - started
        sync_tree(self.path)
        return held, time.perf_counter() - started

    def load(self, state: State) -> float:
        drop_caches(self.path)
        started = time.perf_counter()
        self.read(state)
        return time.perf_counter() - started

    def stored_bytes(self) -> int:
        return _size(self.path)

    def close(self) -> None:
        if self.path.is_dir():
            shutil.rmtree(self.path)
        else:
            self.path.unlink(missing_ok=True)


class TorchSave(_Written):
    name = "torch.save"

    def __init__(self, scratch: pathlib.Path, state: State) -> None:
        self.path = scratch / "state.pt"

    def write(self, state: State) -> None:
        torch.save(state, self.path)

    def read(self, state: State) -> None:
        _copy_in(state, torch.load(self.path, weights_only=True))


class Safetensors(_Written):
    name = "safetensors"

    def __init__(self, scratch: pathlib.Path, state: State) -> None:
        self.path = scratch / "state.safetensors"

    def write(self, state: State) -> None:
        flat = {f"{part}/{name}": t for part, tensors in state.items() for name, t in tensors.items()}
        safetensors.torch.save_file(flat, self.path)

    def read(self, state: State) -> None:
        found = safetensors.torch.load_file(self.path)
        _copy_in(state, {p: {n: found[f"{p}/{n}"] for n in tensors} for p, tensors in state.items()})


class DcpSync(_Written):
    name = "DCP"

    def __init__(self, scratch: pathlib.Path, state: State) -> None:
        self.path = scratch / "dcp"

    def save(self, state: State) -> tuple[float, float]:
        shutil.rmtree(self.path, ignore_errors=True)
        return super().save(state)

    def write(self, state: State) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dcp.save(dict(state), checkpoint_id=str(self.path), no_dist=True)

    def read(self, state: State) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dcp.load(dict(state), checkpoint_id=str(self.path), no_dist=True)


SAVERS = (Holdfast, TorchSave, Safetensors, DcpSync)


def _copy_in(state: State, found: State) -> None:
    with torch.no_grad():
        for part, tensors in state.items():
            for name, t in tensors.items():
                t.copy_(found[part][name])


def _size(path: pathlib.Path) -> int:
    files = [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]
    return sum(p.stat().st_size for p in files)
