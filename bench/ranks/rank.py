"""The program of one rank: it does what it is told, together with the others, and says what that took."""

from __future__ import annotations

import logging
import os
import pathlib
import sys
import time
import traceback
import warnings
from multiprocessing.connection import Client, Connection

import torch
import torch.distributed as dist

from bench.contestants import Entry
from bench.contestants.ranks import RanksContestant
from bench.disk import drop_caches, size
from bench.limits import Figures
from bench.ranks.limits import RankLimit
from bench.ranks.states import Shared, held
from bench.ranks.timing import processor_seconds, together
from bench.states import Recipe

now = time.perf_counter


class RankDesk:
    """One contestant, this rank's share of one state, and the clock."""

    def __init__(self, entry: Entry, recipe: Recipe, scratch: pathlib.Path) -> None:
        self._scratch = scratch
        self._make: type[RanksContestant] = entry.load()
        found = recipe.subject()
        assert isinstance(found, Shared)
        self.subject = found

    def open(self) -> None:
        self._contestant = self._make(self._scratch, self.subject)

    def save(self) -> Figures:
        """Save a state that rests: `held` until it may change, `durable` until the checkpoint survives a power cut and
        the one before is removed, `processor` seconds of rank 0 and of all its processes."""
        self.subject.change()
        contestant = self._contestant
        with together():
            spent = processor_seconds()
            started = now()
            contestant.save()
            contestant.settle()
            taken = now() - started
            contestant.finish()
            durable = now() - started
            spent = processor_seconds() - spent
        return {"held": taken, "durable": durable} | ({"processor": spent} if dist.get_rank() == 0 else {})

    def step(self) -> Figures:
        """Save, then go through the forward and backward pass of the next step, and change the state: held time is the
        call, and what the contestant makes the optimizer's step wait."""
        contestant = self._contestant
        with together():
            started = now()
            contestant.save_in_loop()
            called = now() - started
            self.subject.work()
            started = now()
            contestant.settle()
            taken = called + self.subject.step() - started
            contestant.finish()
        return {"held in a loop": taken}

    def load(self) -> Figures:
        """Load the newest checkpoint over zeros and look whether it came back: from wherever the contestant has it, and
        from the disk."""
        found: Figures = {}
        local = self.subject.local()
        samples = [(p, n) for p, of in local.items() for n in (min(of), max(of))]
        wanted = {(p, n): local[p][n].clone() for p, n in samples}
        for key, load in (("rolled back", self._contestant.roll_back), ("load", self._contestant.load)):
            with torch.no_grad():
                torch._foreach_zero_([t for of in local.values() for t in of.values()])
            if key == "load" and dist.get_rank() == 0:
                drop_caches(self._scratch)
            with together():
                started = now()
                load()
                found[key] = now() - started
            for (part, name), value in wanted.items():
                if not torch.equal(held(self.subject.tensors()[part][name]), value):
                    raise ValueError(f"{part}/{name} came back with other values")
        return found

    def state_bytes(self) -> int:
        return self.subject.nbytes()

    def stored_bytes(self) -> int:
        return size(self._scratch)

    def close(self) -> None:
        self._contestant.close()


def main() -> None:
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    pipe = Client(sys.argv[1], authkey=bytes.fromhex(sys.argv[2]))
    pipe.send(int(os.environ["RANK"]))
    entry, recipe, scratch = pipe.recv()
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    target: RankDesk | RankLimit | None = None
    method: str | None = "ready"
    while method is not None:
        try:
            if target is None:
                value = None
                target = RankDesk(entry, recipe, scratch) if entry else RankLimit(recipe, scratch)
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
