"""Orbax, the checkpointer of JAX."""

from __future__ import annotations

import os
import pathlib
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import numpy as np
import orbax.checkpoint as ocp
import torch
from torch.utils.dlpack import from_dlpack

from bench.contestants.base import Contestant
from bench.states import State, Subject


class Orbax(Contestant):
    """Its AsyncCheckpointer over the same memory as everybody's.

    Arrays of JAX do not change, so a save of them copies nothing; they are given to it as such where the state rests
    until it is durable. A training loop that changes its state in place hands over numpy arrays, which are copied;
    and for very many tensors numpy arrays are much the faster kind, as is one database (OCDBT) for all.
    """

    def __init__(
        self, scratch: pathlib.Path, subject: Subject, *, every: int | None = None, keep_all: bool = False
    ) -> None:
        super().__init__(scratch, subject, every=every, keep_all=keep_all)
        handler = ocp.PyTreeCheckpointHandler(use_compression=False, use_ocdbt=self.many)
        self._numpy = self.many or every is not None
        self._checkpointer = ocp.AsyncCheckpointer(handler)
        self._found: Any = None

    def write(self, path: pathlib.Path) -> None:
        arrays = self._arrays(self.subject.tensors())
        self._checkpointer.save(path.absolute(), args=ocp.args.PyTreeSave(arrays))

    def _arrays(self, state: State) -> dict[str, dict[str, Any]]:
        make = np.asarray if self._numpy else jax.dlpack.from_dlpack
        return {part: {name: make(t) for name, t in tensors.items()} for part, tensors in state.items()}

    def wait(self) -> None:
        self._checkpointer.wait_until_finished()

    def load(self) -> None:
        self._found = None
        self._found = self._restore(self._arrays(self.subject.tensors()), partial=False)

    def load_one(self, part: str, name: str) -> None:
        one = {part: {name: self.subject.tensors()[part][name]}}
        self._restore(self._arrays(one), partial=True)

    def _restore(self, like: dict[str, dict[str, Any]], *, partial: bool) -> Any:
        here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        kind = (
            ocp.RestoreArgs(restore_type=np.ndarray) if self._numpy else ocp.ArrayRestoreArgs(sharding=here)
        )
        arguments = jax.tree.map(lambda _: kind, like)
        restore = ocp.args.PyTreeRestore(item=like, restore_args=arguments, partial_restore=partial)
        found = self._checkpointer.restore(self.path.absolute(), args=restore)
        return jax.block_until_ready(found)

    def take_over(self) -> None:
        seen = torch.from_numpy if self._numpy else from_dlpack
        self.place({part: {name: seen(t) for name, t in of.items()} for part, of in self._found.items()})

    def close(self) -> None:
        self._checkpointer.close()
