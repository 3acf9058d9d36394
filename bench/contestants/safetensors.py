"""safetensors: one flat file, read by name."""

from __future__ import annotations

import pathlib

import safetensors
import safetensors.torch

from bench.contestants.base import Contestant


class Safetensors(Contestant):
    """One file. `load_file` maps it, and copying into the live tensors reads it."""

    def write(self, path: pathlib.Path) -> None:
        parts = self.subject.tensors()
        flat = {f"{part}/{name}": t for part, tensors in parts.items() for name, t in tensors.items()}
        safetensors.torch.save_file(flat, path)

    def load(self) -> None:
        found = safetensors.torch.load_file(self.path)
        parts = self.subject.tensors()
        self.place({part: {n: found[f"{part}/{n}"] for n in tensors} for part, tensors in parts.items()})

    def load_one(self, part: str, name: str) -> None:
        with safetensors.safe_open(self.path, framework="pt") as file:
            file.get_tensor(f"{part}/{name}").clone()
