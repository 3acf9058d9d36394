"""A store that counts the bytes of data files that are read from it, headers left out."""

from __future__ import annotations

import threading

from holdfast.core.buffers import Buffer
from holdfast.stores.base import Store
from holdfast.stores.wrappers import Delegating

__all__ = ["Counting"]


class Counting(Delegating):
    def __init__(self, inner: Store) -> None:
        super().__init__(inner)
        self.read_data = 0
        self._lock = threading.Lock()

    def read_into(self, key: str, start: int, target: Buffer) -> None:
        with self._lock:
            self.read_data += len(memoryview(target))
        self.inner.read_into(key, start, target)
