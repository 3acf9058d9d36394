"""What a contestant does as one of several ranks; holdfast as a user has it there."""

from __future__ import annotations

import pathlib

import torch.distributed as dist

import holdfast
from bench.disk import delete, sync_file, sync_tree
from bench.ranks.states import Shared


class RanksContestant:
    """A way to save a state that is spread over ranks, driven through its public interface on each of them.

    One checkpoint is: `save`, then `settle` before the state may change, then `finish`, after which it is durable and
    the only one.
    """

    def __init__(self, scratch: pathlib.Path, subject: Shared) -> None:
        """Prepare, as a user would before the loop."""
        self.scratch = scratch
        self.subject = subject
        self.many = sum(len(of) for of in subject.tensors().values()) >= 1000
        self.path = scratch / "none"
        self._count = 0

    def write(self, path: pathlib.Path) -> None:
        """Write a checkpoint to `path`, or start to."""
        raise NotImplementedError

    def load(self) -> None:
        """Put the newest checkpoint into the live state."""
        raise NotImplementedError

    def roll_back(self) -> None:
        """Put the newest checkpoint into the live state right after it was saved."""
        self.load()

    def save(self) -> None:
        """Save the state as it is now; return when the caller may go on."""
        self._count += 1
        self.path = self.scratch / f"step{self._count}"
        self.write(self.path)

    def settle(self) -> None:
        """Return when the state may be changed."""

    def wait(self) -> None:
        """Return when the background is idle."""

    def save_in_loop(self) -> None:
        """End a training step, and save the state then."""
        self.save()

    def finish(self) -> None:
        """Return when the newest checkpoint is durable and the one before gone. Each rank syncs the files that bear its
        number, and rank 0 what is left when all have."""
        self.wait()
        for file in self.files_of(dist.get_rank()):
            sync_file(file)
        dist.barrier()
        if dist.get_rank() == 0:
            sync_tree(self.path)
            for path in self.scratch.iterdir():
                if path != self.path:
                    delete(path)

    def files_of(self, rank: int) -> list[pathlib.Path]:
        """Return the files of the newest checkpoint that this rank has written."""
        raise NotImplementedError

    def close(self) -> None:
        """Give up what it holds."""


class Holdfast(RanksContestant):
    """A Checkpointer on every rank, with its writer process. `save()` copies at once; `step_end` overlaps the copy with
    the next forward and backward pass."""

    def __init__(self, scratch: pathlib.Path, subject: Shared) -> None:
        super().__init__(scratch, subject)
        self._ckpt = holdfast.Checkpointer(
            scratch / "run", subject.live, save=holdfast.every(steps=1), keep=holdfast.last(1)
        )

    def save(self) -> None:
        self._ckpt.save()

    def save_in_loop(self) -> None:
        self._ckpt.step_end()

    def finish(self) -> None:
        self._ckpt.wait()

    def load(self) -> None:
        self._ckpt.restore(from_memory=False)

    def roll_back(self) -> None:
        self._ckpt.restore()

    def close(self) -> None:
        self._ckpt.close()
