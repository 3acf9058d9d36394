"""An object store in memory, request by request, so that a plan of faults can meet each of them.

It does what S3 and its like promise: a put is whole or not there, `If-None-Match: *` lets one of any number of rivals
win, a multipart upload shows when it is completed and its parts stay until it is, or is aborted.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from holdfast.core.buffers import Buffer
from holdfast.core.clock import SystemTime, TimeSource
from holdfast.core.errors import AlreadyExists, NotFound, Truncated
from holdfast.core.names import check_key
from holdfast.stores.base import ObjectInfo, Stream
from holdfast.testing.faulty import store_error
from holdfast.testing.plan import FaultPlan

__all__ = ["ModelService", "ModelStore", "Upload"]

Result = TypeVar("Result")


@dataclass(slots=True)
class Upload:
    """A multipart upload that is not completed: its key, when it began, its parts by number."""

    key: str
    begun: float
    parts: dict[int, bytes] = field(default_factory=dict)


class ModelService:
    """What the clients of an object store share. `honest=False`: it ignores preconditions, as some servers do."""

    def __init__(self, name: str = "model", *, time: TimeSource | None = None, honest: bool = True) -> None:
        self.name = name
        self.honest = honest
        self.time = time or SystemTime()
        self.objects: dict[str, tuple[bytes, float]] = {}
        self.uploads: dict[int, Upload] = {}
        self.lock = threading.Lock()
        self.numbers = itertools.count(1)

    def put(self, key: str, data: bytes, *, if_absent: bool) -> None:
        """Store an object, whole."""
        with self.lock:
            if if_absent and self.honest and key in self.objects:
                raise AlreadyExists(f"{self.name}: object {key!r} exists already")
            self.objects[key] = (data, self.time.now())


class ModelStore:
    """A client of such a service, with its own plan of faults.

    Changing requests are "put", "begin" (an upload), "part", "complete", "abort" and "delete"; others are "get", "head"
    and "list".
    """

    appendable = False

    def __init__(
        self,
        service: ModelService | None = None,
        plan: FaultPlan | None = None,
        *,
        part_bytes: int = 64 << 10,
    ) -> None:
        self.service = service or ModelService()
        self.plan = plan or FaultPlan()
        self.part_bytes = part_bytes
        self.url = f"model://{self.service.name}"

    def __repr__(self) -> str:
        return f"ModelStore({self.service.name!r})"

    def _change(self, request: str, key: str, act: Callable[[], Result]) -> Result:
        return self.plan.around(request, key, act, store_error)

    def _look(self, request: str, key: str, act: Callable[[], Result]) -> Result:
        return self.plan.around(request, key, act, store_error, changes=False)

    def _put(self, key: str, data: bytes, *, if_absent: bool) -> None:
        check_key(key)
        self._change("put", key, lambda: self.service.put(key, data, if_absent=if_absent))

    def write(self, key: str, data: Sequence[Buffer]) -> None:
        self._put(key, b"".join(data), if_absent=True)

    def create(self, key: str, data: Buffer) -> None:
        self._put(key, bytes(data), if_absent=True)

    def replace(self, key: str, data: Buffer) -> None:
        self._put(key, bytes(data), if_absent=False)

    def append(self, key: str, data: Buffer) -> None:
        raise NotImplementedError("an object store does not append")

    def write_streams(self, streams: Iterable[Stream]) -> None:
        written: list[str] = []
        try:
            for stream in streams:
                self._upload(stream)
                if not stream.over:
                    written.append(stream.key)
        except Exception:
            self.delete(written)
            raise

    def _upload(self, stream: Stream) -> None:
        """Write a body as parts 2, 3, ...; its head goes up last, as part 1."""
        key = check_key(stream.key)
        if key in self.service.objects and not stream.over:
            raise AlreadyExists(f"{self.service.name}: object {key!r} exists already")
        number = self._change("begin", key, lambda: self._begun(key))
        try:
            waiting, part = bytearray(), 2
            for piece in stream.body:
                waiting += piece
                while len(waiting) >= self.part_bytes:
                    self._part(number, part, bytes(waiting[: self.part_bytes]))
                    del waiting[: self.part_bytes]
                    part += 1
            self._part(number, part, bytes(waiting))
            self._part(number, 1, bytes(stream.head()))
            self._change("complete", key, lambda: self._completed(number, over=stream.over))
        except Exception:
            self._change("abort", key, lambda: self.service.uploads.pop(number, None))
            raise

    def _begun(self, key: str) -> int:
        number = next(self.service.numbers)
        self.service.uploads[number] = Upload(key, self.service.time.now())
        return number

    def _part(self, number: int, part: int, data: bytes) -> None:
        upload = self.service.uploads[number]
        self._change("part", upload.key, lambda: upload.parts.update({part: data}))

    def _completed(self, number: int, *, over: bool) -> None:
        upload = self.service.uploads[number]
        whole = b"".join(upload.parts[n] for n in sorted(upload.parts))
        self.service.put(upload.key, whole, if_absent=not over)
        del self.service.uploads[number]

    def _get(self, request: str, key: str) -> tuple[bytes, float]:
        check_key(key)

        def act() -> tuple[bytes, float]:
            with self.service.lock:
                if key not in self.service.objects:
                    raise NotFound(f"{self.service.name}: no object {key!r}")
                return self.service.objects[key]

        return self._look(request, key, act)

    def read(self, key: str, start: int = 0, end: int | None = None) -> bytes:
        data, _ = self._get("get", key)
        end = len(data) if end is None else end
        if end > len(data):
            raise Truncated(f"{key}: ends after {len(data)} bytes; expected {end}")
        return data[start:end]

    def read_into(self, key: str, start: int, target: memoryview) -> None:
        target[:] = self.read(key, start, start + len(target))

    def info(self, key: str) -> ObjectInfo:
        data, modified = self._get("head", key)
        return ObjectInfo(key, len(data), modified)

    def names(self, prefix: str, after: str = "") -> list[str]:
        return [found.key for found in self.list(prefix) if found.key > after]

    def list(self, prefix: str) -> list[ObjectInfo]:
        start = f"{check_key(prefix)}/" if prefix else ""

        def act() -> list[ObjectInfo]:
            with self.service.lock:
                every = sorted(self.service.objects.items())
                return [ObjectInfo(k, len(d), t) for k, (d, t) in every if k.startswith(start)]

        return self._look("list", prefix, act)

    def room(self) -> int | None:
        return None

    def sweep(self, before: float) -> None:
        for number, upload in list(self.service.uploads.items()):
            if upload.begun < before:
                self._change("abort", upload.key, lambda n=number: self.service.uploads.pop(n, None))  # type: ignore[misc]

    def delete(self, keys: Sequence[str]) -> None:
        for key in keys:
            check_key(key)
            self._change("delete", key, lambda k=key: self.service.objects.pop(k, None))  # type: ignore[misc]
