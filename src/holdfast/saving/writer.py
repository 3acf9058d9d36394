"""The writer: saves follow one another behind the training thread; a failure is never lost."""

from __future__ import annotations

import threading
from collections.abc import Callable

__all__ = ["Writer"]

Job = Callable[[], None]


class Writer:
    """Runs jobs one after the other on a background thread: one is under way, one more may wait for it.

    A job's exception is kept and raised by the next call, once; the job that waited behind it still runs.
    """

    def __init__(self, *, background: bool = True) -> None:
        self._background = background
        self._changed = threading.Condition()
        self._running = False
        self._next: Job | None = None
        self._failure: BaseException | None = None

    @property
    def busy(self) -> bool:
        """Whether a job is under way."""
        return self._running

    @property
    def full(self) -> bool:
        """Whether a job waits for the one under way."""
        return self._next is not None

    def submit(self, job: Job) -> None:
        """Run a job after the one under way. Replaces one that has not begun; raises what one before it raised."""
        self.raise_failure()
        if not self._background:
            job()
            return
        with self._changed:
            self._next = job
            if self._running:
                return
            self._running = True
        # A daemon, so that a second Ctrl-C can leave it behind; at exit the Checkpointer waits for it.
        threading.Thread(target=self._run, name="holdfast-writer", daemon=True).start()

    def withdraw(self) -> bool:
        """Take back the job that waits, if it has not begun; return whether there was one."""
        with self._changed:
            found, self._next = self._next, None
            return found is not None

    def wait(self, timeout_seconds: float | None = None) -> bool:
        """Wait for every job; return False when one is still running after the timeout. Raises a job's failure."""
        return self._wait(lambda: not self._running, timeout_seconds)

    def wait_for_room(self) -> None:
        """Wait until no job waits for the one under way. Raises a job's failure."""
        self._wait(lambda: self._next is None, None)

    def _wait(self, reached: Callable[[], bool], timeout_seconds: float | None) -> bool:
        with self._changed:
            found = self._changed.wait_for(reached, timeout_seconds)
        if found:
            self.raise_failure()
        return found

    def raise_failure(self) -> None:
        """Raise what a finished job raised, once."""
        with self._changed:
            failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def _run(self) -> None:
        while True:
            with self._changed:
                job, self._next = self._next, None
                if job is None:
                    self._running = False
                self._changed.notify_all()
            if job is None:
                return
            try:
                job()
            except BaseException as e:  # noqa: BLE001 - kept, and raised by the next call
                with self._changed:
                    self._failure = self._failure or e
