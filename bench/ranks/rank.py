"""The program of one rank: it does what it is told, together with the others, and says what that took."""

from __future__ import annotations

import logging
import os
import pathlib
import sys
import time
import traceback
import warnings
from contextlib import AbstractContextManager
from multiprocessing.connection import Client, Connection

import torch
import torch.distributed as dist

from bench.contestants import Entry
from bench.desks import SaveDesk
from bench.ranks.limits import RankLimitDesk
from bench.ranks.timing import Together
from bench.states import Recipe, Training
from bench.timing import Figures

now = time.perf_counter


class RankDesk(SaveDesk):
    """One contestant, this rank's share of one state, and the clock."""

    def __init__(self, entry: Entry, recipe: Recipe, scratch: pathlib.Path) -> None:
        super().__init__(entry, recipe, scratch)
        self._together = Together()
        self._steps = 0

    def open(self) -> None:
        self._contestant = self._make(self._scratch, self.subject, every=1)

    def quiet(self) -> AbstractContextManager[None]:
        return self._together.quiet()

    def save(self) -> Figures:
        return super().save() | self._together.processor()

    def step(self) -> Figures:
        """Save, then go through the forward and backward pass of the next step, and change the state: held time is the
        call, and what the contestant makes the optimizer's step wait."""
        subject, contestant = self.subject, self._contestant
        assert isinstance(subject, Training)
        self._steps += 1
        with self.quiet():
            started = now()
            contestant.end_step(self._steps)
            called = now() - started
            subject.backward()
            started = now()
            contestant.settle()
            taken = called + subject.step() - started
            contestant.finish()
            contestant.prune()
        subject.optimizer.zero_grad()
        return {"held in a loop": taken}

    def load(self) -> Figures:
        """Load the newest checkpoint from wherever the contestant has it, and from the disk."""
        return {"rolled back": self.brought_back(self._contestant.roll_back)} | super().load()


def main() -> None:
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    pipe = Client(sys.argv[1], authkey=bytes.fromhex(sys.argv[2]))
    pipe.send(int(os.environ["RANK"]))
    entry, recipe, scratch = pipe.recv()
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    target: RankDesk | RankLimitDesk | None = None
    method: str | None = "ready"
    while method is not None:
        try:
            if target is None:
                value = None
                target = RankDesk(entry, recipe, scratch) if entry else RankLimitDesk(recipe, scratch)
            else:
                value = getattr(target, method)()
            pipe.send((None, value))
        except Exception as e:  # noqa: BLE001 - whatever a contestant raises is a result
            traceback.print_exc()
            pipe.send((f"{type(e).__name__}: {str(e).strip()[:300]}", None))
        method = _next(pipe) if method != "close" else None
    dist.destroy_process_group()


def _next(pipe: Connection) -> str | None:
    """Return what is to be done next; None when nobody is there any more who would say so."""
    try:
        found: str = pipe.recv()
    except EOFError:
        return None
    return found


if __name__ == "__main__":
    main()
