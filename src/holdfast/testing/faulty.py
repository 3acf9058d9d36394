"""Any store, with a plan of faults between it and whoever uses it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import TypeVar

from holdfast.core.buffers import Buffer
from holdfast.core.errors import AlreadyExists, NotFound, OutOfSpace, PermissionDenied, StoreError
from holdfast.stores.base import ObjectInfo, Store, Stream
from holdfast.testing.plan import ANSWERS, Fault, FaultPlan, When

__all__ = ["CrashStore", "FaultStore", "store_error"]

Result = TypeVar("Result")

_KINDS: dict[str, type[StoreError]] = {
    "412": AlreadyExists,
    "EACCES": PermissionDenied,
    "EPERM": PermissionDenied,
    "EROFS": PermissionDenied,
    "ENOSPC": OutOfSpace,
    "EDQUOT": OutOfSpace,
    "ENOENT": NotFound,
}


def store_error(fault: Fault, key: str) -> StoreError:
    """Return a fault as the error that a store raises for it."""
    kind = _KINDS.get(fault.kind, StoreError)
    what = f"{fault.kind} {ANSWERS[fault.kind]}" if fault.kind in ANSWERS else os.strerror(fault.code or 0)
    return kind(fault.code, f"{key}: {what} (a planned fault)")


class FaultStore:
    """A store under a plan.

    Changing calls are "write", "write_streams" (its key is that of the first stream), "create", "replace", "append",
    "delete" and "sweep"; others are "read", "read_into", "info", "names", "list", "room". Torn, a `write` leaves half
    of its bytes behind when the process is killed, and nothing when it is told of an error; an `append` half of its
    bytes; a `delete` removes half of the keys; what is atomic is left undone.
    """

    def __init__(self, store: Store, plan: FaultPlan) -> None:
        self.inner = store
        self.plan = plan
        self.url = store.url
        self.appendable = store.appendable

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.inner!r})"

    def _change(
        self, call: str, key: str, act: Callable[[], Result], half: Callable[[Fault], object] | None = None
    ) -> Result:
        return self.plan.around(call, key, act, store_error, half=half)

    def _look(self, call: str, key: str, act: Callable[[], Result]) -> Result:
        return self.plan.around(call, key, act, store_error, changes=False)

    def write(self, key: str, data: Sequence[Buffer]) -> None:
        def half(fault: Fault) -> None:
            if fault.kind == "kill":
                whole = b"".join(data)
                self.inner.write(key, [whole[: len(whole) // 2]])

        self._change("write", key, lambda: self.inner.write(key, data), half)

    def write_streams(self, streams: Iterable[Stream]) -> None:
        taken = iter(streams)
        first = next(taken, None)
        if first is None:
            return

        def every(fault: Fault | None = None) -> Iterator[Stream]:
            yield first if fault is None else replace(first, body=_half(first, fault))
            yield from taken

        def half(fault: Fault) -> None:
            if fault.kind == "kill" and first.over:
                return  # it goes over in one step
            if fault.kind == "kill":
                pieces = [bytes(piece) for piece in first.body]
                whole = b"".join(pieces)
                self.inner.write(first.key, [bytes(first.head_bytes), whole[: len(whole) // 2]])
            else:
                self.inner.write_streams(every(fault))

        self._change("write_streams", first.key, lambda: self.inner.write_streams(every()), half)

    def create(self, key: str, data: Buffer) -> None:
        self._change("create", key, lambda: self.inner.create(key, data))

    def replace(self, key: str, data: Buffer) -> None:
        self._change("replace", key, lambda: self.inner.replace(key, data))

    def append(self, key: str, data: Buffer) -> None:
        whole = memoryview(data).cast("B")
        self._change(
            "append",
            key,
            lambda: self.inner.append(key, data),
            lambda fault: self.inner.append(key, whole[: len(whole) // 2]),
        )

    def read(self, key: str, start: int = 0, end: int | None = None) -> bytes:
        return self._look("read", key, lambda: self.inner.read(key, start, end))

    def read_into(self, key: str, start: int, target: memoryview) -> None:
        self._look("read_into", key, lambda: self.inner.read_into(key, start, target))

    def info(self, key: str) -> ObjectInfo:
        return self._look("info", key, lambda: self.inner.info(key))

    def names(self, prefix: str, after: str = "") -> list[str]:
        return self._look("names", prefix, lambda: self.inner.names(prefix, after))

    def list(self, prefix: str) -> list[ObjectInfo]:
        return self._look("list", prefix, lambda: self.inner.list(prefix))

    def room(self) -> int | None:
        return self._look("room", "", self.inner.room)

    def sweep(self, before: float) -> None:
        self._change("sweep", "", lambda: self.inner.sweep(before))

    def delete(self, keys: Sequence[str]) -> None:
        if keys:
            self._change(
                "delete",
                keys[0],
                lambda: self.inner.delete(keys),
                lambda fault: self.inner.delete(keys[: len(keys) // 2]),
            )


def _half(stream: Stream, fault: Fault) -> Iterator[Buffer]:
    """Give half of a body, then fail as the network does."""
    pieces = [bytes(piece) for piece in stream.body]
    whole = b"".join(pieces)
    yield whole[: len(whole) // 2]
    raise store_error(fault, stream.key)


class CrashStore(FaultStore):
    """A store whose user dies at the n-th changing call: it raises `Crash`, and lets nothing through afterwards."""

    def __init__(self, store: Store, crash_at: int, when: When = "before") -> None:
        super().__init__(store, FaultPlan(Fault("kill", crash_at, when)))
