"""A part of a store as a store of its own."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from urllib.parse import urlsplit

from holdfast.core.buffers import Buffer
from holdfast.core.names import check_key
from holdfast.stores.base import ObjectInfo, Store, Stream
from holdfast.stores.wrappers.delegating import Delegating

__all__ = ["Prefixed", "url_below"]


class Prefixed(Delegating):
    """What lies under `prefix` + "/" in another store, by keys without it.

    `sweep` and `room` speak of the store behind it as a whole.
    """

    def __init__(self, inner: Store, prefix: str) -> None:
        super().__init__(inner)
        self.prefix = check_key(prefix)
        self.url = url_below(inner.url, prefix)

    def write(self, key: str, data: Sequence[Buffer]) -> None:
        self.inner.write(self._key(key), data)

    def write_streams(self, streams: Iterable[Stream]) -> None:
        self.inner.write_streams(replace(stream, key=self._key(stream.key)) for stream in streams)

    def create(self, key: str, data: Buffer) -> None:
        self.inner.create(self._key(key), data)

    def replace(self, key: str, data: Buffer) -> None:
        self.inner.replace(self._key(key), data)

    def append(self, key: str, data: Buffer) -> None:
        self.inner.append(self._key(key), data)

    def read(self, key: str, start: int = 0, end: int | None = None) -> bytes:
        return self.inner.read(self._key(key), start, end)

    def read_into(self, key: str, start: int, target: memoryview) -> None:
        self.inner.read_into(self._key(key), start, target)

    def info(self, key: str) -> ObjectInfo:
        return replace(self.inner.info(self._key(key)), key=key)

    def names(self, prefix: str, after: str = "") -> list[str]:
        found = self.inner.names(self._place(prefix), f"{self.prefix}/{after}" if after else "")
        return [key[len(self.prefix) + 1 :] for key in found]

    def list(self, prefix: str) -> list[ObjectInfo]:
        found = self.inner.list(self._place(prefix))
        return [replace(o, key=o.key[len(self.prefix) + 1 :]) for o in found]

    def delete(self, keys: Sequence[str]) -> None:
        self.inner.delete([self._key(key) for key in keys])

    def _key(self, key: str) -> str:
        return f"{self.prefix}/{check_key(key)}"

    def _place(self, prefix: str) -> str:
        return self._key(prefix) if prefix else self.prefix


def url_below(url: str, prefix: str) -> str:
    """Return the URL of what lies under a prefix of the place that another URL names; its options stay."""
    parts = urlsplit(url)
    if not parts.path and not parts.netloc:
        return f"{url}{prefix}"
    return parts._replace(path=f"{parts.path.rstrip('/')}/{prefix}").geturl()
