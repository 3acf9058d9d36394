"""A few things done at the same time, on threads that also start while the interpreter shuts down.

`concurrent.futures` takes no work any more once the main thread has ended, and the last save comes then.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable

__all__ = ["Lanes", "in_lanes"]

Act = Callable[[], object]


class Lanes:
    """Runs acts on at most `count` threads. After a failure what has not begun is left out.

    `close` waits and raises the first failure; the threads are gone then.
    """

    def __init__(self, count: int) -> None:
        self._count = count
        self._changed = threading.Condition()
        self._waiting: deque[Act] = deque()
        self._running = 0
        self._failure: BaseException | None = None

    def submit(self, act: Act) -> None:
        """Run an act as soon as a thread is free."""
        with self._changed:
            if self._failure is not None:
                return
            self._waiting.append(act)
            if self._running == self._count:
                return
            self._running += 1
        threading.Thread(target=self._run, name="holdfast-lane", daemon=True).start()

    def cancel(self) -> None:
        """Leave out what has not begun, and wait for the rest. Raises nothing."""
        with self._changed:
            self._waiting.clear()
            self._changed.wait_for(lambda: self._running == 0)

    def close(self) -> None:
        """Wait for every act. Raises what the first one that failed has raised."""
        with self._changed:
            self._changed.wait_for(lambda: self._running == 0)
        if self._failure is not None:
            raise self._failure

    @property
    def failed(self) -> bool:
        """Whether an act has failed already."""
        return self._failure is not None

    def _run(self) -> None:
        while True:
            with self._changed:
                if not self._waiting:
                    self._running -= 1
                    self._changed.notify_all()
                    return
                act = self._waiting.popleft()
            try:
                act()
            except BaseException as e:  # noqa: BLE001 - raised by `close`
                with self._changed:
                    self._failure = self._failure or e
                    self._waiting.clear()


def in_lanes(acts: Iterable[Act], count: int) -> None:
    """Run acts on a few threads, and return when all are done. Raises the first failure."""
    lanes = Lanes(count)
    try:
        for act in acts:
            lanes.submit(act)
    except BaseException:
        lanes.cancel()
        raise
    lanes.close()
