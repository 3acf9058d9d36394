"""What a contestant does; who measures it is the same for all."""

from __future__ import annotations

import pathlib

import torch

from bench.disk import delete, size, sync_tree
from bench.states import State, Subject

MANY = 1000  # tensors; beyond, what is best for few large ones is not


class Contestant:
    """A way to save, driven through its public interface with its best settings for a state's device.

    One checkpoint is: `save`, then `settle` before the state may change, then `finish` when it must be durable.
    """

    def __init__(
        self, scratch: pathlib.Path, subject: Subject, *, every: int | None = None, keep_all: bool = False
    ) -> None:
        """Prepare, as a user would before the loop. `every` is given when `end_step` decides when to save."""
        self.scratch = scratch
        self.subject = subject
        self.every = every
        self.keep_all = keep_all
        self.path = scratch / "none"
        self._count = 0

    @property
    def many(self) -> bool:
        """Whether the state has so many tensors that a file or a file descriptor for each is too much."""
        return sum(len(part) for part in self.subject.tensors().values()) >= MANY

    @property
    def pins(self) -> bool:
        """Whether copies of the state go over a bus, which is faster into pinned memory."""
        return self.subject.device == "cuda"

    def write(self, path: pathlib.Path) -> None:
        """Write a checkpoint to `path`, or start to."""
        raise NotImplementedError

    def load(self) -> None:
        """Put the newest checkpoint into the live state: its values are in the memory that the program uses."""
        raise NotImplementedError

    def roll_back(self) -> None:
        """Do the same right after that checkpoint was saved."""
        self.load()

    def load_one(self, part: str, name: str) -> None:
        """Bring one tensor of the newest checkpoint into memory."""
        raise NotImplementedError

    def save(self) -> None:
        """Save the state as it is now; return when the caller may go on."""
        self._count += 1
        self.path = self.scratch / f"step{self._count}"
        self.write(self.path)

    def settle(self) -> None:
        """Return when the state may be changed. Called before each change."""

    def wait(self) -> None:
        """Return when the background is idle."""

    def finish(self) -> None:
        """Return when the newest checkpoint is durable: whoever does not sync by himself is synced here."""
        self.wait()
        sync_tree(self.path)

    def prune(self) -> None:
        """Remove every checkpoint but the newest, unless all are kept."""
        for path in () if self.keep_all else list(self.scratch.iterdir()):
            if path != self.path:
                delete(path)

    def end_step(self, step: int) -> None:
        """End a training step; save at every `every`th."""
        if self.every and step % self.every == 0:
            self.wait()
            self.save()

    def take_over(self) -> None:
        """Put what the last `load` made anew into the tensors of the bench. Others than JAX load into these."""

    def stored_bytes(self) -> int:
        """Bytes of everything it stored and has not removed."""
        return size(self.scratch)

    def close(self) -> None:
        """Give up what it holds."""

    def place(self, found: State) -> None:
        """Copy loaded tensors into the live ones, in one call."""
        live = self.subject.tensors()
        pairs = [(t, found[part][name]) for part, tensors in live.items() for name, t in tensors.items()]
        with torch.no_grad():
            torch._foreach_copy_([to for to, _ in pairs], [value for _, value in pairs])  # pyright: ignore[reportPrivateImportUsage]
