"""Trying again, where that is safe.

Reading, listing, deleting, and replacing one object by the same bytes have the same effect twice as once. `create` does
not: a request that failed may have been carried out, and a second one would find its own object and call it a rival's.
Nor does `append`. A stream's body can be taken once only. These are never tried again here: who calls them reads back
what became of them (`catalog.checkpoints.commit`).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import TypeVar

from holdfast.core.buffers import Buffer
from holdfast.core.clock import SystemTime, TimeSource
from holdfast.core.errors import AlreadyExists, NotFound, OutOfSpace, PermissionDenied, StoreError
from holdfast.stores.base import ObjectInfo, Store
from holdfast.stores.wrappers.delegating import Delegating

__all__ = ["Retrying"]

T = TypeVar("T")
LASTING = (AlreadyExists, NotFound, OutOfSpace, PermissionDenied)
FIRST_PAUSE_SECONDS = 0.1
LONGEST_PAUSE_SECONDS = 15.0


class Retrying(Delegating):
    """A store whose safe operations are tried up to `attempts` times, with growing pauses, before they fail.

    What will not pass by itself (a missing object, a refusal, a full disk) is raised at once. `create`, `append` and
    `write_streams` are tried once.
    """

    def __init__(self, inner: Store, attempts: int = 5, *, time: TimeSource | None = None) -> None:
        super().__init__(inner)
        self.attempts = attempts
        self._time = time or SystemTime()

    def write(self, key: str, data: Sequence[Buffer]) -> None:
        failed = False

        def write() -> None:
            nonlocal failed
            try:
                self.inner.write(key, data)
            except AlreadyExists:
                if not (failed and self._holds(key, data)):  # a request that failed was carried out
                    raise
            except StoreError:
                failed = True
                raise

        self._try(write)

    def replace(self, key: str, data: Buffer) -> None:
        self._try(lambda: self.inner.replace(key, data))

    def read(self, key: str, start: int = 0, end: int | None = None) -> bytes:
        return self._try(lambda: self.inner.read(key, start, end))

    def read_into(self, key: str, start: int, target: memoryview) -> None:
        self._try(lambda: self.inner.read_into(key, start, target))

    def info(self, key: str) -> ObjectInfo:
        return self._try(lambda: self.inner.info(key))

    def names(self, prefix: str, after: str = "") -> list[str]:
        return self._try(lambda: self.inner.names(prefix, after))

    def list(self, prefix: str) -> list[ObjectInfo]:
        return self._try(lambda: self.inner.list(prefix))

    def room(self) -> int | None:
        return self._try(self.inner.room)

    def sweep(self, before: float) -> None:
        self._try(lambda: self.inner.sweep(before))

    def delete(self, keys: Sequence[str]) -> None:
        self._try(lambda: self.inner.delete(keys))

    def _holds(self, key: str, data: Sequence[Buffer]) -> bool:
        """Return whether an object is just these bytes."""
        if self.inner.info(key).size != sum(len(piece) for piece in data):
            return False
        at = 0
        for piece in data:
            if self.inner.read(key, at, at + len(piece)) != piece:
                return False
            at += len(piece)
        return True

    def _try(self, act: Callable[[], T]) -> T:
        pause = FIRST_PAUSE_SECONDS
        for left in range(self.attempts - 1, -1, -1):
            try:
                return act()
            except LASTING:
                raise
            except StoreError:
                if left == 0:
                    raise
            self._time.sleep(pause * random.uniform(0.5, 1.0))  # rivals that failed together come back apart
            pause = min(2 * pause, LONGEST_PAUSE_SECONDS)
        raise AssertionError("attempts must be at least 1")
