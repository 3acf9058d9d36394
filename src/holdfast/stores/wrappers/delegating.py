"""What every wrapper has in common: each operation is the store's behind it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from holdfast.core.buffers import Buffer
from holdfast.stores.base import ObjectInfo, Store, Stream

__all__ = ["Delegating"]


class Delegating:
    """A store that hands everything to another one, `inner`. Subclasses change what they are for."""

    def __init__(self, inner: Store) -> None:
        self.inner = inner
        self.url = inner.url
        self.appendable = inner.appendable

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.inner!r})"

    def write(self, key: str, data: Sequence[Buffer]) -> None:
        self.inner.write(key, data)

    def write_streams(self, streams: Iterable[Stream]) -> None:
        self.inner.write_streams(streams)

    def create(self, key: str, data: Buffer) -> None:
        self.inner.create(key, data)

    def replace(self, key: str, data: Buffer) -> None:
        self.inner.replace(key, data)

    def append(self, key: str, data: Buffer) -> None:
        self.inner.append(key, data)

    def read(self, key: str, start: int = 0, end: int | None = None) -> bytes:
        return self.inner.read(key, start, end)

    def read_into(self, key: str, start: int, target: memoryview) -> None:
        self.inner.read_into(key, start, target)

    def info(self, key: str) -> ObjectInfo:
        return self.inner.info(key)

    def names(self, prefix: str, after: str = "") -> list[str]:
        return self.inner.names(prefix, after)

    def list(self, prefix: str) -> list[ObjectInfo]:
        return self.inner.list(prefix)

    def room(self) -> int | None:
        return self.inner.room()

    def sweep(self, before: float) -> None:
        self.inner.sweep(before)

    def delete(self, keys: Sequence[str]) -> None:
        self.inner.delete(keys)
