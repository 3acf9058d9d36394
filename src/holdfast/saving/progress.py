"""How far a copy into an image's memory has come, for those who wait for it."""

from __future__ import annotations

import threading
from collections.abc import Callable

__all__ = ["Progress"]


class Progress:
    """The end of what has been copied, in bytes from the start of the memory. One copies, others wait."""

    def __init__(self, total: int) -> None:
        self.total = total
        self.end = 0
        self.error: BaseException | None = None
        self.told: Callable[[Progress], None] | None = None  # of each change, by the one who copies
        self._changed = threading.Condition()

    @property
    def complete(self) -> bool:
        """Whether everything is there."""
        return self.end >= self.total

    def advance(self, end: int) -> None:
        """Say that the first `end` bytes are there."""
        self._change(end, None)

    def fail(self, error: BaseException) -> None:
        """Say that the rest will never be there."""
        if not self.complete:
            self._change(self.end, error)

    def wait(self, end: int) -> None:
        """Return when the first `end` bytes are there. Raises what the copy failed with."""
        with self._changed:
            self._changed.wait_for(lambda: self.end >= end or self.error is not None)
            if self.end < end and self.error is not None:
                raise self.error

    def _change(self, end: int, error: BaseException | None) -> None:
        with self._changed:
            self.end, self.error = max(self.end, end), error
            self._changed.notify_all()
        if self.told is not None:
            self.told(self)
