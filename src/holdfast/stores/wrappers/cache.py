"""Copies on the local disk of objects that never change, for reading the same remote checkpoints again and again."""

from __future__ import annotations

import contextlib
import hashlib
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence

from holdfast.core.errors import NotFound, OutOfSpace, StoreError
from holdfast.core.names import check_key
from holdfast.stores.base import Store, Stream
from holdfast.stores.local import LocalStore
from holdfast.stores.wrappers.delegating import Delegating

__all__ = ["Cached"]

PIECE_BYTES = 16 << 20
COPIES = "copies"
HALF_MADE_SECONDS = 3600.0  # younger ones may be under way


def _copy_of(key: str) -> str:
    return f"{COPIES}/{check_key(key)}"


def _is_data(key: str) -> bool:
    return key.startswith("data/")


class Cached(Delegating):
    """A store whose immutable objects are copied whole into `directory` when they are first read, and read there.

    A copy is used when it is as long as its object, which is looked up once in this object's life. `immutable` says
    which keys never get other bytes; a run's data files by default. When the copies exceed `limit_bytes`, the oldest
    go. Whether bytes are right is not judged here: readers hold them against their digests as always. Several processes
    may share the directory: a copy has its name when it is whole.
    """

    def __init__(
        self,
        inner: Store,
        directory: str | os.PathLike[str],
        *,
        limit_bytes: int | None = None,
        immutable: Callable[[str], bool] = _is_data,
    ) -> None:
        super().__init__(inner)
        self.limit_bytes = limit_bytes
        self._immutable = immutable
        self._copies = LocalStore(
            os.path.join(directory, hashlib.sha256(inner.url.encode()).hexdigest()[:16])
        )
        with contextlib.suppress(StoreError):  # somebody else's left-overs
            self._copies.sweep(time.time() - HALF_MADE_SECONDS)
        self._whole: set[str] = set()  # the copies that were held against their objects
        self._lock = threading.Lock()

    def read(self, key: str, start: int = 0, end: int | None = None) -> bytes:
        with contextlib.suppress(NotFound):  # the copy was removed meanwhile
            if self._immutable(key) and self._has_copy(key):
                return self._copies.read(_copy_of(key), start, end)
        return self.inner.read(key, start, end)

    def read_into(self, key: str, start: int, target: memoryview) -> None:
        with contextlib.suppress(NotFound):
            if self._immutable(key) and self._has_copy(key):
                return self._copies.read_into(_copy_of(key), start, target)
        return self.inner.read_into(key, start, target)

    def write_streams(self, streams: Iterable[Stream]) -> None:
        over: list[str] = []  # a damaged object that is mended has other bytes, and as many

        def noted() -> Iterator[Stream]:
            for stream in streams:
                if stream.over:
                    over.append(stream.key)
                yield stream

        try:
            self.inner.write_streams(noted())
        finally:
            self._forget_all(over)

    def delete(self, keys: Sequence[str]) -> None:
        self.inner.delete(keys)
        self._forget_all(keys)

    def _forget_all(self, keys: Sequence[str]) -> None:
        with self._lock:
            for key in keys:
                self._forget(key)

    def _has_copy(self, key: str) -> bool:
        """Return whether a whole copy is there, made now if need be; False where the disk has no room for it."""
        with self._lock:  # one copies, the others wait and read it
            if key in self._whole:
                return True
            size = self.inner.info(key).size
            if not self._is_whole(key, size):
                if self.limit_bytes is not None and size > self.limit_bytes:
                    return False
                try:
                    self._forget(key)
                    self._make_room(size)
                    self._copies.write_streams(
                        [Stream(_copy_of(key), 0, self._pieces(key, size), bytes, over=True)]
                    )
                except OutOfSpace:
                    return False
            self._whole.add(key)
            return True

    def _is_whole(self, key: str, size: int) -> bool:
        try:
            return self._copies.info(_copy_of(key)).size == size
        except NotFound:
            return False

    def _pieces(self, key: str, size: int) -> Iterator[memoryview]:
        for at in range(0, size, PIECE_BYTES):
            piece = memoryview(bytearray(min(PIECE_BYTES, size - at)))
            self.inner.read_into(key, at, piece)
            yield piece

    def _forget(self, key: str) -> None:
        self._whole.discard(key)
        self._copies.delete([_copy_of(key)])

    def _make_room(self, size: int) -> None:
        if self.limit_bytes is None:
            return
        held = self._copies.list(COPIES)
        excess = sum(o.size for o in held) + size - self.limit_bytes
        for oldest in sorted(held, key=lambda o: o.modified):
            if excess <= 0:
                return
            with contextlib.suppress(StoreError):
                self._forget(oldest.key.removeprefix(f"{COPIES}/"))
                excess -= oldest.size
