"""Round-robin: in each round the limit and every contestant have one turn, in an order that rotates."""

from __future__ import annotations

import os
import pathlib
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

from bench import devices
from bench.contestants import LIMIT, NO_OVERLAP, Entry
from bench.figures import CaseResult
from bench.limits import LimitDesk
from bench.machine import free_bytes
from bench.states import Recipe
from bench.worker import Worker, WorkerFailed


@dataclass(frozen=True, slots=True)
class Plan:
    """What one run of the benchmark does."""

    rounds: int
    quick: bool
    out: pathlib.Path
    entries: tuple[Entry, ...]
    ranks: tuple[Entry, ...]  # as one of several ranks
    say: Callable[[str], None]  # shows what is being done
    device: str = "cuda"  # where the states of the cases for a GPU are


class LeftOut(Exception):
    """There is nothing here that a case could be measured on; the message says what is missing."""


SLOW_SECONDS = 30.0  # whoever has used so much in a case is not measured again in what he was measured in


class Rounds:
    """The workers of a case. One that fails is taken out, with its reason in the result, and the others go on; without
    the limit nothing could be said of them."""

    def __init__(self, plan: Plan, result: CaseResult, limit: Callable[..., object] = LimitDesk) -> None:
        self.plan = plan
        self._limit = limit
        self.result = result
        self.workers: dict[str, Worker] = {}
        self.baseline: dict[str, int] = {}
        self._turns = 0
        self._spent: defaultdict[str, float] = defaultdict(float)
        self._had: set[tuple[str, str]] = set()

    def start(
        self, recipe: Recipe, scratch: pathlib.Path, open_desk: Callable[..., object], *args: object
    ) -> None:
        """Start a worker for the limit and for each contestant that is there, and let them prepare."""
        log = self.plan.out / "workers.log"
        before = {key: len(values) for key, values in self.result.rounds.get(LIMIT, {}).items()}
        self.result.limits_before |= {entry.name: before for entry in self.plan.entries}
        self.workers[LIMIT] = Worker(log, self._limit, recipe, _folder(scratch, LIMIT))
        for entry in self.plan.entries:
            if (why := entry.missing()) is not None:
                self.result.missing[entry.name] = why
            else:
                folder = _folder(scratch, entry.name)
                self.workers[entry.name] = Worker(log, open_desk, entry, recipe, folder, *args)
        self._each("starts", lambda worker: worker.ready())
        self._each("measures memory before", self._note_baseline)
        self._each("prepares", lambda worker: worker.call("open"))

    def turn(
        self, method: str, what: str, *, figures: Callable[[dict[str, float]], dict[str, float]] = dict
    ) -> None:
        """Let everyone call a method that returns figures, one after the other, and keep what it returns."""

        def call(worker: Worker) -> None:
            name = self._name(worker)
            if name != LIMIT and self._spent[name] > SLOW_SECONDS and (name, method) in self._had:
                return
            started = time.monotonic()
            found = figures(worker.call(method))
            self._spent[name] += time.monotonic() - started
            self.result.add(name, found)
            if found.keys() & {c.key for c in self.result.columns if c.against or c.unit == "x"}:
                self._had.add((name, method))

        self._each(what, call)
        self._turns += 1

    def memory(self, method: str, key: str) -> None:
        """Let each contestant do it once more, unmeasured in time: sampling memory takes time from it.

        The figure is the most memory above the state and the imported libraries, as a multiple of the state.
        """
        nbytes = self.result.facts["bytes"]

        def call(worker: Worker) -> None:
            name = self._name(worker)
            if name != LIMIT:
                _, peak = worker.watched(method)
                self.result.add(name, {key: max(0, peak - self.baseline[name]) / nbytes})

        self._each("uses memory", call)

    def stored(self, key: str, per: float) -> None:
        """Note how many times `per` bytes each one stores."""

        def call(worker: Worker) -> None:
            name = self._name(worker)
            if name != LIMIT:
                self.result.add(name, {key: worker.call("stored_bytes") / per})

        self._each("counts bytes", call)

    def close(self) -> None:
        for worker in self.workers.values():
            worker.close()
        os.sync()

    def _note_baseline(self, worker: Worker) -> None:
        _, self.baseline[self._name(worker)] = worker.watched("rest")

    def _name(self, worker: Worker) -> str:
        return next(name for name, w in self.workers.items() if w is worker)

    def _each(self, what: str, act: Callable[[Worker], None]) -> None:
        names = list(self.workers)
        first = self._turns % len(names)
        for name in names[first:] + names[:first]:
            self.plan.say(f"{self.result.title}: {name} {what}")
            try:
                act(self.workers[name])
            except WorkerFailed as e:
                if name == LIMIT:
                    raise WorkerFailed(f"case {self.result.key}: the limit cannot be measured: {e}") from e
                self.result.missing[name] = f"failed: {e}"
                self.workers.pop(name).close()


@contextmanager
def workers(
    plan: Plan,
    result: CaseResult,
    state: str,
    desk: Callable[..., object],
    *args: object,
    limit: Callable[..., object] = LimitDesk,
    device: str = "cpu",
) -> Iterator[Rounds]:
    """The workers of a case, ready, each with an empty directory; all gone afterwards. `state` is module:function."""
    with tempfile.TemporaryDirectory(dir=plan.out, prefix="scratch-", ignore_cleanup_errors=True) as scratch:
        rounds = Rounds(plan, result, limit)
        try:
            rounds.start(Recipe(state, plan.quick, device), pathlib.Path(scratch), desk, *args)
            yield rounds
        finally:
            rounds.close()


def without_loop(plan: Plan) -> Plan:
    """The plan for states that rest: there, a mode that differs only inside a training loop would be measured twice."""
    entries = tuple(e for e in plan.entries if e.name != NO_OVERLAP)
    return replace(plan, entries=entries)


def heats(
    entries: tuple[Entry, ...], worker_bytes: int, on_device: tuple[str, int] = ("cpu", 0)
) -> Iterator[tuple[Entry, ...]]:
    """Yield who is measured side by side: as many as there is memory for, beside the limit. `on_device` is a device,
    and the bytes of its own memory that a worker needs.

    Each is then compared with the limit of the rounds of its own heat.
    """
    device, device_bytes = on_device
    room = free_bytes() / worker_bytes
    if (free := devices.free_bytes(device)) is not None:
        room = min(room, free / device_bytes)
    at_once = max(1, int(0.9 * room) - 1)
    for start in range(0, len(entries), at_once):
        yield entries[start : start + at_once]


def _folder(scratch: pathlib.Path, name: str) -> pathlib.Path:
    found = scratch / "".join(c if c.isalnum() else "-" for c in name)
    found.mkdir()
    return found
