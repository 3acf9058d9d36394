"""The writer: one save at a time behind the training thread; its failure is never lost."""

from __future__ import annotations

import threading
from collections.abc import Callable

__all__ = ["Writer"]


class Writer:
    """Runs jobs one after the other on a background thread; at most one is under way.

    A job's exception is kept and raised by the next `wait`, once.
    """

    def __init__(self, *, background: bool = True) -> None:
        self._background = background
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None

    @property
    def busy(self) -> bool:
        """Whether a job is under way."""
        return self._thread is not None and self._thread.is_alive()

    def submit(self, job: Callable[[], None]) -> None:
        """Start a job after waiting for the one under way. Raises what that one raised."""
        self.wait()
        if not self._background:
            job()
            return
        # A daemon, so that a second Ctrl-C can leave it behind; at exit the Checkpointer waits for it.
        self._thread = threading.Thread(target=self._run, args=(job,), name="holdfast-writer", daemon=True)
        self._thread.start()

    def wait(self, timeout_seconds: float | None = None) -> bool:
        """Wait for the job under way; return False when it is still running after the timeout. Raises its failure."""
        thread = self._thread
        if thread is not None:
            thread.join(timeout_seconds)
            if thread.is_alive():
                return False
            self._thread = None
        self.raise_failure()
        return True

    def raise_failure(self) -> None:
        """Raise what a finished job raised, once."""
        if self._thread is not None and self._thread.is_alive():
            return
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def _run(self, job: Callable[[], None]) -> None:
        try:
            job()
        except BaseException as e:  # noqa: BLE001 - kept, and raised by the next wait
            self._failure = e
