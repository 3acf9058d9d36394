"""torch.distributed.checkpoint: blocking, and in the background."""

from __future__ import annotations

import os
import pathlib
import warnings

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType, AsyncSaveResponse

from bench.contestants.base import Contestant
from bench.states import State, Subject

THREADS = 2  # as many as the machine has cores; never slower than one here

# "torch.distributed is disabled, assuming a single process": it is one.
warnings.filterwarnings("ignore", message="torch.distributed is disabled")


class Dcp(Contestant):
    """The files are synced by whoever measures, as for everyone: `sync_files` would do it one by one, before that."""

    def write(self, path: pathlib.Path, state: State) -> None:
        dcp.save(dict(state), storage_writer=self._writer(path), no_dist=True)

    def _writer(self, path: pathlib.Path) -> dcp.FileSystemWriter:
        return dcp.FileSystemWriter(path, thread_count=THREADS, sync_files=False)

    def load(self) -> None:
        dcp.load(dict(self.subject.tensors()), checkpoint_id=str(self.path), no_dist=True)

    def load_one(self, part: str, name: str) -> None:
        like = self.subject.tensors()[part][name]
        dcp.load({part: {name: torch.empty_like(like)}}, checkpoint_id=str(self.path), no_dist=True)


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
        os.environ.setdefault("MASTER_ADDR", "localhost")  # the process option wants a process group
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        options = StagingOptions(
            use_pinned_memory=self.pins,
            use_shared_memory=not self.many,
            use_async_staging=True,
            use_non_blocking_copy=self.pins,
        )
        self._type = AsyncCheckpointerType.THREAD if self.many else AsyncCheckpointerType.PROCESS
        self._stager = DefaultStager(options)
        self._saving: AsyncSaveResponse | None = None

    def write(self, path: pathlib.Path, state: State) -> None:
        found = dcp.async_save(
            dict(state),
            storage_writer=self._writer(path),
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
        dist.destroy_process_group()
