"""Threads that stand by: to hand one its work takes a few microseconds, to start one takes until it runs.

A thread that is started makes its starter wait until it has been given its first turn, which on a busy machine is
milliseconds in which nothing is trained.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from queue import SimpleQueue

__all__ = ["run_behind"]

MOST_IDLE = 2  # of these in a process: one that copies and one that sees a save through
IDLE = "holdfast-standby"


class _Thread:
    """A daemon, so that nothing waits for it when the interpreter ends."""

    def __init__(self) -> None:
        self._work: SimpleQueue[tuple[Callable[[], None], str]] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=IDLE, daemon=True)
        self._thread.start()

    def give(self, work: Callable[[], None], name: str) -> None:
        self._work.put((work, name))

    def _run(self) -> None:
        while True:
            work, self._thread.name = self._work.get()
            try:
                work()
            finally:
                del work  # nothing is kept alive by a thread that waits
                self._thread.name = IDLE
            with _sitting_down:
                if len(_idle) >= MOST_IDLE:
                    return
                _idle.append(self)


_idle: list[_Thread] = []
_sitting_down = threading.Lock()


def _begin_anew() -> None:
    """A fork leaves the threads behind, whatever they were at."""
    global _sitting_down
    _sitting_down = threading.Lock()
    _idle.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_begin_anew)


def run_behind(work: Callable[[], None], name: str) -> None:
    """Carry out `work`, which raises nothing, on a thread that is called `name` for as long as that takes.

    Raises:
        RuntimeError: no thread stands by, and none can be started: the interpreter ends.
    """
    try:
        thread = _idle.pop()
    except IndexError:
        thread = _Thread()
    thread.give(work, name)
