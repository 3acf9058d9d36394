"""torch_checkpointing with several ranks."""

from __future__ import annotations

import pathlib
from concurrent.futures import Future

from torch import multiprocessing
from torch_checkpointing import CheckpointManager
from torch_checkpointing.checkpoint_writer import CheckpointWriterConfig
from torch_checkpointing.config import AsyncCheckpointSaverConfig
from torch_checkpointing.staging import CheckpointStagerConfig
from torch_checkpointing.storage.filesystem import LocalFileSystemStorageConfig

from bench.contestants.ranks import RanksContestant
from bench.ranks.states import Shared


class TorchCheckpointing(RanksContestant):
    """As for one process. Without a resharder: what a rank has saved only that rank, of as many, can load."""

    def __init__(self, scratch: pathlib.Path, subject: Shared) -> None:
        super().__init__(scratch, subject)
        if self.many:
            multiprocessing.set_sharing_strategy("file_system")
        save = AsyncCheckpointSaverConfig(
            writer_config=CheckpointWriterConfig(file_write_max_threads=3),
            staging_config=CheckpointStagerConfig(use_pinned_memory=False, use_non_blocking_copy=False),
        )
        storage = LocalFileSystemStorageConfig(use_direct_io=False)
        self._manager = CheckpointManager(CheckpointManager.Config(save=save, storage_config=storage))
        self._manager.prewarm_staging(subject.local())
        self._saving: Future[object] | None = None

    def write(self, path: pathlib.Path) -> None:
        self._saving = self._manager.save(str(path), self.subject.local())

    def settle(self) -> None:
        with self._manager.lock():
            pass

    def wait(self) -> None:
        if self._saving is not None:
            self._saving.result()

    def load(self) -> None:
        self._manager.load(str(self.path), into=self.subject.local(), strict=True)

    def files_of(self, rank: int) -> list[pathlib.Path]:
        return [p for p in self.path.rglob("*") if p.is_file() and f"_{rank}" in p.name]

    def close(self) -> None:
        self._manager.close()
