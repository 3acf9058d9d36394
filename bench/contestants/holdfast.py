"""holdfast, as a user has it: a Checkpointer and its rules."""

from __future__ import annotations

import pathlib

import holdfast
from bench.contestants.base import Contestant
from bench.states import Subject


class Holdfast(Contestant):
    """A checkpoint counts as durable when `wait` returns; its retention runs behind the loop and is part of that.

    Outside a loop a second save replaces the checkpoint of the same step. So where all are kept, each save ends a step;
    nothing is trained between them that would wait for an overlapped copy, so it is switched off there.
    """

    overlap = True

    def __init__(
        self, scratch: pathlib.Path, subject: Subject, *, every: int | None = None, keep_all: bool = False
    ) -> None:
        super().__init__(scratch, subject, every=every, keep_all=keep_all)
        self.path = scratch / "run"
        steps = every or (1 if keep_all else None)
        self._ckpt = holdfast.Checkpointer(
            self.path,
            subject.live,
            save=holdfast.every(steps=steps) if steps else None,
            keep=None if keep_all else holdfast.last(1),
            overlap=self.overlap and not keep_all,
        )

    def save(self) -> None:
        if self.keep_all:
            self._ckpt.step_end()
        else:
            self._ckpt.save()

    def wait(self) -> None:
        self._ckpt.wait()

    def finish(self) -> None:
        self._ckpt.wait()

    def prune(self) -> None:
        """Nothing to do: `keep` did it."""

    def end_step(self, step: int) -> None:
        self._ckpt.step_end(step)

    def load(self) -> None:
        self._ckpt.restore(from_memory=False)

    def roll_back(self) -> None:
        self._ckpt.restore()

    def load_one(self, part: str, name: str) -> None:
        holdfast.open(self.path)[f"{part}/{name}"].read()

    def close(self) -> None:
        self._ckpt.close()


class HoldfastNoOverlap(Holdfast):
    """Every snapshot is copied at once, while the loop waits."""

    overlap = False
