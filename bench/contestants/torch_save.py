"""torch.save: a zip of raw storages."""

from __future__ import annotations

import pathlib

import torch

from bench.contestants.base import Contestant


class TorchSave(Contestant):
    """One file. Loading through a map and copying into the live tensors beats reading into new ones first; so tensors
    that were on a GPU are mapped in host memory too."""

    def write(self, path: pathlib.Path) -> None:
        torch.save(self.subject.tensors(), path)

    def load(self) -> None:
        self.place(torch.load(self.path, map_location="cpu", weights_only=True, mmap=True))

    def load_one(self, part: str, name: str) -> None:
        torch.load(self.path, weights_only=True, mmap=True)[part][name].clone()
