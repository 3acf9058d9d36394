"""What runs inside a worker: one contestant, one state, and the clock."""

from __future__ import annotations

import pathlib
import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager

import torch

from bench.contestants import Entry
from bench.devices import finish
from bench.disk import drop_caches
from bench.states import ONE_TENSOR, Recipe, Training
from bench.timing import Figures, quiet

now = time.perf_counter


class SaveDesk:
    """Saves and loads a state that rests between saves."""

    def __init__(self, entry: Entry, recipe: Recipe, scratch: pathlib.Path, keep_all: bool = False) -> None:
        self._scratch = scratch
        self._keep_all = keep_all
        self._make = entry.load()  # imported before memory is looked at
        self.subject = recipe.subject()

    def open(self) -> None:
        """Let the contestant prepare."""
        self._contestant = self._make(self._scratch, self.subject, keep_all=self._keep_all)

    def rest(self) -> None:
        """Nothing goes on before a save: the memory of now is what the state takes."""

    def quiet(self) -> AbstractContextManager[None]:
        return quiet(self.subject.device)

    def save(self) -> Figures:
        """Change the state and save it: the time until the caller may go on and change it, and until it is durable.

        The second includes the removal of the checkpoint before it.
        """
        self.subject.change()
        contestant = self._contestant
        with self.quiet():
            started = now()
            contestant.save()
            contestant.settle()
            held = now() - started
            contestant.finish()
            contestant.prune()
            return {"held": held, "durable": now() - started}

    def load(self) -> Figures:
        """Load the newest checkpoint from the disk, over zeros, and look whether it came back."""
        drop_caches(self._scratch)
        return {"load": self.brought_back(self._contestant.load)}

    def roll_back(self) -> Figures:
        """Save, and load that again at once, over zeros, from wherever the contestant has it."""
        self.save()
        return {"rolled back": self.brought_back(self._contestant.roll_back)}

    def brought_back(self, load: Callable[[], None]) -> float:
        """Set the live state to zero, and load it; return what that took. Raises ValueError if other values came."""
        live = self.subject.local()
        ends = [(part, name) for part, of in live.items() for name in (min(of), max(of))]
        wanted = {(part, name): live[part][name].clone() for part, name in ends}
        with torch.no_grad():
            torch._foreach_zero_([t for of in live.values() for t in of.values()])  # pyright: ignore[reportPrivateImportUsage]
        with self.quiet():
            started = now()
            load()
            finish(self.subject.device)
            taken = now() - started
        self._contestant.take_over()
        for (part, name), value in wanted.items():
            if not torch.equal(live[part][name], value):
                raise ValueError(f"{part}/{name} came back with other values")
        return taken

    def load_one(self) -> Figures:
        """Load one tensor of the newest checkpoint from the disk."""
        drop_caches(self._scratch)
        started = now()
        self._contestant.load_one(*ONE_TENSOR)
        return {"load one": now() - started}

    def stored_bytes(self) -> int:
        return self._contestant.stored_bytes()

    def close(self) -> None:
        self._contestant.close()


class TrainDesk:
    """Trains, with and without saving; both in every turn, so that what slows the machine slows both."""

    def __init__(self, entry: Entry, recipe: Recipe, scratch: pathlib.Path, every: int, saves: int) -> None:
        self._scratch = scratch
        self._every = every
        self._steps = every * saves
        self._saves = saves
        self._make = entry.load()
        found = recipe.subject()
        assert isinstance(found, Training)
        self.subject = found
        self._step = every // 2  # so that a turn ends in the middle between two saves

    def open(self) -> None:
        """Let the contestant prepare; then one turn that nobody looks at warms all up."""
        self._contestant = self._make(self._scratch, self.subject, every=self._every)
        self.turn()

    def rest(self) -> None:
        """Train without any contestant: what that takes at its peak is no contestant's memory."""
        for _ in range(self._every):
            self._plain_step()

    def turn(self) -> Figures:
        """Train a while without saving, then as long with a save every few steps."""
        with quiet(self.subject.device):
            plain, before = zip(*[self._plain_step() for _ in range(self._steps)], strict=True)
        saving, waits = zip(*[self._saving_step() for _ in range(self._steps)], strict=True)
        self._contestant.finish()
        self._contestant.prune()
        return {
            "step": statistics.median(plain),
            "step, saving": statistics.median(saving),
            "median slowdown": statistics.median(saving) / statistics.median(plain),
            "total slowdown": sum(saving) / sum(plain),
            "held": (sum(waits) - sum(before)) / self._saves,
            "lost": (sum(saving) - sum(plain)) / self._saves,
        }

    def _plain_step(self) -> tuple[float, float]:
        """One step; return what it took, and of that what torch does before an optimizer's hooks are asked."""
        started = now()
        self.subject.backward()
        computed = now()
        stepping = self.subject.step()
        return now() - started, stepping - computed

    def _saving_step(self) -> tuple[float, float]:
        """One step; return what it took, and of that what the loop waited for the contestant, in its calls or before
        the optimizer stepped."""
        started = now()
        self.subject.backward()
        computed = now()
        self._contestant.settle()
        stepping = self.subject.step()
        stepped = now()
        self._step += 1
        self._contestant.end_step(self._step)
        ended = now()
        return ended - started, (stepping - computed) + (ended - stepped)

    def close(self) -> None:
        self._contestant.close()
