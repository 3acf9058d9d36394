"""A store in this process's memory: for tests, notebooks, and trying things out. It survives nothing."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Mapping, Sequence

from holdfast.core.buffers import Buffer
from holdfast.core.errors import AlreadyExists, NotFound, Truncated
from holdfast.core.names import check_key
from holdfast.stores.base import ObjectInfo, Stream

__all__ = ["MemoryStore"]


class MemoryStore:
    """A store that holds its objects in a dictionary."""

    appendable = True

    def __init__(self, name: str = "") -> None:
        self.url = f"memory://{name}"
        self._objects: dict[str, tuple[bytes, float]] = {}
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        return f"MemoryStore({self.url!r})"

    def write(self, key: str, data: Sequence[Buffer]) -> None:
        self._put({key: b"".join(data)}, if_absent=True)

    def write_streams(self, streams: Iterable[Stream]) -> None:
        taken = [(stream, b"".join(stream.body)) for stream in streams]
        made = {s.key: (b"".join([s.head(), body]), s.over) for s, body in taken}
        self._put({key: data for key, (data, over) in made.items() if not over}, if_absent=True)
        self._put({key: data for key, (data, over) in made.items() if over}, if_absent=False)

    def create(self, key: str, data: Buffer) -> None:
        self._put({key: bytes(data)}, if_absent=True)

    def replace(self, key: str, data: Buffer) -> None:
        self._put({key: bytes(data)}, if_absent=False)

    def append(self, key: str, data: Buffer) -> None:
        with self._lock:
            present, _ = self._objects.get(check_key(key), (b"", 0.0))
            self._objects[key] = (present + bytes(data), time.time())

    def read(self, key: str, start: int = 0, end: int | None = None) -> bytes:
        data = self._get(key)
        end = len(data) if end is None else end
        if end > len(data):
            raise Truncated(f"{key}: ends after {len(data)} bytes; expected {end}")
        return data[start:end]

    def read_into(self, key: str, start: int, target: memoryview) -> None:
        target[:] = self.read(key, start, start + len(target))

    def info(self, key: str) -> ObjectInfo:
        with self._lock:
            if check_key(key) not in self._objects:
                raise NotFound(f"{self.url}: no object {key!r}")
            data, modified = self._objects[key]
            return ObjectInfo(key, len(data), modified)

    def names(self, prefix: str, after: str = "") -> list[str]:
        start = f"{check_key(prefix)}/" if prefix else ""
        with self._lock:
            return sorted(key for key in self._objects if key.startswith(start) and key > after)

    def list(self, prefix: str) -> list[ObjectInfo]:
        start = f"{check_key(prefix)}/" if prefix else ""
        with self._lock:
            return [
                ObjectInfo(k, len(d), t) for k, (d, t) in sorted(self._objects.items()) if k.startswith(start)
            ]

    def room(self) -> int | None:
        return None

    def sweep(self, before: float) -> None:
        """Do nothing: a dictionary holds nothing half-made."""

    def delete(self, keys: Sequence[str]) -> None:
        with self._lock:
            for key in keys:
                self._objects.pop(check_key(key), None)

    def _put(self, objects: Mapping[str, bytes], *, if_absent: bool) -> None:
        with self._lock:
            for key in objects:
                if check_key(key) in self._objects and if_absent:
                    raise AlreadyExists(f"{self.url}: object {key!r} exists already")
            self._objects.update({key: (data, time.time()) for key, data in objects.items()})

    def _get(self, key: str) -> bytes:
        with self._lock:
            if check_key(key) not in self._objects:
                raise NotFound(f"{self.url}: no object {key!r}")
            return self._objects[key][0]
