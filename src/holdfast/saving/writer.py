"""The writer: saves follow one another behind the training thread; a failure is never lost."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable

from holdfast.core.standby import run_behind

__all__ = ["Writer", "at_work"]

Job = Callable[[], None]


def _nothing() -> None:
    pass


class Writer:
    """Runs jobs one after the other on a background thread.

    A job's exception is kept and raised by the next `wait` or `raise_failure`, once; the job behind it still runs.
    """

    def __init__(self, *, background: bool = True) -> None:
        self._background = background
        self._changed = threading.Condition()
        self._running = False
        self._waiting: deque[tuple[Job, Job]] = deque()
        self._failure: BaseException | None = None

    @property
    def busy(self) -> bool:
        """Whether a job is under way."""
        return self._running

    def submit(self, job: Job, then: Job = _nothing) -> None:
        """Run a job after those before it, and `then` when it has ended in whatever way and its failure is kept."""
        if not self._background:
            try:
                job()
            finally:
                then()
            return
        with self._changed:
            self._waiting.append((job, then))
            if self._running:
                return
            self._running = True
            at_work.add(self)
        # A daemon, so that a second Ctrl-C can leave it behind; else it is waited for at exit.
        run_behind(self._run, "holdfast-writer")

    def withdraw(self) -> bool:
        """Take back the job that was submitted last, if it has not begun; return whether that was so."""
        with self._changed:
            if not self._waiting:
                return False
            self._waiting.pop()
            return True

    def wait(self) -> None:
        """Wait for every job. Raises a job's failure."""
        with self._changed:
            self._changed.wait_for(lambda: not self._running)
        self.raise_failure()

    def raise_failure(self) -> None:
        """Raise what a finished job raised, once."""
        if self._failure is None:  # asked in every step of the loop
            return
        with self._changed:
            failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def _run(self) -> None:
        while True:
            with self._changed:
                turn = self._waiting.popleft() if self._waiting else None
                if turn is None:
                    self._running = False
                    at_work.discard(self)
                self._changed.notify_all()
            if turn is None:
                return
            try:
                turn[0]()
            except BaseException as e:  # noqa: BLE001 - kept, and raised later
                with self._changed:
                    self._failure = self._failure or e
            turn[1]()


at_work: set[Writer] = set()  # those with a job under way, also where nobody else knows of them any more

if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=at_work.clear)
