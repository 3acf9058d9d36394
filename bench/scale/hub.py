"""Thousands of ranks in one thread, on a clock of their own.

Each rank is a greenlet: it runs holdfast's own code until that asks the store for something or sleeps, and goes on when
the model's clock has reached the end of it. What it computes meanwhile is measured with the processor's clock, and the
model's clock moves on by it.
"""

from __future__ import annotations

import heapq
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import TracebackType
from typing import TypeVar

from greenlet import getcurrent, greenlet

__all__ = ["Account", "Crew", "Hub", "Task"]

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(slots=True)
class Account:
    """What one rank has cost in one phase. `seconds` is when it ended, from the beginning of the phase."""

    rank: int = 0
    requests: Counter[str] = field(default_factory=Counter)
    written_bytes: int = 0
    word_bytes: int = 0  # of these, what is said to other ranks
    read_bytes: int = 0
    cpu_seconds: float = 0.0
    seconds: float = 0.0

    @property
    def asked(self) -> int:
        """How many requests it sent to the store."""
        return self.requests.total()

    @property
    def answered(self) -> dict[str, int]:
        """How many of each kind, without looks for what was not there yet: these depend on who waits for whom."""
        return {kind: count for kind, count in sorted(self.requests.items()) if kind != "miss"}


class Task:
    """Something that a rank does, on its account."""

    def __init__(self, act: Callable[[], object], account: Account, home: greenlet) -> None:
        self.account = account
        self.result: object = None
        self.failure: BaseException | None = None
        self.done = False
        self.waiting: list[Task] = []
        self._act = act
        self.greenlet = greenlet(self._run, home)

    def _run(self) -> None:
        try:
            self.result = self._act()
        except BaseException as e:  # noqa: BLE001 - raised by who asks for the result
            self.failure = e
        self.done = True

    def take(self) -> object:
        """Return what came of it. Raises what it failed with."""
        if self.failure is not None:
            raise self.failure
        return self.result


class Hub:
    """Runs tasks by the order in which things happen on its clock; a `TimeSource` for what it runs."""

    def __init__(self, *, count_cpu: bool = True) -> None:
        self.time = 1_700_000_000.0
        self.task: Task | None = None
        self._count_cpu = count_cpu
        self._thread = threading.get_ident()
        self._home = getcurrent()
        self._due: list[tuple[float, int, Task]] = []
        self._number = 0
        self._since = 0.0  # when the present task began to compute, on the processor's clock
        self._computed = 0.0  # what it has computed before that, since it was last let run
        self.switches = 0

    # ---- for the code under test -------------------------------------------------------------------------------

    def now(self) -> float:
        return self.monotonic()

    def monotonic(self) -> float:
        return self.time + (self._spent() if self._count_cpu and self.task is not None else 0.0)

    def sleep(self, seconds: float) -> None:
        self.wait(self.monotonic() + seconds)

    # ---- for the model -------------------------------------------------------------------------------------------

    @property
    def is_here(self) -> bool:
        """Whether the caller is a task, and not a thread that one has started."""
        return self.task is not None and threading.get_ident() == self._thread

    def wait(self, until: float) -> None:
        """Let the others run until then."""
        self._put(until, self._present())
        self._leave()

    @contextmanager
    def outside(self) -> Iterator[None]:
        """Do what costs the model's processor time and nobody else's."""
        if not self.is_here:
            yield
            return
        self._computed += time.process_time() - self._since
        try:
            yield
        finally:
            self._since = time.process_time()

    def spawn(self, act: Callable[[], object], account: Account) -> Task:
        """Have something done, from now on."""
        task = Task(act, account, self._home)
        self._put(self.time if self.task is None else self.monotonic(), task)
        return task

    def join(self, task: Task) -> None:
        """Return when a task is done."""
        if not task.done:
            task.waiting.append(self._present())
            self._leave()

    def run(self) -> None:
        """Return when nothing is left to be done."""
        while self._due:
            at, _, task = heapq.heappop(self._due)
            self.time = max(self.time, at)
            self.task, self._computed, self._since = task, 0.0, time.process_time()
            self.switches += 1
            task.greenlet.switch()
            if task.done:
                self._book(task)
                for other in task.waiting:
                    self._put(self.monotonic(), other)
                task.waiting.clear()
            self.task = None

    def _present(self) -> Task:
        assert self.task is not None
        return self.task

    def _spent(self) -> float:
        return self._computed + time.process_time() - self._since

    def _book(self, task: Task) -> None:
        self._computed, self._since = self._spent(), time.process_time()
        task.account.cpu_seconds += self._computed

    def _put(self, at: float, task: Task) -> None:
        self._number += 1
        heapq.heappush(self._due, (at, self._number, task))

    def _leave(self) -> None:
        task = self._present()
        self._book(task)
        self._home.switch()


class Crew:
    """Stands for `core.workers.Workers` on a hub's clock: at most `count` calls at a time, in tasks of their own."""

    hub: Hub  # of the simulation under way

    def __init__(self, count: int, name: str) -> None:
        self._count, self._name = count, name
        self._hub = type(self).hub
        self._account = self._hub._present().account

    def __enter__(self) -> Crew:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass

    def map(self, act: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
        """Yield the results of a call for each item, in their order."""
        left = deque(enumerate(items))
        found: dict[int, Result] = {}

        def work() -> None:
            while left:
                number, item = left.popleft()
                found[number] = act(item)

        total = len(left)
        tasks = [self._hub.spawn(work, self._account) for _ in range(min(self._count, total))]
        for task in tasks:
            self._hub.join(task)
            task.take()
        yield from (found[number] for number in range(total))
