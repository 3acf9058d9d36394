"""A cap on the bytes per second that a store moves, so that copying leaves room for others on the same line."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

from holdfast.core.buffers import Buffer
from holdfast.core.clock import SystemTime, TimeSource
from holdfast.core.errors import PolicyError
from holdfast.stores.base import Store, Stream
from holdfast.stores.wrappers.delegating import Delegating

__all__ = ["Throttled"]

SLICE_SECONDS = 0.25  # of the line, at a time
MIN_SLICE_BYTES = 1 << 16
MAX_SLICE_BYTES = 16 << 20


class Throttled(Delegating):
    """A store whose reads and writes, of all threads together, move at most `bytes_per_second`.

    Bytes are paid for before they move. Listing and deleting are free.
    """

    def __init__(self, inner: Store, bytes_per_second: float, *, time: TimeSource | None = None) -> None:
        super().__init__(inner)
        if not bytes_per_second > 0:
            raise PolicyError(f"bytes_per_second={bytes_per_second!r} must be more than 0")
        self.bytes_per_second = bytes_per_second
        self._slice = int(min(MAX_SLICE_BYTES, max(MIN_SLICE_BYTES, bytes_per_second * SLICE_SECONDS)))
        self._time = time or SystemTime()
        self._free_at = self._time.monotonic()
        self._lock = threading.Lock()

    def write(self, key: str, data: Sequence[Buffer]) -> None:
        self.inner.write_streams([Stream(key, 0, self._paid(data), bytes, body_bytes=sum(map(len, data)))])

    def write_streams(self, streams: Iterable[Stream]) -> None:
        self.inner.write_streams(self._slowed(stream) for stream in streams)

    def create(self, key: str, data: Buffer) -> None:
        self._pay(len(data))
        self.inner.create(key, data)

    def replace(self, key: str, data: Buffer) -> None:
        self._pay(len(data))
        self.inner.replace(key, data)

    def append(self, key: str, data: Buffer) -> None:
        self._pay(len(data))
        self.inner.append(key, data)

    def read(self, key: str, start: int = 0, end: int | None = None) -> bytes:
        if end is not None:
            self._pay(max(0, end - start))
            return self.inner.read(key, start, end)
        data = self.inner.read(key, start)  # how long it is shows now: what follows pays for it
        self._pay(len(data))
        return data

    def read_into(self, key: str, start: int, target: memoryview) -> None:
        for at in range(0, len(target), self._slice) or [0]:
            part = target[at : at + self._slice]
            self._pay(len(part))
            self.inner.read_into(key, start + at, part)

    def _slowed(self, stream: Stream) -> Stream:
        """Return a stream that comes at our pace.

        A store that sends the head first takes a body whole before it sends anything: it is taken here instead.
        """
        if stream.head_bytes == 0 or self.inner.appendable:
            return replace(stream, body=self._paid(stream.body))
        whole = [*stream.body]
        whole.insert(0, stream.head())
        size = sum(map(len, whole))
        return replace(stream, head_bytes=0, body=self._paid(whole), make_head=bytes, body_bytes=size)

    def _paid(self, pieces: Iterable[Buffer]) -> Iterator[Buffer]:
        for piece in pieces:
            view = memoryview(piece).cast("B")
            for at in range(0, len(view), self._slice):
                part = view[at : at + self._slice]
                self._pay(len(part))
                yield part

    def _pay(self, size: int) -> None:
        """Wait until the line is free, and take it for as long as `size` bytes need."""
        with self._lock:
            now = self._time.monotonic()
            start = max(now, self._free_at)
            self._free_at = start + size / self.bytes_per_second
        if start > now:
            self._time.sleep(start - now)
