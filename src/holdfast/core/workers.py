"""A few threads that work for one task, also while the interpreter shuts down.

`concurrent.futures` takes no work any more once the main thread has ended, and the end of a program waits for its
threads, however long they hang. The last save and the last copies are made then, under a deadline of their own.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from types import TracebackType
from typing import ParamSpec, TypeVar

__all__ = ["Workers"]

Arguments = ParamSpec("Arguments")
Item = TypeVar("Item")
Result = TypeVar("Result")


class Workers:
    """Runs calls on at most `count` threads. Leaving the context waits for what was submitted; after an error, only for
    what has begun."""

    def __init__(self, count: int, name: str) -> None:
        self._count = count
        self._name = name
        self._changed = threading.Condition()
        self._waiting: deque[tuple[Future[object], Callable[[], object]]] = deque()
        self._running = 0

    def __enter__(self) -> Workers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(cancel=error is not None)

    def submit(
        self, act: Callable[Arguments, Result], *args: Arguments.args, **kwargs: Arguments.kwargs
    ) -> Future[Result]:
        """Run a call as soon as a thread is free; return what will hold its result."""
        future: Future[Result] = Future()
        with self._changed:
            self._waiting.append((future, lambda: act(*args, **kwargs)))  # type: ignore[arg-type]
            if self._running == self._count:
                return future
            self._running += 1
        threading.Thread(target=self._run, name=self._name, daemon=True).start()
        return future

    def map(self, act: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
        """Yield the results of a call for each item, in their order. One alone is called here: a thread for it would
        only be waited for."""
        items = list(items)
        if len(items) == 1:
            yield act(items[0])
            return
        futures = [self.submit(act, item) for item in items]
        for future in futures:
            yield future.result()

    def close(self, *, cancel: bool = False) -> None:
        """Wait for every call; with `cancel` leave out those that have not begun."""
        with self._changed:
            if cancel:
                for future, _ in self._waiting:
                    future.cancel()
                self._waiting.clear()
            self._changed.wait_for(lambda: self._running == 0)

    def _run(self) -> None:
        while True:
            with self._changed:
                if not self._waiting:
                    self._running -= 1
                    self._changed.notify_all()
                    return
                future, act = self._waiting.popleft()
            try:
                future.set_result(act())
            except BaseException as e:  # noqa: BLE001 - raised by `Future.result`
                future.set_exception(e)
