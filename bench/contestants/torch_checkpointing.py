"""torch_checkpointing: the separate library of PyTorch, asynchronous by default."""

from __future__ import annotations

import pathlib
from concurrent.futures import Future

import torch
from torch import multiprocessing
from torch_checkpointing import CheckpointManager
from torch_checkpointing.checkpoint_writer import CheckpointWriterConfig
from torch_checkpointing.config import AsyncCheckpointSaverConfig
from torch_checkpointing.staging import CheckpointStagerConfig
from torch_checkpointing.storage.filesystem import LocalFileSystemStorageConfig

from bench.contestants.base import Contestant
from bench.states import Subject


class TorchCheckpointing(Contestant):
    """Its defaults for states on a GPU, for others what its page on troubles says for machines without CUDA; one thread
    for each of the state's three files.

    Its direct I/O, on by default, ends in EINVAL on ext4 at version 0.1.1: it writes what is not aligned.
    Very many tensors are shared by name, since torch's default takes a file descriptor for each, and they run out.
    """

    def __init__(
        self, scratch: pathlib.Path, subject: Subject, *, every: int | None = None, keep_all: bool = False
    ) -> None:
        super().__init__(scratch, subject, every=every, keep_all=keep_all)
        if self.many:
            multiprocessing.set_sharing_strategy("file_system")  # type: ignore[no-untyped-call]
        save = AsyncCheckpointSaverConfig(
            writer_config=CheckpointWriterConfig(file_write_max_threads=3),
            staging_config=CheckpointStagerConfig(
                use_pinned_memory=self.pins, use_non_blocking_copy=self.pins
            ),
        )
        storage = LocalFileSystemStorageConfig(use_direct_io=False)
        self._manager = CheckpointManager(CheckpointManager.Config(save=save, storage_config=storage))
        self._manager.prewarm_staging(subject.local())
        self._saving: Future[object] | None = None

    def write(self, path: pathlib.Path) -> None:
        self._saving = self._manager.save(str(path), self.subject.local())

    def settle(self) -> None:
        with self._manager.lock():  # what `with manager.lock(): optimizer.step()` waits for
            pass

    def wait(self) -> None:
        if self._saving is not None:
            self._saving.result()

    def load(self) -> None:
        self._manager.load(str(self.path), into=self.subject.local(), strict=True)

    def load_one(self, part: str, name: str) -> None:
        like = self.subject.tensors()[part][name]
        self._manager.load(str(self.path), into={part: {name: torch.empty_like(like)}}, strict=True)

    def close(self) -> None:
        self._manager.close()
