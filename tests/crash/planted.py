"""Defects, planted in the product: a pytest plugin (`-p crash.planted`, `HOLDFAST_PLANT=name`).

A suite that stays green with one of them has shown nothing; `test_planted.py` sees that a named test goes red.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

from holdfast.catalog import content
from holdfast.core.buffers import Buffer
from holdfast.saving import job
from holdfast.stores import LocalStore, MemoryStore, ObjectInfo, Store, Stream
from holdfast.testing import ModelService


class _Around:
    """Whatever it stands around, but for what is said otherwise."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


def _on_every_disk(wrap: Callable[[Any], Any]) -> None:
    begin = LocalStore.__init__

    def planted(self: LocalStore, *args: Any, **options: Any) -> None:
        begin(self, *args, **options)
        self.disk = wrap(self.disk)

    LocalStore.__init__ = planted  # type: ignore[method-assign]


class NoFileFsync(_Around):
    def fsync(self, fd: int) -> None:
        """Leave it to the operating system."""


class NoDirectoryFsync(_Around):
    def fsync_dir(self, path: str) -> None:
        """Leave it to the operating system."""


class CommitFirst(_Around):
    """Holds data back until a manifest is there."""

    def __init__(self, inner: Store) -> None:
        super().__init__(inner)
        self._held: list[tuple[str, list[bytes]]] = []

    def write_streams(self, streams: Iterable[Stream]) -> None:
        for stream in streams:
            body = [bytes(piece) for piece in stream.body]
            self._held.append((stream.key, [bytes(stream.head()), *body]))

    def create(self, key: str, data: Buffer) -> None:
        self._inner.create(key, data)
        if key.startswith("checkpoints/"):
            while self._held:
                self._inner.write(*self._held.pop())


def commit_before_data() -> None:
    real = job.Committer.carry_out

    def planted(self: job.Committer, *args: Any) -> job.Committed:
        if not isinstance(self._store, CommitFirst):
            self._store = self._data.store = CommitFirst(self._store)  # type: ignore[assignment]
        return real(self, *args)

    job.Committer.carry_out = planted  # type: ignore[method-assign]


def delete_before_commit() -> None:
    real = job.commit

    def planted(store: Store, *args: Any, **options: Any) -> Any:
        store.delete(store.names("checkpoints"))  # their successor is as good as there
        return real(store, *args, **options)

    job.commit = planted


def ignore_412() -> None:
    put = ModelService.put
    MemoryStore.create = MemoryStore.replace  # type: ignore[method-assign]
    LocalStore.create = LocalStore.replace  # type: ignore[method-assign]
    ModelService.put = lambda self, key, data, if_absent: put(self, key, data, if_absent=False)  # type: ignore[method-assign]


class AnyLength(_Around):
    """A store whose sizes are what is expected of them."""

    def __init__(self, inner: Store, size: int) -> None:
        super().__init__(inner)
        self._size = size

    def info(self, key: str) -> ObjectInfo:
        return replace(self._inner.info(key), size=self._size)


def skip_length_check() -> None:
    real = content.open_file

    def planted(store: Store, entry: Any) -> content.DataFile:
        return real(AnyLength(store, entry.size), entry)  # type: ignore[arg-type]

    for module in list(sys.modules.values()):
        if getattr(module, "open_file", None) is real:
            module.open_file = planted  # type: ignore[attr-defined]


DEFECTS: dict[str, Callable[[], None]] = {
    "drop file fsync": lambda: _on_every_disk(NoFileFsync),
    "drop dir fsync": lambda: _on_every_disk(NoDirectoryFsync),
    "commit before data": commit_before_data,
    "delete before commit": delete_before_commit,
    "ignore 412": ignore_412,
    "skip length check": skip_length_check,
}


def pytest_collection_finish(session: object) -> None:
    """Plant when every module of the product that a test uses is there."""
    name = os.environ.get("HOLDFAST_PLANT")
    if name:
        DEFECTS[name]()


CAUGHT_BY: dict[str, Sequence[str]] = {
    "drop file fsync": ["crash/test_power_loss.py::test_images[save]", "crash/test_power_loss.py::test_a_real_file_system[save0]"],
    "drop dir fsync": ["crash/test_power_loss.py::test_images[save]"],
    "commit before data": ["crash/test_every_call.py::test_of_a_store[save-killed_before_a_call]"],
    "delete before commit": ["crash/test_every_call.py::test_of_a_store[async_save_(inline)-killed_before_a_call]"],
    "ignore 412": ["crash/test_rivals.py::test_rivals[two writers-objects-past the lease]"],
    "skip length check": ["crash/test_file_by_file.py::test_every_file_in_turn[file longer]"],
}  # fmt: skip
