"""torch.distributed.checkpoint with several ranks: blocking, and in the background."""

from __future__ import annotations

import pathlib
import warnings

import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType, AsyncSaveResponse

from bench.contestants.ranks import RanksContestant
from bench.ranks.states import Shared

warnings.filterwarnings("ignore")


class DcpAsItComes(RanksContestant):
    """`dcp.save` with nothing set: one thread, which syncs its file."""

    def write(self, path: pathlib.Path) -> None:
        dcp.save(dict(self.subject.tensors()), checkpoint_id=str(path))

    def load(self) -> None:
        dcp.load(dict(self.subject.tensors()), checkpoint_id=str(self.path))

    def files_of(self, rank: int) -> list[pathlib.Path]:
        return list(self.path.glob(f"__{rank}_*"))


class Dcp(DcpAsItComes):
    """Two threads, no sync in between, and plans that are remembered from save to save."""

    def write(self, path: pathlib.Path) -> None:
        dcp.save(dict(self.subject.tensors()), storage_writer=writer_to(path), planner=planner())


class DcpAsync(DcpAsItComes):
    """As for one process: staging in a thread into shared memory that is kept, writing in a process. For very many
    tensors it is a thread, for in shared memory each takes a file descriptor."""

    def __init__(self, scratch: pathlib.Path, subject: Shared) -> None:
        super().__init__(scratch, subject)
        self._type = AsyncCheckpointerType.THREAD if self.many else AsyncCheckpointerType.PROCESS
        self._stager = DefaultStager(
            StagingOptions(
                use_pinned_memory=False,
                use_shared_memory=not self.many,
                use_async_staging=True,
                use_non_blocking_copy=False,
            )
        )
        self._saving: AsyncSaveResponse | None = None

    def write(self, path: pathlib.Path) -> None:
        found = dcp.async_save(
            dict(self.subject.tensors()),
            storage_writer=writer_to(path),
            planner=planner(),
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


def writer_to(path: pathlib.Path) -> dcp.FileSystemWriter:
    return dcp.FileSystemWriter(path, thread_count=2, sync_files=False)


def planner() -> DefaultSavePlanner:
    return DefaultSavePlanner(enable_plan_caching=True)
