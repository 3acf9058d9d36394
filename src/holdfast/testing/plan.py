"""What goes wrong, where and when: a plan of faults that a disk or a store under test carries out.

The loop comes from SQLite's tests: let call 1 fail, then call 2, and so on until nothing fails, so that every point of
an operation has been tried and not a sample. A plan knows which of its faults happened, for a test whose fault never
happened has shown nothing (kopia's "all faults exercised").
"""

from __future__ import annotations

import errno
import fnmatch
import itertools
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, NoReturn, TypeVar

__all__ = ["ANSWERS", "Crash", "Fault", "FaultPlan", "Raised", "When", "every_call", "kill_process"]

Result = TypeVar("Result")
When = Literal["before", "after", "torn"]

# What an object store may answer, and what each means.
ANSWERS = {
    "409": "conflict: another request for this key is under way; nothing was changed",
    "412": "precondition failed: the key is taken",
    "429": "too many requests",
    "500": "internal error",
    "503": "slow down",
}
_CODES = {"timeout": errno.ETIMEDOUT}


class Crash(BaseException):
    """The process died here. No Exception: nothing may catch it and go on."""


def crash() -> NoReturn:
    """End the process under test by an exception that nothing catches; the plan lets nothing through afterwards."""
    raise Crash


def kill_process() -> NoReturn:
    """End this very process with SIGKILL."""
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("SIGKILL cannot be survived")


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing that goes wrong.

    `kind` is "kill", "delay", "timeout", the name of an operating-system error ("EIO", "ENOSPC", "EROFS", ...) or an
    answer of an object store ("409", "412", "429", "500", "503"). `when`: "before" the call takes effect; "after" it
    (an error then is an answer that was lost); "torn": half-way, where a call can be half done, else before.

    It meets the calls whose name and whose key match the globs `call` and `key`, from the `at`-th on, `times` of them
    (None: from then on all). Without `call` these are the calls that change something.
    """

    kind: str
    at: int = 1
    when: When = "before"
    call: str = ""
    key: str = "*"
    times: int | None = 1
    seconds: float = 0.0

    def __post_init__(self) -> None:
        if self.kind not in {"kill", "delay", *ANSWERS, *_CODES} and not hasattr(errno, self.kind):
            raise ValueError(f"no such fault: {self.kind!r}")

    @property
    def code(self) -> int | None:
        """The operating system's number of the error, None for what is none of its errors."""
        return _CODES.get(self.kind, getattr(errno, self.kind, None))

    def meets(self, call: str, key: str, *, changes: bool) -> bool:
        """Return whether this is one of the calls that are counted for it."""
        named = fnmatch.fnmatchcase(call, self.call) if self.call else changes
        return named and fnmatch.fnmatchcase(key, self.key)

    def is_due(self, count: int) -> bool:
        """Return whether it happens at the `count`-th call that it meets."""
        return count >= self.at and (self.times is None or count < self.at + self.times)


@dataclass(frozen=True, slots=True)
class Raised:
    """A fault that happened: at which call, to which key."""

    fault: Fault
    call: str
    key: str


class FaultPlan:
    """Faults, and the calls they are to meet. May be shared by several disks and stores; safe to use from threads.

    `calls` lists the calls that change something, by name and key, `fired` the faults that happened. `die` is how a
    "kill" ends the process: by default with the exception `Crash`, after which the plan lets no call through any more,
    those of `finally` blocks included; `kill_process` sends a real SIGKILL.
    """

    def __init__(
        self,
        *faults: Fault,
        die: Callable[[], NoReturn] = crash,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.faults = list(faults)
        self.calls: list[tuple[str, str]] = []
        self.fired: list[Raised] = []
        self._die = die
        self._sleep = sleep
        self._counts: dict[Fault, int] = {}
        self._dead = False
        self._lock = threading.Lock()

    @property
    def unfired(self) -> list[Fault]:
        """The faults that have not happened."""
        happened = {raised.fault for raised in self.fired}
        return [fault for fault in self.faults if fault not in happened]

    def check_fired(self) -> None:
        """Raise AssertionError unless every fault happened."""
        assert not self.unfired, f"never happened: {self.unfired}; the calls were {self.calls}"

    def around(
        self,
        call: str,
        key: str,
        act: Callable[[], Result],
        error: Callable[[Fault, str], Exception],
        *,
        half: Callable[[Fault], object] | None = None,
        changes: bool = True,
    ) -> Result:
        """Carry out a call, or let happen to it what is planned. `half` does half of it; `error` makes what is raised
        of a fault and a key."""
        fault = self._next(call, key, changes=changes)
        if fault is None:
            return act()
        if fault.kind == "delay":
            self._sleep(fault.seconds)
            return act()
        if fault.when == "torn" and half is not None:
            half(fault)
        elif fault.when == "after":
            try:
                act()
            except Exception:
                if fault.kind != "kill":
                    raise  # it had no effect whose answer could be lost
        if fault.kind == "kill":
            self._dead = True
            self._die()
        raise error(fault, key)

    def _next(self, call: str, key: str, *, changes: bool) -> Fault | None:
        """Count a call; return the first fault that is due."""
        with self._lock:
            if self._dead:
                raise Crash
            if changes:
                self.calls.append((call, key))
            due: Fault | None = None
            for fault in self.faults:
                if fault.meets(call, key, changes=changes):
                    self._counts[fault] = self._counts.get(fault, 0) + 1
                    if due is None and fault.is_due(self._counts[fault]):
                        due = fault
            if due is not None:
                self.fired.append(Raised(due, call, key))
            return due


def every_call(
    kind: str, when: When = "before", *, call: str = "", key: str = "*", times: int | None = 1
) -> Iterator[FaultPlan]:
    """Yield plans with one fault, at call 1, 2, 3, ... until one did not happen: that round must have succeeded.

    for plan in every_call("ENOSPC"):
        store = FaultStore(a_fresh_copy(), plan)
        ...  # try, catch, and check what must hold
    """
    for at in itertools.count(1):
        plan = FaultPlan(Fault(kind, at, when, call, key, times))
        yield plan
        if not plan.fired:
            return
