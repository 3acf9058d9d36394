"""torch.distributed.checkpoint: blocking, and in the background."""

from __future__ import annotations

import os
import pathlib
import warnings

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import (
    AsyncCheckpointerType,
    AsyncSaveResponse,
    async_save,
    save,
)

from bench.contestants.base import Contestant
from bench.states import Subject

THREADS = 2  # as many as the machine has cores; never slower than one here

# "torch.distributed is disabled, assuming a single process": it is one.
warnings.filterwarnings("ignore", message="torch.distributed is disabled")


class Dcp(Contestant):
    """The files are synced by whoever measures, as for everyone: `sync_files` would do it one by one, before that."""

    no_dist = True

    def planner(self) -> DefaultSavePlanner | None:
        """What decides who writes what; None for the default."""
        return None

    def writer(self, path: pathlib.Path) -> FileSystemWriter:
        return FileSystemWriter(path, thread_count=THREADS, sync_files=False)

    def write(self, path: pathlib.Path) -> None:
        save(
            dict(self.subject.tensors()),
            storage_writer=self.writer(path),
            planner=self.planner(),
            no_dist=self.no_dist,
        )

    def load(self) -> None:
        load(dict(self.subject.tensors()), checkpoint_id=str(self.path), no_dist=self.no_dist)

    def load_one(self, part: str, name: str) -> None:
        like = self.subject.tensors()[part][name]
        load({part: {name: torch.empty_like(like)}}, checkpoint_id=str(self.path), no_dist=self.no_dist)


class DcpAsync(Dcp):
    """Staging in a thread into shared memory that is kept, writing in a process.

    Pinned memory and non-blocking copies need an accelerator. There the stager copies on a stream of its own, which
    does not wait for the training's: whoever calls must have caught up with that, as every clock here has when it
    starts. A thread instead of the process would write under the training thread's interpreter lock. For very many
    tensors it is a thread all the same: in shared memory each tensor takes a file descriptor, and they run out.
    """

    def __init__(
        self, scratch: pathlib.Path, subject: Subject, *, every: int | None = None, keep_all: bool = False
    ) -> None:
        super().__init__(scratch, subject, every=every, keep_all=keep_all)
        self._alone = not dist.is_initialized()
        if self._alone:  # the process option wants a process group
            os.environ.setdefault("MASTER_ADDR", "localhost")
            dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
        options = StagingOptions(
            use_pinned_memory=self.pins,
            use_shared_memory=not self.many,
            use_async_staging=True,
            use_non_blocking_copy=self.pins,
        )
        self._type = AsyncCheckpointerType.THREAD if self.many else AsyncCheckpointerType.PROCESS
        self._stager = DefaultStager(options)
        self._saving: AsyncSaveResponse | None = None

    def write(self, path: pathlib.Path) -> None:
        found = async_save(
            dict(self.subject.tensors()),
            storage_writer=self.writer(path),
            planner=self.planner(),
            async_stager=self._stager,
            async_checkpointer_type=self._type,
        )
        assert isinstance(found, AsyncSaveResponse)
        self._saving = found

    def settle(self) -> None:
        if self._saving is not None:
            self._saving.staging_completion.result()

    def wait(self) -> None:
        if self._saving is not None:
            self._saving.upload_completion.result()

    def close(self) -> None:
        self.wait()
        self._stager.close()
        if self._alone:
            dist.destroy_process_group()
